"""The row kernels by themselves, in Triton's interpreter: sizes, blocks, and memory around and behind the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy import torch_rows
from megatron_cpt.kernels.cross_entropy.plan import TRITON_STRIDE
from megatron_cpt.kernels.tuning import Launch
from tests.kernels.guarded import assert_within_reference_error, guarded

pytestmark = [
    pytest.mark.usefixtures("triton"),
    # What lies in the padding of a row is computed too and dropped.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
SIZES = (1, 7, 250, 5397, 16032, 43176, 43177, 65537, 128256, 176000)
NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _padded(logits_TM: Tensor) -> Tensor:
    """The same rows at a distance the kernels take, with NaN between them."""
    stride = -(-logits_TM.shape[1] // TRITON_STRIDE) * TRITON_STRIDE
    buffer = logits_TM.new_full((logits_TM.shape[0], stride), torch.nan)
    buffer[:, : logits_TM.shape[1]] = logits_TM
    return buffer


def _columns(num_columns: int) -> Tensor:
    """Labels on both edges, elsewhere, and beside the shard on either side."""
    return torch.tensor([0, num_columns - 1, num_columns // 2, -1, num_columns, 1 << 40])


def _statistics(module: Any, logits: Tensor, columns: Tensor, softcap: float, count: int = 4) -> Tensor:
    out = guarded(logits.new_zeros(count, len(logits), dtype=torch.promote_types(logits.dtype, torch.float32)))
    module.statistics(logits, columns, out.value, softcap)
    out.check("statistics")
    return out.value.clone()


def _gradient(module: Any, logits: Tensor, out: Tensor, columns: Tensor, softcap: float) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    lse = torch.linspace(3.0, 9.0, len(logits), dtype=wide)
    grad = torch.linspace(-1.0, 2.0, len(logits), dtype=wide)
    options = {"vocab_size": 1000, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": softcap}
    module.gradient(logits, out, columns, lse, grad, **options)
    return out


@pytest.mark.parametrize("num_columns", SIZES)
def test_every_size_of_a_shard(num_columns: int) -> None:
    from megatron_cpt.kernels.cross_entropy import triton_rows

    columns = _columns(num_columns)[: 6 if num_columns < 20000 else 2]
    logits = torch.randn(len(columns), num_columns) * 3
    buffer = guarded(_padded(logits))
    rows = buffer.value[:, :num_columns]
    got = _statistics(triton_rows, rows, columns, 0.0)
    plain = _statistics(torch_rows, logits, columns, 0.0)
    exact = _statistics(torch_rows, logits.double(), columns, 0.0)
    assert torch.equal(rows, logits)
    for what, *values in zip(("greatest", "sum", "label", "sum of logits"), got, plain, exact, strict=True):
        assert_within_reference_error(*values, what)
    plain = _gradient(torch_rows, logits, torch.empty_like(logits), columns, 0.0)
    exact = _gradient(torch_rows, logits.double(), torch.empty_like(logits).double(), columns, 0.0)
    assert_within_reference_error(_gradient(triton_rows, rows, rows, columns, 0.0), plain, exact)
    buffer.check("logits")


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(
    ("logits_dtype", "dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", "bfloat16")],
)
def test_a_gradient_takes_the_place_of_its_logits(logits_dtype: str, dtype: str, softcap: float) -> None:
    """In rows of several blocks; a narrower gradient fills the front half of its row."""
    from megatron_cpt.kernels.cross_entropy import triton_kernels, triton_rows

    logits = (torch.randn(6, 300, dtype=torch.float64) * 3).to(NAMES[logits_dtype])
    logits[:, :20] = torch.linspace(-1e-3, 1e-3, 20)  # where the soft-cap is the identity
    columns = _columns(300)
    found = []
    for block in (64, 512):
        with (
            triton_kernels.STATISTICS.using(Launch(1, blocks={"BLOCK": block})),
            triton_kernels.GRADIENT.using(Launch(1, blocks={"BLOCK": block})),
        ):
            buffer = guarded(_padded(logits))
            rows = buffer.value[:, :300]
            got = _statistics(triton_rows, rows, columns, softcap)
            out = buffer.value.view(NAMES[dtype])[:, :300]
            found.append(_gradient(triton_rows, rows, out, columns, softcap).clone())
            buffer.check("logits")
        plain, exact = (_statistics(torch_rows, x, columns, softcap) for x in (logits, logits.double()))
        for one, other, truth in zip(got, plain, exact, strict=True):
            assert_within_reference_error(one, other, truth)
    assert torch.equal(*found)
    plain = _gradient(torch_rows, logits, torch.empty_like(logits, dtype=NAMES[dtype]), columns, softcap)
    exact = _gradient(torch_rows, logits.double(), torch.empty_like(logits, dtype=torch.float64), columns, softcap)
    assert_within_reference_error(found[0], plain, exact)


def test_the_torch_twin_works_in_place_too() -> None:
    logits, columns = torch.randn(6, 300), _columns(300)
    apart = _gradient(torch_rows, logits, torch.empty(6, 300).bfloat16(), columns, 4.0)
    packed = _gradient(torch_rows, logits, logits.view(torch.bfloat16)[:, :300], columns, 4.0)
    assert torch.equal(apart, packed)


def test_huge_and_missing_logits() -> None:
    from megatron_cpt.kernels.cross_entropy import triton_rows

    logits = torch.randn(6, 100)
    logits[0], logits[1, 50:], logits[2, 3] = logits[0] * 1e4, -torch.inf, 1e4
    logits[3] -= 1e4
    rows = _padded(logits)[:, :100]
    columns = torch.tensor([0, 1, 3, 4, 5, 6])
    got, twin = _statistics(triton_rows, rows, columns, 0.0, 3), _statistics(torch_rows, logits, columns, 0.0, 3)
    torch.testing.assert_close(got, twin, rtol=1e-6, atol=0.0)


def test_a_logit_that_is_no_number_is_not_lost() -> None:
    from megatron_cpt.kernels.cross_entropy import triton_rows

    logits = torch.randn(2, 100)
    logits[1, 30] = torch.nan
    for module, rows in ((triton_rows, _padded(logits)[:, :100]), (torch_rows, logits)):
        greatest, total, _ = _statistics(module, rows, torch.tensor([1, 1]), 0.0, 3)
        assert (total.log() + greatest).isnan().tolist() == [False, True]
