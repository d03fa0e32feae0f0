"""Slices of the vocabulary on one, two and four ranks, in one job of four processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.kernels.cross_entropy import linear_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 4
NUM_TOKENS = 40
HIDDEN = 16
# Vocabulary size: rows of each rank. Slices are even, ragged, or wholly in the padding.
LAYOUTS = {
    250: ([256], [128, 128], [64] * 4),
    5397: ([5397], [2699, 2698], [1350, 1349, 1349, 1349]),
    700: ([704], [3, 701], [1, 600, 99, 4]),
    7: ([16], [8, 8], [4] * 4),
    1: ([4], [2, 2], [1] * 4),
}
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "trainable_rows": 70}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence_parallel": {"sequence_parallel": True, "reduction": "sum"},
    "everything": {**EVERYTHING, "reduction": "mean", "sequence_parallel": True},
}
if importlib.util.find_spec("triton") is not None:
    OPTIONS["triton"] = {**EVERYTHING, "sequence_parallel": True, "implementation": "triton"}
# The whole on each rank, or chunks, whose number differs between ranks with slices of different sizes.
CHUNKS = {"whole": 1 << 30, "chunks": 10}
CASES = [
    *((vocab_size, rows, "plain", "chunks") for vocab_size, layouts in LAYOUTS.items() for rows in layouts),
    *((250, rows, name, "whole") for rows in LAYOUTS[250] for name in OPTIONS),
    *((700, rows, "everything", chunks) for rows in LAYOUTS[700] for chunks in CHUNKS),
]


def _case(vocab_size: int, rows: list[int], name: str, chunks: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(vocab_size)
    weight = torch.full((sum(rows), HIDDEN), torch.nan)
    weight[:vocab_size] = torch.randn(vocab_size, HIDDEN, generator=generator)
    labels = torch.randint(0, vocab_size, (NUM_TOKENS,), generator=generator)
    edges = torch.tensor([0, *rows]).cumsum(0)[:-1]
    on_edges = torch.cat([edges, edges - 1]).clamp(0, vocab_size - 1)
    labels[: len(on_edges)], labels[-3:] = on_edges, -100
    return {
        "vocab_size": vocab_size,
        "rows": rows,
        "weight": weight,
        "labels": labels,
        "hidden": torch.randn(NUM_TOKENS, HIDDEN, generator=generator),
        "grad": torch.randn(NUM_TOKENS, generator=generator),
        "budget_bytes": 4 * CHUNKS[chunks] * max(rows),
        "options": OPTIONS[name],
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("vocab_parallel")
    torch.save({str(case): _case(*case) for case in CASES}, folder / "cases.pt")
    script = Path(__file__).with_name("cross_entropy_job.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), str(WORLD_SIZE), str(folder)], env=environment, check=True, timeout=120
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


def _whole(case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the definition, with the whole table on one rank."""
    hidden = case["hidden"].to(dtype).requires_grad_()
    weight = case["weight"][: case["vocab_size"]].to(dtype).requires_grad_()
    options = {**case["options"], "implementation": "reference", "sequence_parallel": False}
    result = linear_cross_entropy(hidden, weight, case["labels"], vocab_size=case["vocab_size"], **options)
    grad = case["grad"] if result.loss.dim() else torch.tensor(0.7)
    grads = torch.autograd.grad(result.loss, (hidden, weight), grad.to(dtype))
    return {"loss": result.loss.detach(), "lse": result.log_sum_exp_N, "hidden": grads[0], "weight": grads[1]}


def _joined(job: list[dict[str, Any]], case: Any) -> dict[str, torch.Tensor]:
    _, rows, name, _ = case
    parts = [rank[str(case)] for rank in job[: len(rows)]]
    hidden = [part["hidden"] for part in parts]
    sequence_parallel = OPTIONS[name].get("sequence_parallel") and len(rows) > 1
    return {
        "loss": parts[0]["loss"],
        "lse": parts[0]["lse"],
        "hidden": torch.cat(hidden) if sequence_parallel else torch.stack(hidden).sum(0),
        "weight": torch.cat([part["weight"] for part in parts]),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_together_equal_the_whole(job: list[dict[str, Any]], case: Any, assert_accurate: Any) -> None:
    given, got = _case(*case), _joined(job, case)
    vocab_size = given["vocab_size"]
    assert not got["weight"][vocab_size:].any()
    got["weight"] = got["weight"][:vocab_size]
    native, truth = _whole(given, torch.float32), _whole(given, torch.float64)
    for what in truth:
        assert_accurate(what, got[what], native[what], truth[what])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_hold_the_same_results_and_exchange_them_once(job: list[dict[str, Any]], case: Any) -> None:
    _, rows, name, _ = case
    results = [rank[str(case)] for rank in job]
    statistics = 4 if "label_smoothing" in OPTIONS[name] else 3
    for result in results:
        for what in ("loss", "correct", "lse"):
            assert torch.equal(result[what], results[0][what])
        forward, backward = [], []
        if len(rows) > 1:
            # Ignored tokens were dropped before.
            forward = [("all_gather_into_tensor", statistics * (NUM_TOKENS - 3))]
            if OPTIONS[name].get("sequence_parallel"):
                forward.insert(0, ("all_gather_into_tensor", NUM_TOKENS * HIDDEN // len(rows)))
                backward = [("reduce_scatter_tensor", NUM_TOKENS * HIDDEN)]
        assert (result["forward"], result["backward"]) == (forward, backward)


@pytest.mark.parametrize("vocab_size", LAYOUTS)
def test_one_two_and_four_ranks_agree(job: list[dict[str, Any]], vocab_size: int) -> None:
    one, *others = (_joined(job, (vocab_size, rows, "plain", "chunks")) for rows in LAYOUTS[vocab_size])
    # The cases of a vocabulary differ in their labels on slice edges; elsewhere they are the same computation.
    same = slice(2 * WORLD_SIZE, None)
    for other in others:
        assert (other["loss"][same] - one["loss"][same]).abs().max() <= 2e-6


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "plain"], ids=str)
def test_the_halves_of_the_op_make_the_same(job: list[dict[str, Any]], case: Any, assert_accurate: Any) -> None:
    given = _case(*case)
    halves = job[0][str(case)]["halves"]
    native, truth = _whole(given, torch.float32), _whole(given, torch.float64)
    halves["weight"] = halves["weight"][: given["vocab_size"]]
    for what, got in halves.items():
        assert_accurate(what, got, native[what], truth[what])
