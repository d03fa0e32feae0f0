"""A run that was interrupted goes on as if it had not been, in any layout; another run is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.errors import InputError
from megatron_cpt.training.job import run_job
from tests.training.conftest import SHAPE, STEPS, Tiny

HALF = STEPS // 2
SAVES = {"checkpoint": {"save_interval_steps": HALF, "keep_last": 2}}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def interrupt(run: Path, copy: Path) -> None:
    """Copy a finished run as it was when it was killed while it wrote its last checkpoint."""
    shutil.copytree(run, copy)
    last = copy / "checkpoints" / f"iter_{STEPS:07d}"
    last.rename(last.with_name(f".{last.name}.tmp"))


def curve(metrics: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in metrics if "loss" in record]


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = open_torch_dist(run / "checkpoints" / f"iter_{STEPS:07d}")
    return {name: reader.read(name) for name in reader.names()}


@pytest.fixture(scope="module")
def runs(tiny: Tiny) -> dict[str, list[dict[str, Any]]]:
    """An unbroken TP2 x PP2 run, and the same run resumed half-way in several layouts."""
    changes: dict[str, dict[str, Any]] = {"unbroken": {**SAVES, "parallel": TP2_PP2}}
    found = tiny.train_many(changes, 4)
    for name in ("same", "one", "PP2", "DP2"):
        interrupt(tiny.root / "unbroken", tiny.root / f"resumed-{name}")
    found |= tiny.train_many({"resumed-same": {**SAVES, "parallel": TP2_PP2}}, 4)
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    two = {"resumed-PP2": {"pipeline_model_parallel_size": 2}, "resumed-DP2": overlap}
    found |= tiny.train_many({name: {**SAVES, "parallel": parallel} for name, parallel in two.items()}, 2)
    found |= tiny.train_many({"resumed-one": SAVES}, 1)
    return found


@pytest.mark.parametrize("name", ["one", "PP2", "DP2"])
def test_resumed_in_another_layout(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    resumed, unbroken = curve(runs[f"resumed-{name}"]), curve(runs["unbroken"])
    assert len(resumed) == len(unbroken) == STEPS
    difference = max(abs(a - b) for a, b in zip(resumed, unbroken, strict=True))
    print(f"TP2 x PP2 resumed at {name}: {difference:.1e}")
    assert difference <= 1e-4


def test_resumed_in_the_same_layout_is_bit_identical(runs: dict[str, list[dict[str, Any]]], tiny: Tiny) -> None:
    numbers = ("step", "loss", "grad_norm", "learning_rate", "validation")
    wanted = [{key: record.get(key) for key in numbers} for record in runs["unbroken"]]
    assert [{key: record.get(key) for key in numbers} for record in runs["resumed-same"]] == wanted
    first, second = weights(tiny.root / "unbroken"), weights(tiny.root / "resumed-same")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_left_alone(runs: dict[str, list[dict[str, Any]]], tiny: Tiny) -> None:
    run = tiny.root / "resumed-one"
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    run_job(tiny.config(run, **SAVES), 1)
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before


def test_changed_setting_is_refused(runs: dict[str, list[dict[str, Any]]], tiny: Tiny, tmp_path: Path) -> None:
    interrupt(tiny.root / "unbroken", tmp_path / "run")
    changed = {"optimizer": {"learning_rate": 1e-3, "min_learning_rate": 3e-4, "warmup_steps": 2}}
    with pytest.raises(InputError, match="optimizer.learning_rate was 0.003 and is now 0.001"):
        run_job(tiny.config(tmp_path / "run", **SAVES, **changed), 1)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == STEPS  # nothing was dropped


def test_proof_travels_with_the_checkpoint(runs: dict[str, list[dict[str, Any]]], tiny: Tiny) -> None:
    proof = load_file(tiny.root / "unbroken" / "checkpoints" / f"iter_{STEPS:07d}" / "proof.safetensors")
    assert proof["positions"][-1] == len(proof["tokens"]) - 1 == SHAPE.max_position_embeddings - 1
    assert proof["logits"].shape == (len(proof["positions"]), 250) and proof["logits"].dtype == torch.float32
