"""Open a checkpoint of any format, told apart by its files."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.hf_tables import HFTables
from megatron_cpt.checkpoint.huggingface import HFReader, open_hf
from megatron_cpt.checkpoint.metadata import METADATA
from megatron_cpt.checkpoint.mp_rank_tables import TRACKER, MpRankTables, is_mp_rank
from megatron_cpt.checkpoint.torch_dist import TorchDistReader, open_torch_dist
from megatron_cpt.checkpoint.torch_dist_tables import TorchDistTables
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


def open_tables(folder: str | Path, with_optimizer: bool = True) -> HFTables | TorchDistTables | MpRankTables:
    """Open a checkpoint of any format, the legacy `mp_rank` one included, as its vocabulary tables and the rest.

    Args:
        folder: the checkpoint.
        with_optimizer: False: the state of an optimizer is left out of what is written.

    Raises:
        CheckpointError: it is none, damaged, or its optimizer's state cannot follow.
    """
    folder = Path(folder)
    if (folder / METADATA).exists():
        return TorchDistTables(folder, with_optimizer)
    if (folder / CONFIG).exists():
        return HFTables(folder)
    if is_mp_rank(folder):
        return MpRankTables(folder, with_optimizer)
    raise CheckpointError(
        f"{folder} holds neither {CONFIG} (a Hugging Face model), nor {METADATA} (a torch_dist checkpoint), nor "
        f"{TRACKER} (a legacy Megatron checkpoint); give the folder of the checkpoint itself"
    )
