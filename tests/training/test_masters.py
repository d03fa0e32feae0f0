"""The optimizer's state is stored where it belongs, and not taken up where it is not that of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_cpt.training.folder import checkpoint_folders, last_checkpoint
from tests.training.conftest import SHAPE, Tiny, change_stored, make_tiny

STATE = "optimizer.state."
BF16: dict[str, Any] = {
    "precision": "bf16",
    "train_steps": 4,
    "checkpoint": {"save_interval_steps": 2, "keep_last": 2},
}
BUCKETED: dict[str, Any] = {**BF16, "parallel": {"overlap_grad_reduce": True}}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by torch's own reader."""
    index = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    torch_checkpoint.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def one_number(values: torch.Tensor) -> torch.Tensor:
    """The last number is another by more than bf16 rounds off."""
    values.view(-1)[-1] *= 1 + 2**-6
    return values


def curve(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in metrics if "loss" in record]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("two layers"), 250, SHAPE.model_copy(update={"num_layers": 2}))


@pytest.fixture(scope="module")
def runs(small: Tiny) -> dict[str, list[dict[str, Any]]]:
    """A run with one bucket, the same with many that stops half-way and goes on, and an fp32 run."""
    went_on = {"output": str(small.root / "bucketed-half")}
    jobs: dict[str, dict[str, Any]] = {
        "one-bucket": BF16,
        "bucketed-half": {**BUCKETED, "train_steps": 2},  # while the rate rises, it is that of the longer run
        "bucketed-more": {**BUCKETED, **went_on},
        "masters-fp32": {"train_steps": 1},
    }
    return small.train_many(jobs, 1)


def test_state_behind_a_padded_bucket(runs: dict[str, list[dict[str, Any]]], small: Tiny) -> None:
    """Stored and taken up again, all is as with one bucket, bit for bit."""
    (last,) = torch.load(small.root / "one-bucket.rank_0.pt")["bucket_padding"]
    padding = torch.load(small.root / "bucketed-more.rank_0.pt")["bucket_padding"]
    assert last > 0 and len(padding) > 3 and sum(number > 0 for number in padding[:-1]) > 3
    checkpoints = (checkpoint_folders(small.root / name) for name in ("bucketed-half", "one-bucket"))
    for (step, folder), (step_of_other, other) in zip(*checkpoints, strict=True):
        got, wanted = stored(folder), stored(other)
        assert step == step_of_other and got.keys() == wanted.keys()
        assert sum(name.startswith(STATE) for name in got) == 3 / 4 * len(got) > 0
        assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == [], step
    assert curve(runs["bucketed-half"]) == curve(runs["one-bucket"]) and len(curve(runs["one-bucket"])) == 4


def test_masters_of_other_weights_are_refused(runs: dict[str, list[dict[str, Any]]], small: Tiny) -> None:
    """One number of all is another, which one of two ranks has: both refuse, and their next job begins."""
    folders = {}
    for precision, run in (("bf16", "bucketed-half"), ("fp32", "masters-fp32")):
        copy = small.root / f"failing-{precision}"
        shutil.copytree(small.root / run, copy)
        folders[precision] = last_checkpoint(copy)
        change_stored(folders[precision], STATE + "param.decoder.final_layernorm.weight", one_number)
    begun = {"initial_checkpoint": str(folders["bf16"]), "train_steps": 1}
    jobs: dict[str, dict[str, Any]] = {
        "failing-bf16": {**BUCKETED, "train_steps": 5},
        "failing-fp32": {"train_steps": 2},
        "failing-initial": {**begun, "initial_optimizer": True},
        "weights-alone": begun,
        "rounded": {
            "initial_checkpoint": str(last_checkpoint(small.root / "bucketed-half")),
            "train_steps": 1,
            "initial_optimizer": True,
        },
    }
    metrics = small.train_many(jobs, 2)
    for name, folder in {"bf16": folders["bf16"], "fp32": folders["fp32"], "initial": folders["bf16"]}.items():
        error = (small.root / f"failing-{name}.error").read_text()
        assert error.startswith(f"CheckpointError: {folder} holds an optimizer's state that is not of its weights (1 ")
        assert error.endswith("without initial_optimizer") and "\n" not in error
    assert [len(curve(metrics[name])) for name in jobs] == [4, 1, 0, 1, 1]
