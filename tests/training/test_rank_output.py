"""`train` as a rank that torchrun has started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.training.conftest import Tiny

ROOT = Path(__file__).resolve().parents[2]


def test_rank_0_of_torchrun_prints_the_result_as_json(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", train_steps=2)
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "megatron_cpt.cli.main", "train", str(tmp_path / "config.yaml"), "--json"],
        cwd=ROOT,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"checkpoint": str(tmp_path / "run" / "checkpoints" / "iter_0000002")}
    assert "step 2/2 | loss" in done.stderr
