from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_cpt.kernels.cross_entropy.plan import Call, Plan, decode, make_plan

CALL = Call(
    rows="triton",
    vocab_start=0,
    vocab_size=128256,
    group="",
    group_size=1,
    sequence_parallel=False,
    ignore_index=-100,
    num_scored=-1,
    label_smoothing=0.0,
    z_loss=1e-4,
    softcap=0.0,
    reduction="sum",
    logits_dtype="bfloat16",
    trainable_rows=0,
    budget_bytes=1 << 30,
    train_hidden=True,
    train_weight=True,
    has_main_grad=False,
)


def _plan(
    num_tokens: int,
    *,
    on_cpu: bool = False,
    hidden_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> Plan:
    call = CALL._replace(**changes)
    rows = max(call.vocab_size - call.vocab_start, 0)
    return make_plan(call, num_tokens, rows, hidden_size, weight_dtype=dtype, on_cpu=on_cpu)


def test_the_arguments_travel_as_text() -> None:
    for call in (CALL, CALL._replace(group='tp\'s "group"', z_loss=0.1 + 0.2, num_scored=7)):
        assert decode(call.encode()) == call


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "forward"),
        ({"reduction": "none"}, "recompute"),
        ({"group_size": 2, "group": "tp"}, "recompute"),
        ({"budget_bytes": 1 << 32}, "kept"),
        ({"vocab_size": 43176}, "kept"),
        ({"vocab_size": 43176, "logits_dtype": "float32"}, "forward"),
        ({"num_scored": 4000}, "kept"),
        ({"train_weight": False}, "forward"),
        ({"has_main_grad": True}, "forward"),
        ({"has_main_grad": True, "reduction": "none"}, "recompute"),
        ({"has_main_grad": True, "train_weight": False}, "forward"),
        # Sums over two chunks are made in the gradient itself: the budget is all that is needed.
        ({"hidden_size": 4096}, "forward"),
        ({"hidden_size": 4096, "reduction": "none"}, "recompute"),
        # A sum in fp32 and a chunk would take no less than all logits.
        ({"hidden_size": 4096, "has_main_grad": True}, "kept"),
        ({"hidden_size": 4096, "has_main_grad": True, "reduction": "none"}, "recompute"),
        ({"hidden_size": 4096, "has_main_grad": True, "train_weight": False}, "forward"),
        ({"hidden_size": 4096, "has_main_grad": True, "trainable_rows": 128000}, "forward"),
        ({"hidden_size": 4096, "budget_bytes": 1 << 28}, "kept"),
        ({"hidden_size": 1024, "budget_bytes": 1 << 28}, "forward"),
        ({"train_weight": False, "train_hidden": False}, "statistics"),
    ],
)
def test_the_first_way_that_fits(changes: dict[str, Any], path: str) -> None:
    assert _plan(8192, **changes).path == path


def test_many_chunks_of_short_numbers_are_summed_in_fp32() -> None:
    """Where a sum in the weight's own dtype would be rounded too often or too large, and where it has to wait."""
    assert not _plan(16384).wide_sum and _plan(20480).wide_sum
    assert not _plan(20480, dtype=torch.float32).wide_sum
    assert _plan(8192, dtype=torch.float16).wide_sum and not _plan(4096, dtype=torch.float16).wide_sum
    assert _plan(16384, has_main_grad=True).wide_sum
    assert not _plan(20480, has_main_grad=True, reduction="none").wide_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_main_grad", [False, True])
def test_what_is_kept_makes_a_single_product(dtype: torch.dtype, has_main_grad: bool) -> None:
    """So that nothing is summed; one chunk that an accelerator takes above its budget is kept, too."""
    for num_tokens, vocab_size, budget in ((8192, 43177, 1 << 30), (8192, 128256, 1 << 28), (1000, 128256, 1 << 20)):
        changes = {"vocab_size": vocab_size, "budget_bytes": budget, "has_main_grad": has_main_grad}
        plan = _plan(num_tokens, hidden_size=4096, dtype=dtype, **changes)
        assert (plan.path, plan.wide_sum, len(plan.parts())) == ("kept", False, 1)


@pytest.mark.parametrize("num_tokens", [1, 1000, 8192, 8193, 16384, 50000])
@pytest.mark.parametrize("vocab_size", [7, 5397, 128256, 176000])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_chunks_are_of_like_sizes_under_the_budget(num_tokens: int, vocab_size: int, on_cpu: bool) -> None:
    plan = _plan(num_tokens, vocab_size=vocab_size, on_cpu=on_cpu, budget_bytes=1 << 29)
    parts = plan.parts()
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == num_tokens
    assert plan.stride % 64 == 0 and 0 <= plan.stride - vocab_size < 64
    sizes = [part.stop - part.start for part in parts]
    granularity = 1 if on_cpu else 256
    assert max(sizes) * plan.stride * 2 <= 1 << 29
    assert all(max(sizes) - size < granularity * len(sizes) for size in sizes)
    if len(sizes) > 1:
        assert plan.chunk % granularity == 0
        assert on_cpu or plan.chunk >= 1024


def test_the_least_chunk_of_an_accelerator_may_exceed_a_small_budget() -> None:
    assert _plan(8192, budget_bytes=1).chunk == 1024
    assert _plan(8192, budget_bytes=1, on_cpu=True).chunk == 1


def test_a_slice_in_the_padding_has_nothing_to_multiply() -> None:
    call = CALL._replace(vocab_start=200000, group_size=2, group="tp")
    plan = make_plan(call, 8192, 1000, 64, weight_dtype=torch.bfloat16, on_cpu=False)
    assert plan.num_columns == 0 and plan.parts() == []
