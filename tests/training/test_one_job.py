"""One job at a time in an output folder, from its first look at the folder to the end of its last rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.errors import ConfigError
from megatron_cpt.training import job
from tests.training.conftest import Tiny


def test_a_job_that_starts_while_ranks_are_being_started_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job's ranks train with the first job's settings, and its logs stay."""
    output, real_launch = tmp_path / "run", job.launch
    first = tiny.config(output, train_steps=2, seed=1)
    second = tiny.config(output, train_steps=3, seed=2)

    def launch(module: str, arguments: list[str], *rest: Any) -> None:
        monkeypatch.setattr(job, "launch", lambda *_: pytest.fail("the second job has started its ranks"))
        before = Path(arguments[0]).read_text()
        with pytest.raises(ConfigError, match="another job is running in"):
            job.run_job(second, 1)
        assert Path(arguments[0]).read_text() == before
        real_launch(module, arguments, *rest)

    monkeypatch.setattr(job, "launch", launch)
    assert job.run_job(first, 1).name == "iter_0000002"
    assert json.loads((output / "run.json").read_text())["seed"] == 1


def test_a_job_for_more_devices_than_there_are_writes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_cpt.runtime.device.device_count", lambda: 1)
    with pytest.raises(ConfigError, match="got 2 processes for 1 devices"):
        job.run_job(tiny.config(tmp_path / "run"), 2)
    assert not (tmp_path / "run").exists()
