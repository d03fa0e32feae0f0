"""Every layout computes the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpt.checkpoint import convert, verify
from megatron_cpt.planning.parameters import count_parameters
from megatron_cpt.training.folder import last_checkpoint
from tests.checkpoint.megatron_slices import Layout, rank_slices
from tests.training.conftest import SHAPE, STEPS, Tiny

TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2-uneven": {"pipeline_model_parallel_size": 2, "num_layers_per_stage": [5, 3]},
    "PP2-VPP2-overlap": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p": True,
    },
    "TP2-SP-selective": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute": "selective"},
    "DP2-overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
FOUR_PROCESSES: dict[str, dict[str, Any]] = {
    "TP2-PP2-SP-recompute": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute": "full",
    },
    "PP4-VPP2": {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def runs(tiny: Tiny) -> dict[str, list[dict[str, Any]]]:
    """Metrics of every layout."""
    return {
        **tiny.train_many({name: {"parallel": parallel} for name, parallel in TWO_PROCESSES.items()}, 2),
        **tiny.train_many({name: {"parallel": parallel} for name, parallel in FOUR_PROCESSES.items()}, 4),
    }


def largest_differences(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Largest absolute difference of losses and of bits per byte, and relative one of gradient norms."""
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True)]
    steps = [(a, b) for a, b in pairs if "loss" in b]
    assert len(steps) == STEPS and [a["step"] for a, _ in pairs] == [b["step"] for _, b in pairs]
    loss = max(abs(a["loss"] - b["loss"]) for a, b in steps)
    norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in steps)
    scores = [(a["validation"], b["validation"]) for a, b in pairs if "validation" in b]
    bits = max(abs(a["a"]["bits_per_byte"] - b["a"]["bits_per_byte"]) for a, b in scores)
    assert len(scores) == 2 and all(a["a"]["tokens"] == b["a"]["tokens"] for a, b in scores)
    return loss, bits, norm


@pytest.mark.parametrize("name", [*TWO_PROCESSES, *FOUR_PROCESSES])
def test_layout_equals_one_process(
    name: str, runs: dict[str, list[dict[str, Any]]], reference: list[dict[str, Any]]
) -> None:
    loss, bits, norm = largest_differences(runs[name], reference)
    print(f"{name}: loss {loss:.1e}, bits per byte {bits:.1e}, gradient norm {norm:.1e}")
    assert loss <= 2e-6
    assert bits <= 2e-6
    assert norm <= 1e-4


def check_export(tiny: Tiny, name: str, layout: Layout, processes: int, exported: Path) -> int:
    """Export a run, find every weight of every rank in it, bit for bit, and return how many there were."""
    checkpoint = last_checkpoint(tiny.root / name)
    convert(checkpoint, exported, "hf", tokenizer=tiny.tokenizer)
    verify(checkpoint, exported)
    weights = load_file(exported / "model.safetensors")
    started = load_file(tiny.hf / "model.safetensors")
    assert all(not torch.equal(weights[each], weight) for each, weight in started.items())  # all was trained
    compared = 0
    for rank in range(processes):
        held = torch.load(tiny.root / f"{name}.rank_{rank}.pt")
        wanted = rank_slices(weights, SHAPE, 256, layout, held["tensor_rank"] + layout.tensor * held["pipeline_rank"])
        for chunk, slices in zip(held["chunks"], wanted, strict=True):
            assert chunk.keys() == slices.keys()
            assert all(torch.equal(chunk[each], slice) for each, slice in slices.items())
            compared += sum(weight.numel() for weight in chunk.values())
    return compared


@pytest.mark.parametrize(
    ("name", "layout", "processes"),
    [
        ("TP2-PP2-SP-recompute", Layout(2, 2), 4),
        ("PP2-VPP2-overlap", Layout(1, 2, 2), 2),
        ("DP2-overlap", Layout(), 2),  # the optimizer's state lies in halves on the two ranks
    ],
)
def test_an_export_is_what_the_ranks_held(
    name: str, layout: Layout, processes: int, runs: dict[str, list[dict[str, Any]]], tiny: Tiny, tmp_path: Path
) -> None:
    compared = check_export(tiny, name, layout, processes, tmp_path / "hf")
    parameters = count_parameters(SHAPE, 256).total
    assert compared >= parameters * processes // layout.world_size  # some stand on several ranks


def test_reference_learns(reference: list[dict[str, Any]]) -> None:
    losses = [record["loss"] for record in reference if "loss" in record]
    assert losses[-1] < losses[0] - 0.3
    scores = [record["validation"]["a"] for record in reference if "validation" in record]
    assert scores[-1]["bits_per_byte"] < scores[0]["bits_per_byte"]
