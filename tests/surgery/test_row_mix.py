"""Rows mixed against the dense product in float64; copies compared bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.errors import CheckpointError, InputError
from megatron_cpt.surgery import RowMix


def random_mix(num_new: int, num_old: int, seed: int, longest: int = 40) -> RowMix:
    """Copies and mixtures of 1 to `longest` old rows in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for new_row in range(num_new):
        count = 1 if new_row % 3 == 0 else int(torch.randint(1, longest + 1, (1,), generator=generator))
        sources = torch.randint(0, num_old, (count,), generator=generator).tolist()
        rows.append((sources, [1.0] if new_row % 3 == 0 else (torch.rand(count, generator=generator) / count).tolist()))
    return RowMix.from_rows(rows, num_old)


def dense(mix: RowMix) -> torch.Tensor:
    """M as a float64 matrix."""
    matrix_WV = torch.zeros(mix.num_new_rows, mix.num_old_rows, dtype=torch.float64)
    for new_row in range(mix.num_new_rows):
        for source, weight in zip(*mix.row(new_row), strict=True):
            matrix_WV[new_row, source] += weight
    return matrix_WV


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 33])
def test_against_the_dense_product(dtype: torch.dtype, width: int) -> None:
    mix = random_mix(211, 57, seed=width)
    old_VD = torch.randn(57, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    matrix_WV = dense(mix)
    truth_WD = matrix_WV @ old_VD.double()
    plain_WD = matrix_WV.float() @ old_VD.float()
    made_WD = mix.apply(old_VD)
    assert made_WD.dtype == dtype and made_WD.shape == (211, width)
    allowed_WD = 2 * (plain_WD.double() - truth_WD).abs().max() + 1e-9
    if dtype != torch.float32:  # one rounding of the fp32 sum, element by element
        allowed_WD = allowed_WD + torch.finfo(dtype).eps / 2 * truth_WD.abs()
    assert ((made_WD.double() - truth_WD).abs() <= allowed_WD).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_keep_every_bit(dtype: torch.dtype) -> None:
    """Also of numbers that arithmetic would change: -0, subnormals, infinities and NaN with a payload."""
    odd = torch.tensor([-0.0, 0.0, 1e-40, float("inf"), float("-inf"), 3e38, float("nan"), 1 / 3])
    old_VD = odd.to(dtype).repeat(4, 1)
    bits(old_VD)[:, 6] += torch.arange(1, 5, dtype=bits(old_VD).dtype)
    mix = RowMix.from_rows([([3], [1.0]), ([0, 1], [0.5, 0.5]), ([2], [1.0]), ([2], [1.0])], 4)
    made_WD = mix.apply(old_VD)
    assert torch.equal(bits(made_WD[[0, 2, 3]]), bits(old_VD[[3, 2, 2]]))
    assert mix.copied().tolist() == [True, False, True, True]
    assert RowMix.from_rows([([1], [0.5])], 4).copied().tolist() == [False]


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 100), length=st.integers(0, 100), seed=st.integers(0, 5))
def test_a_slice_is_a_slice(start: int, length: int, seed: int) -> None:
    mix = random_mix(97, 31, seed)
    old_VD = torch.randn(31, 9, generator=torch.Generator().manual_seed(seed)).bfloat16()
    whole_WD = mix.apply(old_VD)
    rows = slice(start, start + length)
    assert torch.equal(mix.apply(old_VD, rows), whole_WD[rows])
    parts = [mix.apply(old_VD, slice(at, at + 1 + length)) for at in range(0, 97, 1 + length)]
    assert torch.equal(torch.cat(parts), whole_WD)


def test_a_row_of_nothing_is_zero() -> None:
    mix = RowMix.from_rows([([1], [1.0]), ([], []), ([0, 1], [0.5, 0.5]), ([], [])], 2)
    old_VD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert mix.apply(old_VD).tolist() == [[3.0, 4.0], [0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]
    assert mix.copied().tolist() == [True, False, False, False]
    kept = mix.only(torch.tensor([True, True, False, True]))
    assert kept.apply(old_VD).tolist() == [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    nothing = RowMix.from_rows([([], [])], 2)
    assert nothing.apply(old_VD).tolist() == [[0.0, 0.0]]


def test_padding_is_never_used() -> None:
    mix = random_mix(50, 20, seed=4)
    old_VD = torch.randn(20, 8)
    padded_PD = torch.cat([old_VD, torch.full((12, 8), float("nan"))])
    assert torch.equal(mix.apply(padded_PD), mix.apply(old_VD))
    with pytest.raises(CheckpointError, match="at least 20 rows"):
        mix.apply(old_VD[:19])


@pytest.mark.parametrize(
    ("rows", "num_old"),
    [
        ([], 4),
        ([([4], [1.0])], 4),
        ([([-1], [1.0])], 4),
        ([([0], [float("nan")])], 4),
        ([([0, 1], [1.0])], 4),
    ],
)
def test_mixes_without_meaning(rows: list[tuple[list[int], list[float]]], num_old: int) -> None:
    with pytest.raises(InputError, match="row mix"):
        RowMix.from_rows(rows, num_old)
