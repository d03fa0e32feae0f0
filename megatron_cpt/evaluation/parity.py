"""The proof of an export: the logits of the exported model against those of the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.errors import CheckpointError


def logit_parity(model: str | Path, proof: str | Path) -> dict[str, Any]:
    """Compare a model on disk with the logits that a training run left beside its checkpoint.

    Args:
        model: folder of the exported model.
        proof: the checkpoint's `proof.safetensors`: tokens, positions, and the trained model's own
            logits at those positions, computed by the training engine in its layout and precision.

    Returns:
        `max_abs_diff` of the fp32 logits, `max_abs_logit`, `positions` compared and `last_position`.

    Raises:
        CheckpointError: there is no proof at that path.
    """
    if not Path(proof).exists():
        raise CheckpointError(f"{proof} does not exist; a checkpoint saved by `train` has it beside its manifest")
    stored = load_file(proof)
    positions = stored["positions"]
    logits_PV = LlamaForward(model).logits(stored["tokens"][None])[0, positions]
    return {
        "max_abs_diff": float((logits_PV - stored["logits"]).abs().max()),
        "max_abs_logit": float(stored["logits"].abs().max()),
        "positions": len(positions),
        "last_position": int(positions[-1]),
    }
