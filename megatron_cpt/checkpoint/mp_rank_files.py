"""Folders of the legacy Megatron layout: which iteration is the newest, and which rank each file is of.

<folder>/latest_checkpointed_iteration.txt            "release" or a number
<folder>/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.checkpoint.files import not_linked, read_whole
from megatron_cpt.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
SHARDED_OPTIMIZER = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ITERATION = re.compile(r"iter_\d{7,}|release")


@dataclass(frozen=True, order=True)
class Rank:
    """A rank's place in the job, and the name of its folder."""

    stage: int
    tensor: int
    name: str


def is_mp_rank(folder: Path) -> bool:
    """Whether a folder looks like a legacy checkpoint."""
    return (folder / TRACKER).is_file() or any(_RANK.fullmatch(path.name) for path in folder.glob("mp_rank_*"))


def iteration_folder(folder: Path) -> Path:
    """The folder of the iteration that the tracker names, or `folder` itself where it is one."""
    if (folder / TRACKER).is_file():
        tracked = read_whole(folder, TRACKER, 1 << 10).decode("utf-8", errors="replace").strip()
        if tracked != "release" and not re.fullmatch(r"\d{1,12}", tracked):
            raise CheckpointError(f"{folder / TRACKER} says {tracked[:40]!r}, expected 'release' or a number")
        return not_linked(folder / (tracked if tracked == "release" else f"iter_{int(tracked):07d}"))
    if _ITERATION.fullmatch(folder.name):
        return folder
    raise CheckpointError(f"{folder} lacks {TRACKER}; give the folder that Megatron was told to load from")


def tracked_name(iteration: str) -> str:
    """What the tracker says of an iteration's folder."""
    return iteration if iteration == "release" else str(int(iteration.removeprefix("iter_")))


def rank_folder(stage: int, tensor: int, pp: int) -> str:
    """Name of a rank's folder."""
    return f"mp_rank_{tensor:02d}" if pp == 1 else f"mp_rank_{tensor:02d}_{stage:03d}"


def find_ranks(iteration: Path) -> list[Rank]:
    """Every rank, in order; none is missing."""
    paths = sorted(path.name for path in iteration.glob("mp_rank_*"))
    matches = [match for name in paths if (match := _RANK.fullmatch(name))]
    ranks = sorted(Rank(int(match[2] or 0), int(match[1]), match[0]) for match in matches)
    found = {(rank.stage, rank.tensor) for rank in ranks}
    stages, tensor = (1 + max((place[axis] for place in found), default=-1) for axis in (0, 1))
    if not found or len(matches) != len(paths) or len(found) != stages * tensor or len(ranks) != len(found):
        raise CheckpointError(
            f"{iteration} holds {', '.join(paths[:4]) or 'no rank'}; expected mp_rank_TT or mp_rank_TT_PPP for every "
            "tensor and pipeline rank, and no expert ranks: give the whole checkpoint"
        )
    for name in paths:
        not_linked(iteration / name)
    return ranks
