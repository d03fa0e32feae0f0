"""How the op's products are cut where a wider result has to come from a GPU's product; that one is played here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy import products


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Has the products be wide, in blocks of 3,000 elements, and lists their shapes."""
    found: list[tuple[int, ...]] = []

    def write(left: Tensor, right: Tensor, out: Tensor) -> None:
        found.append(tuple(out.shape))
        torch.mm(left.float(), right.float(), out=out)

    monkeypatch.setattr(products, "_widens", lambda tensor: True)
    monkeypatch.setattr(products, "_write_wide", write)
    monkeypatch.setattr(products, "_BLOCK_ELEMENTS", 3000)
    monkeypatch.setattr(products, "_LEAST_COLUMNS", 200)
    return found


def test_a_sum_grows_by_wide_products_where_it_cannot_be_part_of_one(shapes: list[tuple[int, ...]]) -> None:
    """The probe finds that the CPU has no such product, as torch 2.8 and 2.9 have none on a GPU."""
    grad, hidden, total = torch.randn(9, 450).bfloat16(), torch.randn(9, 30).bfloat16(), torch.randn(450, 30)
    expected = total + grad.float().T @ hidden.float()
    products.add_product(total, grad, hidden)
    assert shapes == [(200, 30), (200, 30), (50, 30)]
    torch.testing.assert_close(total, expected)


def test_narrow_logits_of_wide_products_are_cut_by_columns(shapes: list[tuple[int, ...]]) -> None:
    hidden, weight = torch.randn(60, 8).bfloat16(), torch.randn(450, 8).bfloat16()
    logits = torch.empty(60, 450, dtype=torch.float16)
    products.write_logits(hidden, weight, logits)
    assert shapes == [(60, 200), (60, 200), (60, 50)]
    torch.testing.assert_close(logits, (hidden.float() @ weight.float().T).half())
