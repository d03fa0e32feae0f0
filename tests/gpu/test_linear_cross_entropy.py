"""Output projection + cross-entropy, with ragged and with real vocabularies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.kernels import linear_cross_entropy
from megatron_cpt.kernels.cross_entropy import plan
from tests.kernels.comparing import assert_accurate_and_confined
from tests.kernels.guarded import assert_within_reference_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IGNORED = -100
GIB = 1 << 30
_BLOCK = 512  # tokens of a block in float64


def _labels(num_tokens: int, vocab_size: int, device: str) -> Tensor:
    """Random ones, the first and the last of the vocabulary, and some that are ignored."""
    labels_N = torch.randint(0, vocab_size, (num_tokens,), device=device)
    labels_N[0], labels_N[1], labels_N[2:5] = 0, vocab_size - 1, IGNORED
    return labels_N


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "options"),
    [
        (43177, BF16, {}),
        (1, BF16, {}),
        (7, BF16, {}),
        (250, BF16, {}),
        (5397, FP32, {}),
        (5397, FP16, {}),
        (5397, BF16, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 15.0}),
        (16032, BF16, {"logits_dtype": FP32}),
        (16032, BF16, {"trainable_rows": 16000}),
        (65537, BF16, {"z_loss": 1e-4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.usefixtures("allocations")
def test_values_and_gradients(
    vocab_size: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    reduction: str,
    device: str,
    normal: Any,
    sized: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_tokens, hidden_size = sized((1537, 512), (6, 8))
    vocab_size = sized(vocab_size, min(vocab_size, 70))
    options = {**options, "trainable_rows": min(options.get("trainable_rows", 0), vocab_size - 1)}
    hidden = normal(num_tokens, hidden_size, dtype=dtype)
    weight = normal(vocab_size, hidden_size, dtype=dtype, scale=0.2)
    labels_N, weights_N = _labels(num_tokens, vocab_size, device), torch.rand(num_tokens, device=device) + 0.5

    def function(implementation: str, **others: Any) -> Any:
        def call(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden,
                weight,
                labels_N,
                vocab_size=vocab_size,
                token_weights_N=weights_N,
                reduction=reduction,
                implementation=implementation,
                **{**options, **others},
            ).loss

        return call

    grad = torch.randn(num_tokens if reduction == "none" else (), device=device)
    plain = function("reference", logits_dtype=None)
    # Once with all logits at once, once in several chunks.
    monkeypatch.setattr(plan, "allowance", lambda call, *_: call.budget_bytes)
    for budget in (GIB, sized(1024 * vocab_size * 2, 2 * vocab_size * 2)):
        ours = function("triton", budget_bytes=budget)
        assert_accurate_and_confined(ours, plain, (hidden, weight), (grad,))


@torch.no_grad()
def _exact(hidden: Tensor, weight: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean loss and gradients in float64, block by block of tokens."""
    wide, scored = weight.double(), (labels_N != IGNORED).sum()
    grad_weight, grads, losses = torch.zeros_like(wide), [], []
    for tokens, labels in zip(hidden.split(_BLOCK), labels_N.split(_BLOCK), strict=True):
        rows, counted = torch.arange(len(labels), device=wide.device), labels != IGNORED
        logits = tokens.double() @ wide.T
        lse = logits.logsumexp(-1)
        losses.append(torch.where(counted, lse - logits[rows, labels.clamp(min=0)], 0.0))
        grad = logits.sub_(lse[:, None]).exp_()
        grad[rows, labels.clamp(min=0)] -= 1.0
        grad *= (counted.double() / scored)[:, None]
        grads.append(grad @ wide)
        grad_weight.addmm_(grad.T, tokens.double())
    return torch.cat(losses).sum() / scored, torch.cat(grads), grad_weight


@pytest.mark.parametrize(
    ("vocab_size", "gibibytes"), [(43177, 1), (128256, 1), (176000, 1), (128256, 0.25), (176000, 4)], ids=str
)
def test_real_sizes(
    vocab_size: int,
    gibibytes: float,
    device: str,
    normal: Any,
    sized: Any,
    peak_bytes: Any,
) -> None:
    """8192 tokens of 4096: the rule, the same bits twice, and memory: never more than the budget and gradients."""
    num_tokens, hidden_size, budget = sized((8192, 4096, int(gibibytes * GIB)), (6, 16, int(gibibytes * 400)))
    vocab_size = sized(vocab_size, 77)
    hidden = normal(num_tokens, hidden_size).requires_grad_()
    weight = normal(vocab_size, hidden_size, scale=3 / hidden_size**0.5).requires_grad_()
    labels_N = _labels(num_tokens, vocab_size, device)

    def run(**options: Any) -> list[Tensor]:
        options = {"vocab_size": vocab_size, "reduction": "mean", "budget_bytes": budget, **options}
        loss = linear_cross_entropy(hidden, weight, labels_N, implementation="triton", **options).loss
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    got = run()
    assert all(torch.equal(one, other) for one, other in zip(got, run(), strict=True))
    peak = peak_bytes(run)
    gradients = 2 * (hidden.numel() + weight.numel())
    # Under a quarter of a GiB an fp32 sum would be needed, and all logits are no larger than that.
    total = 4 * weight.numel() if gibibytes < 1 else 0
    assert peak is None or peak <= budget + total + gradients + (64 << 20)
    exact = _exact(hidden, weight, labels_N)
    plain_loss = F.cross_entropy(F.linear(hidden, weight).float(), labels_N)
    plain = [plain_loss.detach(), *torch.autograd.grad(plain_loss, (hidden, weight))]
    for name, *values in zip(("loss", "hidden", "weight"), got, plain, exact, strict=True):
        assert_within_reference_error(*values, name)
    rows = labels_N[labels_N != IGNORED].unique()  # a norm of the whole would hide a lost row
    assert_within_reference_error(*(x[2][rows] for x in (got, plain, exact)), "rows of labels")


def test_main_grad_is_added_to(device: str, normal: Any, sized: Any, peak_bytes: Any) -> None:
    """The weight's gradient goes into an fp32 tensor that is there: memory is the logits and the tokens' gradient."""
    num_tokens, hidden_size, vocab_size, budget = sized((8192, 4096, 43177, GIB), (6, 16, 77, 200))
    hidden = normal(num_tokens, hidden_size).requires_grad_()
    weight = normal(vocab_size, hidden_size, scale=3 / hidden_size**0.5).requires_grad_()
    labels_N, main_grad = (
        _labels(num_tokens, vocab_size, device),
        torch.full((vocab_size, hidden_size), 0.25, device=device),
    )

    def run(**options: Any) -> tuple[Tensor, ...]:
        options = {"vocab_size": vocab_size, "reduction": "sum", "budget_bytes": budget, **options}
        loss = linear_cross_entropy(hidden, weight, labels_N, implementation="triton", **options).loss
        wanted = (hidden,) if "main_grad" in options else (hidden, weight)
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    apart = run()
    peak = peak_bytes(lambda: run(main_grad=main_grad))
    assert peak is None or peak <= budget + 2 * hidden.numel() + (64 << 20)
    # The other one is rounded to the weight's dtype at its end.
    torch.testing.assert_close((main_grad - 0.25).to(weight.dtype), apart[1], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_extreme_logits(scale: float, device: str, normal: Any, sized: Any) -> None:
    """Logits up to about +-1e4: nothing overflows."""
    num_tokens, hidden_size, vocab_size = sized((512, 1024, 43177), (6, 16, 77))
    hidden, weight = normal(num_tokens, hidden_size, scale=scale).requires_grad_(), normal(vocab_size, hidden_size)
    labels_N = _labels(num_tokens, vocab_size, device)
    result = linear_cross_entropy(hidden, weight, labels_N, vocab_size=vocab_size, implementation="triton")
    exact = (hidden.double() @ weight.double().T).logsumexp(-1)
    error = torch.where(labels_N == IGNORED, 0.0, result.log_sum_exp_N.double() / exact - 1).abs().max()
    assert error < 2**-7
    assert torch.autograd.grad(result.loss.sum(), hidden)[0].isfinite().all()


def test_ignored_tokens_cost_nothing_and_change_nothing(device: str, normal: Any, sized: Any) -> None:
    num_tokens, hidden_size, vocab_size = sized((4096, 512, 43177), (9, 16, 77))
    hidden, weight = normal(num_tokens, hidden_size), normal(vocab_size, hidden_size, scale=0.2)
    labels_N = torch.where(
        torch.arange(num_tokens, device=device) % 3 == 0, _labels(num_tokens, vocab_size, device), IGNORED
    )
    scored = labels_N != IGNORED

    def run(tokens: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, ...]:
        leaves = tokens.clone().requires_grad_(), weight.clone().requires_grad_()
        options |= {"vocab_size": vocab_size, "reduction": "sum", "implementation": "triton"}
        loss = linear_cross_entropy(*leaves, labels, **options).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    num_scored = int(scored.sum())
    dropped = run(hidden, labels_N, num_scored=num_scored)
    alone = run(hidden[scored], labels_N[scored], num_scored=num_scored)
    # The sum of the loss has zeros in it, and so another order; the products are the same.
    torch.testing.assert_close(dropped[0], alone[0], rtol=num_scored**0.5 * torch.finfo(FP32).eps, atol=0.0)
    assert torch.equal(dropped[2], alone[2])
    assert torch.equal(dropped[1][scored], alone[1]) and not dropped[1][~scored].any()
