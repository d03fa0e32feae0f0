"""The job of test_optimizer_state.py for runs of our own: `python -m tests.checkpoint.own_run_job ROOT`.

ROOT/whole.json is trained; its checkpoint of step 2, ROOT/whole/checkpoints/iter_0000002, is converted to ranks of
Megatron's, ROOT/ranks, and back, ROOT/converted. ROOT/again is that run with the converted checkpoint in the place of
all others, and is resumed; ROOT/begun.json begins from it, ROOT/ranked.json from the ranks. One process for all, to
pay for imports once.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.training import many_jobs


def main(root: Path) -> None:
    from megatron_cpt.checkpoint import convert

    many_jobs.main(1, [str(root / "whole.json")])
    convert(root / "whole" / "checkpoints" / "iter_0000002", root / "ranks", "mp_rank", tp=2, pp=2, vpp=2)
    convert(root / "ranks", root / "converted", "torch_dist")
    shutil.copytree(root / "whole", root / "again")
    checkpoints = root / "again" / "checkpoints"
    shutil.rmtree(checkpoints)
    shutil.copytree(root / "converted", checkpoints / "iter_0000002")
    many_jobs.main(1, [str(root / f"{name}.json") for name in ("again", "begun", "ranked")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
