"""Open a checkpoint of any format, told apart by its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cpt.checkpoint.described import Hints, check_hints
from megatron_cpt.checkpoint.files import json_inside, one_line
from megatron_cpt.checkpoint.hf_config import CONFIG, parse_hf_config
from megatron_cpt.checkpoint.hf_tables import HFTables
from megatron_cpt.checkpoint.huggingface import open_hf
from megatron_cpt.checkpoint.llama import check_supported
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.checkpoint.meta import is_meta, open_meta
from megatron_cpt.checkpoint.meta_params import PARAMS
from megatron_cpt.checkpoint.metadata import METADATA
from megatron_cpt.checkpoint.mp_rank import open_mp_rank
from megatron_cpt.checkpoint.mp_rank_files import TRACKER, is_mp_rank, iteration_folder
from megatron_cpt.checkpoint.mp_rank_tables import MpRankTables
from megatron_cpt.checkpoint.nxd import is_nxd, open_nxd
from megatron_cpt.checkpoint.runs import StoredModel
from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.checkpoint.torch_dist_tables import TorchDistTables
from megatron_cpt.config.manifest import MANIFEST, read_json
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError, CptError


def open_checkpoint(folder: str | Path, with_optimizer: bool = False, hints: Hints | None = None) -> StoredModel:
    """Open a checkpoint; only headers are read.

    Args:
        folder: of a checkpoint in any format that `convert` writes; of a training run: its newest checkpoint.
        with_optimizer: find the state of its optimizer too.
        hints: what the checkpoint does not say of itself.

    Raises:
        CheckpointError: it is none, damaged, unsafe, not of a plain Llama, or not what the hints say.
    """
    with _told(folder):
        model = _open(newest_checkpoint(Path(folder)), with_optimizer, hints)
        check_hints(hints or Hints(), model.folder, model.llama, model.vocab_size)
        return model


def _open(folder: Path, with_optimizer: bool, hints: Hints | None) -> StoredModel:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        if folder.is_symlink():
            what = f"is a link to {folder.readlink()}, which {what}"
        raise CheckpointError(f"{folder} {what}, expected the folder of a checkpoint; check the path")
    if (folder / METADATA).exists():
        return open_torch_dist(folder, with_optimizer, hints)
    if is_mp_rank(folder):
        iteration = iteration_folder(folder)
        if (iteration / METADATA).exists():  # Megatron tracks both its formats in one way
            return open_torch_dist(iteration, with_optimizer, hints)
        return open_mp_rank(folder, hints, with_optimizer)
    if is_meta(folder):
        return open_meta(folder, hints)
    if is_nxd(folder):  # before the next: it has a config.json too
        return open_nxd(folder, hints)
    if (folder / CONFIG).exists():
        return open_hf(folder)
    raise CheckpointError(
        f"{folder} holds neither {CONFIG} (a Hugging Face model), nor {METADATA} (a torch_dist checkpoint), nor "
        f"{TRACKER} (a legacy Megatron checkpoint), nor consolidated.00.pth (one of Meta's), nor "
        "model/dp_rank_00_tp_rank_00_pp_rank_00.pt (one of NeuronX Distributed's); give the folder of the "
        f"checkpoint itself{_nearby(folder)}"
    )


def _nearby(folder: Path) -> str:
    """A checkpoint below a folder that is none, for its message: that of a run's step, or of a download cache."""
    marks = (METADATA, TRACKER, PARAMS, CONFIG, "checkpoints")
    for depth in ("*", "*/*"):
        held = sorted(path for path in folder.glob(depth) if any((path / mark).exists() for mark in marks))
        if held:
            more = f", or one of {len(held) - 1} more beside it" if len(held) > 1 else ""
            return f", such as {held[0]}{more}"
    return ""


def read_shape(folder: str | Path) -> tuple[LlamaShape, int]:
    """The architecture and the true vocabulary size of a checkpoint, from its descriptions alone where it has some.

    Raises:
        CheckpointError: the folder is none, or holds something that is not a plain Llama.
    """
    folder = Path(folder)
    with _told(folder):
        if (folder / CONFIG).exists():
            return parse_hf_config(read_json(json_inside(folder, CONFIG), CheckpointError), str(folder / CONFIG))
        if (folder / METADATA).exists() and (folder / MANIFEST).exists():
            manifest = read_checkpoint_manifest(folder)
            return check_supported(manifest["shape"], str(folder)), manifest["vocab_size"]
    model = open_checkpoint(folder)
    return model.llama, model.vocab_size


@contextmanager
def _told(folder: str | Path) -> Iterator[None]:
    """One line of what is wrong with a checkpoint, whatever a reader meets in it; the cause stays with the error."""
    try:
        yield
    except CptError as caught:
        if (line := one_line(str(caught), 2000)) != str(caught):
            raise type(caught)(line) from caught
        raise
    except OSError:
        raise
    except Exception as caught:
        raise CheckpointError(
            f"{folder}: the checkpoint is damaged or unsafe ({one_line(repr(caught), 300)}); copy or make it again"
        ) from caught


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a training run, where the folder is one; else the folder."""
    complete = [path for path in folder.glob("checkpoints/iter_*") if (path / MANIFEST).exists()]
    return max(complete, key=lambda path: path.name) if complete else folder


def state_of_files(model: StoredModel) -> dict[str, list[int]]:
    """Size, times and identity of every file that a model is read from: what changes when one of them does."""
    files = {run.file for placed in model.tensors.values() for run in placed.runs}
    files |= {CONFIG, MANIFEST, METADATA, PARAMS}
    stats = {name: (model.folder / name).stat() for name in sorted(files) if (model.folder / name).exists()}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats.items()}


def open_tables(folder: str | Path, with_optimizer: bool = True) -> HFTables | TorchDistTables | MpRankTables:
    """Open a checkpoint of any format, the legacy `mp_rank` one included, as its vocabulary tables and the rest.

    Args:
        folder: the checkpoint.
        with_optimizer: False: the state of an optimizer is left out of what is written.

    Raises:
        CheckpointError: it is none, damaged, or its optimizer's state cannot follow.
    """
    with _told(folder):
        return _tables(Path(folder), with_optimizer)


def _tables(folder: Path, with_optimizer: bool) -> HFTables | TorchDistTables | MpRankTables:
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
