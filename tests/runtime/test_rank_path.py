"""A rank imports what its launcher runs, whatever lies in the folder the user stands in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import sys
from pathlib import Path
from megatron_cpt.runtime.launcher import launch
launch("tests.runtime.rank_job", [sys.argv[1], "work", "work"], 2, Path(sys.argv[1], "logs"))
"""


@pytest.mark.parametrize("trap", ["megatron_cpt/__init__.py", "random.py", "runpy.py"])
def test_ranks_take_nothing_from_the_current_folder(trap: str, tmp_path: Path) -> None:
    hostile, program = tmp_path / "hostile" / trap, tmp_path / "program" / "launch.py"
    for path, text in ((hostile, "raise ImportError('a rank has read this')"), (program, LAUNCH)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        cwd=tmp_path / "hostile",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank 0 is talking on standard output\n"


def test_ranks_find_the_package_of_their_launcher(tmp_path: Path) -> None:
    """It was found by the current folder alone, as in a clone that is not installed."""
    program = LAUNCH.replace('"work", "work"], 2', '"work"], 1')
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
