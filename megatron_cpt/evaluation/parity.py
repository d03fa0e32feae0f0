"""The proof of an export: the logits of the exported model against those of the trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runtime.device import current_device

FP32_BOUND = 1e-4
BF16_FACTOR = 4.0  # the two bf16 passes round in different orders; each is off by about the arithmetic's own error


def logit_parity(model: str | Path, proof: str | Path, precision: str = "fp32") -> dict[str, Any]:
    """Compare a model on disk with the logits that a training run left beside its checkpoint.

    Args:
        model: folder of the exported model.
        proof: the checkpoint's `proof.safetensors`: tokens, positions, and the trained model's own
            logits at those positions, computed by the training engine in its layout and precision.
        precision: what the engine computed in, "fp32" or "bf16".

    Returns:
        `max_abs_diff` against the exported model's fp32 logits, the `bound` it has to keep and whether
        it is `within_bound`, `max_abs_logit`, `positions` compared and `last_position`. The bound is
        1e-4 in fp32. In bf16 it is four times the largest difference that bf16 arithmetic alone makes,
        measured on the exported model itself.

    Raises:
        CheckpointError: there is no proof at that path.
    """
    if not Path(proof).exists():
        raise CheckpointError(f"{proof} does not exist; a checkpoint saved by `train` has it beside its manifest")
    stored = load_file(proof)
    positions = stored["positions"]

    def logits(dtype: torch.dtype) -> torch.Tensor:
        forward = LlamaForward(model, dtype, device=current_device().torch_device())
        return forward.logits(stored["tokens"][None], positions=positions)[0].float().cpu()

    exact_PV = logits(torch.float32)
    bound = FP32_BOUND
    if precision == "bf16":
        bound = BF16_FACTOR * float((logits(torch.bfloat16) - exact_PV).abs().max())
    difference = float((exact_PV - stored["logits"]).abs().max())
    return {
        "max_abs_diff": difference,
        "bound": bound,
        "within_bound": difference <= bound,
        "max_abs_logit": float(stored["logits"].abs().max()),
        "positions": len(positions),
        "last_position": int(positions[-1]),
    }
