from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_cpt.kernels.cross_entropy import linear_cross_entropy
from tests.kernels.cross_entropy_cases import EVERYTHING, IGNORED, OPTIONS, Case, uncounted
from tests.kernels.guarded import Guard

# What lies in the padding of a row is computed too and dropped.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.usefixtures("budget_alone"),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Budgets in rows: the whole; four chunks, summed where the gradient is; one row, and the sum in fp32.
BUDGETS = pytest.mark.parametrize("budget_rows", [None, 9, 1], ids=["whole", "chunks", "rows"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
OF_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_is_torchs_own_loss(reduction: str, smoothing: float) -> None:
    case = Case(19, 50, torch.float64)
    weight = case.weight.nan_to_num()
    found = linear_cross_entropy(
        *(case.hidden, weight, case.labels),
        vocab_size=50,
        label_smoothing=smoothing,
        reduction=reduction,  # type: ignore[arg-type]
        implementation="reference",
    )
    logits = case.hidden @ weight[:50].T
    expected = cross_entropy(logits, case.labels, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.nats_N, cross_entropy(logits, case.labels, reduction="none"))


def test_z_loss_softcap_and_weights_are_what_they_say() -> None:
    case = Case(19, 50, torch.float64)
    for implementation in ("reference", "torch"):
        found = linear_cross_entropy(
            *(case.hidden, case.weight, case.labels),
            vocab_size=50,
            **{"z_loss": 0.1, "softcap": 3.0, "token_weights_N": case.token_weights, "implementation": implementation},
        )
        logits = 3.0 * torch.tanh(case.hidden @ case.weight[:50].T / 3.0)
        lse = logits.exp().sum(-1).log()
        expected = case.token_weights * (cross_entropy(logits, case.labels, reduction="none") + 0.1 * lse**2)
        torch.testing.assert_close(found.loss, expected.masked_fill(case.labels == IGNORED, 0.0))
        expected_correct = (logits.argmax(-1) == case.labels) & (case.labels != IGNORED)
        assert torch.equal(found.correct_N, expected_correct)


@BUDGETS
@REDUCTIONS
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.usefixtures("triton")
def test_everything_without_the_number_of_scored_tokens(
    implementation: str, reduction: str, budget_rows: int | None
) -> None:
    case = Case(11, 70, torch.float32)
    with uncounted():
        case.check(implementation, budget_rows, reduction=reduction, token_weights_N=case.token_weights, **EVERYTHING)


@OF_DTYPE
@BUDGETS
@REDUCTIONS
def test_torch_with_everything(reduction: str, budget_rows: int | None, dtype: torch.dtype) -> None:
    case = Case(37, 250, dtype)
    case.check("torch", budget_rows, reduction=reduction, token_weights_N=case.token_weights, **EVERYTHING)


@pytest.mark.parametrize(("reduction", "budget_rows"), [("none", None), ("mean", 5)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_torch_one_option_at_a_time(options: dict[str, Any], reduction: str, budget_rows: int | None) -> None:
    Case(37, 250, torch.float32).check("torch", budget_rows, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("budget_rows", [None, 5], ids=["whole", "chunks"])
@REDUCTIONS
@pytest.mark.usefixtures("triton")
def test_triton_with_everything(reduction: str, budget_rows: int | None, dtype: torch.dtype) -> None:
    case = Case(11, 250, dtype)
    case.check("triton", budget_rows, reduction=reduction, token_weights_N=case.token_weights, **EVERYTHING)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.usefixtures("triton")
def test_triton_one_option_at_a_time(options: dict[str, Any], allocations: list[Guard]) -> None:
    Case(11, 250, torch.float32).check("triton", **options)
    assert allocations


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("logits", ["fp32", "fp16"])
@pytest.mark.parametrize("budget_rows", [None, 5], ids=["whole", "chunks"])
@pytest.mark.usefixtures("triton")
def test_logits_are_kept_in_another_dtype(implementation: str, logits: str, budget_rows: int | None) -> None:
    """Wider logits are nearer to the truth than those of the inputs' dtype, and the gradients stay in that one."""
    case = Case(24, 250, torch.bfloat16)
    options = {"reduction": "mean", "label_smoothing": 0.1}
    wide = case.check(implementation, budget_rows, logits_dtype=DTYPES[logits], **options)
    narrow = case.check(implementation, budget_rows, **options)
    exact = case.run(torch.float64, implementation="reference", **options)
    for position in (1, 2):
        error, narrow_error = ((x[position].double() - exact[position]).norm() for x in (wide, narrow))
        assert error < 0.3 * narrow_error


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.usefixtures("triton")
def test_the_mean_is_of_the_weights_of_the_scored_tokens(implementation: str) -> None:
    case = Case(11, 40, torch.float32)
    options = {"vocab_size": 40, "implementation": implementation}
    scored = case.labels != IGNORED
    for weights in (None, case.token_weights):
        each, mean = (
            linear_cross_entropy(
                *(case.hidden, case.weight, case.labels),
                token_weights_N=weights,
                reduction=reduction,  # type: ignore[arg-type]
                **options,
            ).loss
            for reduction in ("none", "mean")
        )
        total = scored.sum() if weights is None else weights[scored].sum()
        torch.testing.assert_close(mean, each.sum() / total)
