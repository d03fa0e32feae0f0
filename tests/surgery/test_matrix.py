"""Rows of every kind against float64, and any slice of them against the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpt.config.surgery import parse_method
from megatron_cpt.errors import CheckpointError, InputError
from megatron_cpt.surgery import MatrixPlan, RowMaker, RowMix, SurgeryPlan, matrix, plan_surgery
from megatron_cpt.surgery.matrix import Adjustment, Fill, SimilarityMix
from megatron_cpt.surgery.random_rows import normal_rows
from megatron_cpt.tokenizer import Entry, VocabMap

NUM_OLD, WIDTH = 60, 24


@pytest.fixture(scope="module")
def old_VD() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(NUM_OLD, WIDTH, generator=generator) @ mixing / 5 + torch.randn(WIDTH, generator=generator)


@pytest.fixture(scope="module")
def a_map() -> VocabMap:
    """100 ids: old ones moved about, and new ones of 1 to 4 old pieces."""
    draw = torch.Generator().manual_seed(5)
    moved = torch.randperm(NUM_OLD, generator=draw).tolist()
    entries = [Entry("special", 0), Entry("byte", 1)]
    for id in range(2, 100):
        if id % 3 == 0 and moved:
            old = moved.pop()
            entries.append(Entry("kept", old) if old > 1 else Entry("new", None, (old,)))
        else:
            count = 1 + id % 4
            entries.append(Entry("new", None, tuple(torch.randint(NUM_OLD, (count,), generator=draw).tolist())))
    return VocabMap(NUM_OLD, 100, "old", "new", tuple(entries))


def made(method: object, a_map: VocabMap, old_VD: torch.Tensor, head: bool = False) -> torch.Tensor:
    plan = plan_surgery(a_map, parse_method(method), parse_method(method))
    return RowMaker(plan.head if head else plan.embedding, old_VD).rows(0, a_map.new_size)


def new_ids(a_map: VocabMap) -> list[int]:
    return [id for id, entry in enumerate(a_map.entries) if entry.origin == "new"]


ALL = ["mean", "first", "last", "position", "zero", "global_mean", "inherit", "normal", "covariance"]


@pytest.mark.parametrize("method", ALL)
def test_kept_rows_keep_every_bit(method: str, a_map: VocabMap, old_VD: torch.Tensor) -> None:
    rows = made({"method": method, "match_norm": method != "zero"}, a_map, old_VD.bfloat16())
    for id, entry in enumerate(a_map.entries):
        if entry.old_id is not None:
            assert torch.equal(rows[id], old_VD.bfloat16()[entry.old_id])


def test_rows_of_pieces(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    truth = old_VD.double()
    expected = {
        "mean": lambda ids: truth[ids].mean(0),
        "first": lambda ids: truth[ids[0]],
        "last": lambda ids: truth[ids[-1]],
        "position": lambda ids: (
            (truth[ids] * torch.arange(1, len(ids) + 1)[:, None]).sum(0) / sum(range(1, len(ids) + 1))
        ),
    }
    for method, row in expected.items():
        rows = made(method, a_map, old_VD)
        for id in new_ids(a_map):
            torch.testing.assert_close(rows[id].double(), row(list(a_map.entries[id].old_pieces)), rtol=0, atol=1e-6)


def test_one_row_for_all_and_inheritance(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    new = new_ids(a_map)
    assert not made("zero", a_map, old_VD)[new].any()
    mean = made("global_mean", a_map, old_VD)[new]
    torch.testing.assert_close(mean.double(), old_VD.double().mean(0).expand(len(new), -1), rtol=0, atol=1e-6)
    inherited, means = made("inherit", a_map, old_VD), made("mean", a_map, old_VD)
    below = [id for id in new if id < NUM_OLD]
    beyond = [id for id in new if id >= NUM_OLD]
    assert below and beyond
    assert torch.equal(inherited[below], old_VD[below]) and torch.equal(inherited[beyond], means[beyond])


def test_random_rows_belong_to_their_id(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    new = new_ids(a_map)
    first = made({"method": "normal", "std": 0.5}, a_map, old_VD)
    assert torch.equal(first, made({"method": "normal", "std": 0.5}, a_map, old_VD))
    assert not torch.equal(first, made({"method": "normal", "std": 0.5, "seed": 2}, a_map, old_VD))
    assert not torch.equal(first[new], made({"method": "normal", "std": 0.5}, a_map, old_VD, head=True)[new])
    assert torch.equal(first[new[7]], 0.5 * normal_rows(1, 0, [new[7]], WIDTH)[0])
    assert len(first[new].unique()) > 0.99 * first[new].numel()
    many = normal_rows(4, 1, range(2000), 33)
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02
    assert abs(float((many**4).mean()) - 3) < 0.15  # normal, not merely of unit variance
    correlation = torch.corrcoef(many.T).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.1
    # Philox's words and Box and Muller's formula, fixed for all machines.
    assert normal_rows(1, 0, [5], 3).tolist() == [normal_rows(1, 0, [4, 5, 6], 3)[1].tolist()][0:1]


def test_covariance(old_VD: torch.Tensor) -> None:
    entries = (Entry("kept", 0), *(Entry("new", None, (1,)) for _ in range(20_000)))
    rows = made("covariance", VocabMap(NUM_OLD, len(entries), "old", "new", entries), old_VD.double().float())[1:]
    truth = torch.cov(old_VD.double().T, correction=0)
    error = (torch.cov(rows.double().T) - truth).norm() / truth.norm()
    assert float(error) < 0.05
    assert float((rows.double().mean(0) - old_VD.double().mean(0)).abs().max()) < 0.1


def test_a_table_of_few_rows_has_a_spread_too() -> None:
    entries = tuple(Entry("new", None, (0,)) for _ in range(5))
    few_VD = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert made("covariance", VocabMap(3, 5, "old", "new", entries), few_VD).isfinite().all()


def test_norms(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    new = new_ids(a_map)
    for method in ("mean", "global_mean", "normal", "covariance"):
        rows = made({"method": method, "match_norm": True}, a_map, old_VD)
        wanted = float(old_VD.double().norm(dim=1).mean())
        assert rows[new].norm(dim=1).tolist() == pytest.approx([wanted] * len(new), rel=1e-5)
    assert not made({"method": "zero", "match_norm": True}, a_map, old_VD)[new].any()


def test_nothing_is_kept(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    rows = made({"method": "normal", "copy_kept": False}, a_map, old_VD)
    assert float(rows.abs().max()) < 0.2 and len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("rule", ["clamped", "signed"])
def test_similarity(rule: str, old_VD: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(8)
    new_vectors, old_vectors = (
        torch.nn.functional.normalize(torch.randn(count, 7, generator=generator), dim=1) for count in (30, NUM_OLD - 10)
    )
    mix = RowMix.from_rows([((), ())] * 40, NUM_OLD)
    rows, old_rows = torch.arange(10, 40), torch.randperm(NUM_OLD, generator=generator)[: NUM_OLD - 10]
    plan = MatrixPlan(mix, rows, {}, (), SimilarityMix(rows, old_rows, new_vectors, old_vectors, rule))  # type: ignore[arg-type]
    cosine = new_vectors.double() @ old_vectors.double().T
    weights = cosine.clamp(min=0) if rule == "clamped" else cosine
    condition = weights.abs().sum(1, keepdim=True) / weights.sum(1, keepdim=True).abs()  # of the sum of the weights
    truth = weights / weights.sum(1, keepdim=True) @ old_VD.double()[old_rows]
    made_rows = RowMaker(plan, old_VD).rows(0, 40)
    assert not made_rows[:10].any()
    allowed = 2e-6 * condition * (1 + truth.abs().amax(1, keepdim=True))
    assert ((made_rows[10:].double() - truth).abs() <= allowed).all()


def adjusted(a_map: VocabMap, method: str) -> MatrixPlan:
    generator = torch.Generator().manual_seed(9)
    plan = plan_surgery(a_map, parse_method(method)).embedding
    shapes = (WIDTH,), (len(plan.new_rows), 2), (2, WIDTH), (WIDTH, 3), (3, WIDTH)
    adjustment = Adjustment(0.25, *(torch.randn(shape, generator=generator) for shape in shapes))
    return replace(plan, adjustment=adjustment)


def test_adjustment(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    new, plan = new_ids(a_map), adjusted(a_map, "mean")
    before, last = made("mean", a_map, old_VD).double()[new], plan.adjustment
    assert last is not None
    truth = before * 1.25 + last.offset_D + last.features_NF.double() @ last.directions_FD.double()
    truth += before @ last.down_DR.double() @ last.up_RD.double()
    rows = RowMaker(plan, old_VD).rows(0, a_map.new_size)
    torch.testing.assert_close(rows[new].double(), truth, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="calibrated on a model of width 24"):
        RowMaker(plan, old_VD[:, :8])


@pytest.mark.parametrize("method", [*ALL, "adjusted"])
def test_shards_are_slices(method: str, a_map: VocabMap, old_VD: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that come from products of matrices, whose last bits follow the size of the product."""
    monkeypatch.setattr(matrix, "BLOCK_ROWS", 16)
    plan = adjusted(a_map, "covariance") if method == "adjusted" else plan_surgery(a_map, parse_method(method)).head
    whole = RowMaker(plan, old_VD.bfloat16()).rows(0, 100)
    assert torch.equal(torch.cat(list(RowMaker(plan, old_VD.bfloat16()).blocks())), whole)
    for step in (1, 7, 25, 33):
        maker = RowMaker(plan, old_VD.bfloat16())
        assert torch.equal(torch.cat([maker.rows(at, min(at + step, 100)) for at in range(0, 100, step)]), whole)
        assert torch.equal(RowMaker(plan, old_VD.bfloat16()).rows(50, 50 + step), whole[50 : 50 + step])


@pytest.mark.parametrize("kind", ["covariance", "clamped", "signed", "adjusted"])
def test_threads_change_no_bit(kind: str) -> None:
    """Few rows of a wide table: a product that two threads share is summed in another order."""
    generator = torch.Generator().manual_seed(6)
    old_VD = torch.randn(1200, 512, generator=generator)
    rows = torch.arange(7)
    plan = MatrixPlan(RowMix.from_rows([((), ())] * len(rows), len(old_VD)), rows, {}, match_norm=True)
    if kind in ("clamped", "signed"):
        vectors = torch.nn.functional.normalize(torch.rand(1207, 96, generator=generator), dim=1)
        made = SimilarityMix(rows, torch.arange(1200), vectors[:7], vectors[7:], kind)  # type: ignore[arg-type]
        plan = replace(plan, similarity=made)
    else:
        plan = replace(plan, fills=(Fill(rows, "covariance" if kind == "covariance" else "normal", 1.0, seed=1),))
    if kind == "adjusted":
        shapes = (512,), (7, 65), (65, 512), (512, 8), (8, 512)
        plan = replace(plan, adjustment=Adjustment(0.1, *(torch.randn(s, generator=generator) for s in shapes)))
    threads, bits = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            bits.append(RowMaker(plan, old_VD).rows(0, len(rows)))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(bits[0], other) for other in bits[1:]) and bits[0].isfinite().all()


def test_a_row_that_is_like_no_other(old_VD: torch.Tensor) -> None:
    unit = torch.eye(3)
    mix, rows = RowMix.from_rows([((), ())] * 2, NUM_OLD), torch.arange(2)
    plan = MatrixPlan(mix, rows, {}, (), SimilarityMix(rows, torch.arange(2), unit[1:], unit[:2], "clamped"))
    with pytest.raises(InputError, match=r"rows \[1\] of the plan are like no old row"):
        RowMaker(plan, old_VD).rows(0, 2)


def test_saved_and_read(a_map: VocabMap, old_VD: torch.Tensor, tmp_path: Path) -> None:
    for number, method in enumerate((*ALL, {"method": "mean", "match_norm": True}, "adjusted")):
        if method == "adjusted":
            plan = replace(plan_surgery(a_map), head=adjusted(a_map, "mean"))
        else:
            plan = plan_surgery(a_map, parse_method(method), parse_method("first"))
        plan.save(tmp_path / str(number))
        loaded = SurgeryPlan.load(tmp_path / str(number))
        assert loaded.facts() == plan.facts() and loaded.row(99) == plan.row(99)
        for name in ("embedding", "head"):
            rows = (RowMaker(each.matrix(name), old_VD).rows(0, 100) for each in (plan, loaded))
            assert torch.equal(*rows)


def test_moments_follow_the_kept_rows(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    for method in (*ALL, {"method": "normal", "copy_kept": False}):
        plan = plan_surgery(a_map, parse_method(method)).embedding.kept_only()
        rows = RowMaker(plan, old_VD).rows(0, 100)
        for id, entry in enumerate(a_map.entries):
            kept = entry.old_id is not None and "copy_kept" not in method
            assert torch.equal(rows[id], old_VD[entry.old_id] if kept else torch.zeros(WIDTH))


def test_plans_without_meaning(a_map: VocabMap, old_VD: torch.Tensor) -> None:
    plan = plan_surgery(a_map).embedding
    beyond, twice, sources = torch.tensor([100]), torch.tensor([5, 5]), plan.new_rows[:1]
    for rows in (beyond, twice, sources, torch.tensor([[3]]), torch.tensor([1.0])):
        with pytest.raises(InputError, match="make it again"):
            MatrixPlan(plan.mix, plan.new_rows, {}, (Fill(rows, "mean"),)).check()
    with pytest.raises(CheckpointError, match="at least 60 rows"):
        RowMaker(plan, old_VD[:59])
