from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

ROOT = Path(__file__).resolve().parents[2]
WORLD_SIZE = 4
NUM_TOKENS = 37
HIDDEN = 16
# Vocabulary size: rows of each rank. Slices are even, ragged, or wholly in the padding.
LAYOUTS = {
    250: ([256], [128, 128], [64] * 4),
    5397: ([5397], [2699, 2698], [1350, 1349, 1349, 1349]),
    700: ([704], [3, 701], [1, 600, 99, 4]),
    7: ([16], [8, 8], [4] * 4),
    1: ([4], [2, 2], [1] * 4),
}
CASES = [(vocab_size, rows) for vocab_size, layouts in LAYOUTS.items() for rows in layouts]


def _case(vocab_size: int, rows: list[int]) -> dict[str, Any]:
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
        # Ranks with slices of different sizes then have different numbers of chunks.
        "budget_bytes": 4 * 10 * max(rows),
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("vocab_parallel")
    torch.save({str(case): _case(*case) for case in CASES}, folder / "cases.pt")
    script = Path(__file__).with_name("vocab_parallel_job.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script), str(WORLD_SIZE), str(folder)], env=environment, check=True, timeout=120
    )
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


def _whole(case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    hidden = case["hidden"].to(dtype).requires_grad_()
    weight = case["weight"][: case["vocab_size"]].to(dtype).requires_grad_()
    loss = cross_entropy(linear(hidden, weight), case["labels"], reduction="none")
    grads = torch.autograd.grad(loss, (hidden, weight), case["grad"].to(dtype))
    return {"loss": loss.detach(), "hidden": grads[0], "weight": grads[1]}


def _joined(job: list[dict[str, Any]], vocab_size: int, rows: list[int]) -> dict[str, torch.Tensor]:
    parts = [rank[str((vocab_size, rows))] for rank in job[: len(rows)]]
    return {
        "loss": parts[0]["loss"],
        "hidden": torch.stack([part["hidden"] for part in parts]).sum(0),
        "weight": torch.cat([part["weight"] for part in parts]),
    }


@pytest.mark.parametrize(("vocab_size", "rows"), CASES, ids=str)
def test_shards_together_equal_the_whole(
    job: list[dict[str, Any]], vocab_size: int, rows: list[int], assert_accurate: Any
) -> None:
    case, got = _case(vocab_size, rows), _joined(job, vocab_size, rows)
    assert not got["weight"][vocab_size:].any()
    got["weight"] = got["weight"][:vocab_size]
    native, truth = _whole(case, torch.float32), _whole(case, torch.float64)
    for what in truth:
        assert_accurate(what, got[what], native[what], truth[what])


@pytest.mark.parametrize(("vocab_size", "rows"), CASES, ids=str)
def test_ranks_hold_the_same_loss_and_exchange_three_numbers_a_token(
    job: list[dict[str, Any]], vocab_size: int, rows: list[int]
) -> None:
    results = [rank[str((vocab_size, rows))] for rank in job]
    for result in results:
        assert torch.equal(result["loss"], results[0]["loss"])
        assert result["sent"] == ([] if len(rows) == 1 else [NUM_TOKENS, 2 * NUM_TOKENS])


@pytest.mark.parametrize("vocab_size", [250, 5397, 7, 1])
def test_one_two_and_four_ranks_agree(job: list[dict[str, Any]], vocab_size: int) -> None:
    one, *others = (_joined(job, vocab_size, rows) for rows in LAYOUTS[vocab_size])
    # The cases of a vocabulary differ in their labels on slice edges; elsewhere they are the same computation.
    same = slice(2 * WORLD_SIZE, None)
    for other in others:
        assert (other["loss"][same] - one["loss"][same]).abs().max() <= 2e-6
