"""`README.md` of an exported model: what it is and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_cpt import __version__
from megatron_cpt.checkpoint.reader import num_bytes
from megatron_cpt.checkpoint.runs import StoredModel


def model_card(source: StoredModel, facts: Mapping[str, Any]) -> str:
    """The card's text.

    Args:
        source: what was converted.
        facts: of the conversion.
    """
    llama = source.llama
    parameters = sum(num_bytes(source.shape(name), torch.uint8) for name in source.names())
    scaling = "none" if llama.rope_scaling is None else f"llama3, factor {llama.rope_scaling.factor:g}"
    rows = {
        "Architecture": f"Llama, {llama.num_layers} layers of width {llama.hidden_size:,}",
        "Parameters": f"{parameters:,}",
        "Vocabulary": f"{facts['vocab_size']:,} tokens",
        "Context": f"{llama.max_position_embeddings:,} tokens (rotary base {llama.rope_theta:g}, scaling: {scaling})",
        "Precision": facts["dtype"],
        "Trained for": f"{facts['step']:,} steps since its initial weights" if facts.get("step") else None,
        "Weights SHA-256": f"`{facts['weights_sha256']}`",
        "Tokenizer SHA-256": f"`{facts['tokenizer_sha256'] or 'not recorded'}`",
        "Converted by": f"megatron-cpt {__version__}, from a `{facts['from']}` checkpoint",
        "Cast": f"{facts['cast']}, largest error {facts['cast_max_abs_error']:.3g}"
        if "cast_max_abs_error" in facts  # the source may have had that dtype
        else None,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    title = Path(facts["destination"]).name
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {title}\n\n"
        f"| | |\n|---|---|\n{table}\n"
        f"\n`manifest.json` holds the SHA-256 of every tensor and file; `megatron-cpt checkpoint verify` checks them.\n"
    )
