from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels import document_positions, rope, rotary_table
from megatron_cpt.kernels.tuning import Launch
from tests.kernels.comparing import assert_accurate_and_confined, run
from tests.kernels.guarded import guarded

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["torch", "triton"])

pytestmark = pytest.mark.usefixtures("triton")


def _plain(heads: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Llama's formula, one torch op after the other."""
    shape = len(heads), *[1] * (heads.dim() - 2), heads.shape[-1]
    cos, sin = (table.repeat(1, 2).to(heads.dtype).view(shape) for table in (cos_NR, sin_NR))
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


def _plain_both(table: tuple[Tensor, Tensor]) -> Callable[..., Any]:
    return lambda query, key: (_plain(query, *table), _plain(key, *table))


def _ours(table: tuple[Tensor, Tensor], implementation: str) -> Callable[..., Any]:
    return lambda query, key: rope(query, key, *table, implementation=implementation)


def _table(num_tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    return rotary_table(500000.0 ** -(torch.arange(pairs) / pairs), torch.arange(num_tokens) * 37)


def _heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@DTYPES
@IMPLEMENTATIONS
@pytest.mark.parametrize("sizes", [(7, 4, 2, 16), (5, 5, 1, 6), (1, 1, 1, 2), (0, 2, 1, 4), (3, 40, 8, 128)], ids=str)
@pytest.mark.usefixtures("allocations")
def test_values_and_gradients(sizes: tuple[int, ...], dtype: torch.dtype, implementation: str) -> None:
    num_tokens, num_heads, num_groups, head_size = sizes
    query, key, *grads = (_heads(num_tokens, heads, head_size, dtype=dtype) for heads in (num_heads, num_groups) * 2)
    guards = [guarded(table) for table in _table(num_tokens, head_size // 2)]
    table = guards[0].value, guards[1].value
    assert_accurate_and_confined(_ours(table, implementation), _plain_both(table), (query, key), tuple(grads))
    for guard in guards:
        guard.check("the table")


@IMPLEMENTATIONS
@pytest.mark.usefixtures("allocations")
def test_views_of_a_packed_projection(implementation: str) -> None:
    """[N, G, H / G queries, a key and a value, K], as megatron-core's projection gives it, and other strides."""
    packed, table = _heads(6, 2, 3 + 2, 8, dtype=torch.bfloat16), _table(6, 4)
    grads = _heads(6, 2, 3, 8, dtype=torch.bfloat16), _heads(6, 2, 8, dtype=torch.bfloat16)
    ours, plain = _ours(table, implementation), _plain_both(table)
    assert_accurate_and_confined(ours, plain, (packed[:, :, :3], packed[:, :, 3]), grads)
    turned = _heads(5, 6, 16, dtype=torch.bfloat16).transpose(0, 1)
    grads = _heads(8, 3, 6, dtype=torch.bfloat16).transpose(0, 2), _heads(6, 2, 8, dtype=torch.bfloat16)
    assert_accurate_and_confined(ours, plain, (turned[:, :3, :8], turned[:, 3:, 1::2]), grads)


@IMPLEMENTATIONS
@DTYPES
def test_in_place_gives_the_same_and_lies_in_the_same_place(dtype: torch.dtype, implementation: str) -> None:
    packed, table = _heads(6, 2, 5, 8, dtype=dtype), _table(6, 4)
    for last in (slice(None), slice(1, None, 3)):
        pairs = len(range(8)[last]) // 2
        query, key = (guarded(x[..., last][..., : 2 * pairs]) for x in (packed[:, :, :3], packed[:, :, 3]))
        cos, sin = (x[:, :pairs] for x in table)
        expected = rope(query.value, key.value, cos, sin, implementation=implementation)
        result = rope(query.value, key.value, cos, sin, in_place=True, implementation=implementation)
        assert result[0].data_ptr() == query.value.data_ptr() and result[1].data_ptr() == key.value.data_ptr()
        for guard, got, wanted in zip((query, key), result, expected, strict=True):
            guard.check()
            assert torch.equal(got, wanted) and torch.equal(guard.value, wanted)


@IMPLEMENTATIONS
def test_gradients_in_place(implementation: str) -> None:
    inputs, table = (_heads(6, 4, 8), _heads(6, 2, 8)), _table(6, 4)
    grads = _heads(6, 4, 8), _heads(6, 2, 8)

    def in_place(query: Tensor, key: Tensor) -> Any:
        return rope(query + 0.0, key + 0.0, *table, in_place=True, implementation=implementation)

    for got, wanted in zip(run(in_place, inputs, grads), run(_ours(table, implementation), inputs, grads), strict=True):
        assert torch.equal(got, wanted)


def test_the_torch_implementation_has_the_bits_of_llamas_formula() -> None:
    query, key = _heads(50, 4, 16, dtype=torch.bfloat16), _heads(50, 2, 16, dtype=torch.bfloat16)
    grads, table = (query.flip(0), key.flip(0)), _table(50, 8)
    ours, plain = (run(f, (query, key), grads) for f in (_ours(table, "torch"), _plain_both(table)))
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@IMPLEMENTATIONS
def test_the_gradient_of_one_result_alone(implementation: str) -> None:
    leaves = _heads(3, 2, 4).requires_grad_(), _heads(3, 1, 4).requires_grad_()
    rope(*leaves, *_table(3, 2), implementation=implementation)[1].sum().backward()
    assert leaves[0].grad is None or not leaves[0].grad.any()
    assert leaves[1].grad is not None and leaves[1].grad.any()
    frozen = _heads(3, 2, 4), _heads(3, 1, 4).requires_grad_()
    query, key = rope(*frozen, *_table(3, 2), implementation=implementation)
    (query.sum() + key.sum()).backward()
    assert frozen[0].grad is None and torch.equal(frozen[1].grad, leaves[1].grad)


def test_gradients_against_finite_differences() -> None:
    table = tuple(x.double() for x in _table(3, 2))
    inputs = _heads(3, 2, 4).double().requires_grad_(), _heads(3, 1, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, *table), inputs)


@IMPLEMENTATIONS
def test_scores_depend_on_distance_alone(implementation: str) -> None:
    query, key = (_heads(1, 1, 16).expand(40, 1, 16) for _ in range(2))
    query, key = rope(
        query, key, *rotary_table(10000.0 ** -(torch.arange(8) / 8), torch.arange(40)), implementation=implementation
    )
    scores = query.squeeze(1) @ key.squeeze(1).T
    assert torch.allclose(scores[:-3, :-3], scores[3:, 3:], atol=1e-4)


def test_many_blocks_of_heads() -> None:
    from megatron_cpt.kernels.rope import triton_kernels

    inputs, table = (_heads(4, 7, 12), _heads(4, 3, 12)), _table(4, 6)
    whole = run(_ours(table, "triton"), inputs, inputs)
    with triton_kernels.ROTATION.using(Launch(1, blocks={"BLOCK_H": 2, "BLOCK_R": 8})):
        small = run(_ours(table, "triton"), inputs, inputs)
    assert all(torch.equal(one, other) for one, other in zip(small, whole, strict=True))


def test_heads_further_apart_than_int32_counts() -> None:
    step = 2**30 + 8  # the third head begins beyond 2^31 elements; what lies between the heads is never touched
    query = torch.empty(2 * step + 8, dtype=torch.bfloat16).as_strided((1, 3, 8), (8, step, 1))
    query.copy_(_heads(1, 3, 8))
    key, table = _heads(1, 1, 8, dtype=torch.bfloat16), _table(1, 4)
    far, near = (rope(x, key, *table, implementation="triton")[0] for x in (query, query.contiguous()))
    assert torch.equal(far, near)


def test_positions_begin_anew_with_each_document() -> None:
    assert document_positions(torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)).tolist() == [0, 1, 2, 0, 0, 1]
    assert document_positions(torch.tensor([0])).tolist() == []
    with pytest.raises(ValueError, match=r"got cu_seqlens \(0,\)"):
        document_positions(torch.tensor([]))
    query, key = _heads(6, 2, 4), _heads(6, 1, 4)
    frequencies = torch.tensor([1.0, 0.01])
    packed = rope(query, key, *rotary_table(frequencies, document_positions(torch.tensor([0, 4, 6]))))
    alone = rope(query[4:], key[4:], *rotary_table(frequencies, torch.arange(2)))
    assert torch.equal(packed[0][4:], alone[0]) and torch.equal(packed[1][4:], alone[1])


def test_what_does_not_belong_together_is_named() -> None:
    query, key, table = torch.zeros(4, 2, 8), torch.zeros(4, 1, 8), torch.zeros(4, 4)
    for wrong in (
        (query[0], key, table, table),
        (query, key[..., :6], table, table),
        (query, key, table[:3], table[:3]),
        (query, key, table, table[:, :3]),
        (query[..., :7], key[..., :7], table[:, :3], table[:, :3]),
    ):
        with pytest.raises(ValueError, match="rope: got query, key, cos, sin"):
            rope(*wrong)
    with pytest.raises(ValueError, match="expected one floating dtype"):
        rope(query, key.double(), table, table)
