"""The part of the job of test_optimizer_state.py that is runs of our own.

ROOT/whole.json is trained; its checkpoint of step 2, ROOT/whole/checkpoints/iter_0000002, is converted to ranks of
Megatron's, ROOT/ranks, and back, ROOT/converted. ROOT/again is that run with the converted checkpoint in the place of
all others, and is resumed; ROOT/begun.json begins from it, ROOT/ranked.json from the ranks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.training import many_jobs


def main(root: Path) -> None:
    from megatron_cpt.checkpoint import convert

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "1"}  # as the launcher
    many_jobs.main(1, [str(root / "whole.json")])
    convert(root / "whole" / "checkpoints" / "iter_0000002", root / "ranks", "mp_rank", tp=2, pp=2, vpp=2)
    convert(root / "ranks", root / "converted", "torch_dist")
    shutil.copytree(root / "whole", root / "again")
    checkpoints = root / "again" / "checkpoints"
    shutil.rmtree(checkpoints)
    shutil.copytree(root / "converted", checkpoints / "iter_0000002")
    many_jobs.main(1, [str(root / f"{name}.json") for name in ("again", "begun", "ranked")])
