"""Open a checkpoint of any format, told apart by its files."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.huggingface import HFReader, open_hf
from megatron_cpt.checkpoint.metadata import METADATA
from megatron_cpt.checkpoint.torch_dist import TorchDistReader, open_torch_dist
from megatron_cpt.errors import CheckpointError


def open_checkpoint(folder: str | Path) -> HFReader | TorchDistReader:
    """Open a Hugging Face or a `torch_dist` folder; raises CheckpointError when it is neither."""
    folder = Path(folder)
    if (folder / METADATA).exists():
        return open_torch_dist(folder)
    if (folder / CONFIG).exists():
        return open_hf(folder)
    raise CheckpointError(
        f"{folder} holds neither {CONFIG} (a Hugging Face model) nor {METADATA} (a torch_dist checkpoint); "
        "give the folder of the checkpoint itself"
    )
