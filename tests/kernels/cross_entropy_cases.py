"""Inputs of linear + cross-entropy, and how an implementation is held to the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy import library, linear_cross_entropy
from tests.kernels.guarded import assert_within_reference_error, guarded

IGNORED = -100
NUM_TOKENS = 37
HIDDEN = 24
WHOLE = 1 << 30
EVERYTHING: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 4.0, "trainable_rows": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.05},
    "softcap": {"softcap": 2.5},
    "trainable_rows": {"trainable_rows": 100},
    "everything": EVERYTHING,
}
NAMES = ("loss", "nats", "log-sum-exp", "hidden", "weight")


def random_labels(vocab_size: int) -> Tensor:
    """Returns labels of NUM_TOKENS tokens: the first and the last row are among them, and four are ignored."""
    labels = torch.randint(0, vocab_size, (NUM_TOKENS,))
    labels[:2], labels[2:4], labels[4:8] = 0, vocab_size - 1, IGNORED
    return labels


@contextmanager
def uncounted() -> Iterator[None]:
    """Has no call know how many tokens are scored, as on a device that is not waited for: all are computed."""
    run = library.run

    def forget(*inputs: Any) -> Any:
        return run(*inputs[:-1], -1)

    with mock.patch.object(library, "run", forget):
        yield


class Case:
    """N tokens and a table of V rows padded to a multiple of 8, whose padding is NaN.

    The first and the last row are labels, some tokens are ignored.
    """

    def __init__(self, num_tokens: int, vocab_size: int, dtype: torch.dtype, *, hidden_size: int = 24) -> None:
        self.num_tokens, self.vocab_size = num_tokens, vocab_size
        self.padded = -(-vocab_size // 8) * 8
        self.hidden = torch.randn(num_tokens, hidden_size, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(self.padded, hidden_size, dtype=torch.float64).to(dtype)
        self.weight[vocab_size:] = torch.nan
        self.labels = torch.randint(0, vocab_size, (num_tokens,))
        self.labels[:2], self.labels[2:4], self.labels[4:7] = 0, vocab_size - 1, IGNORED
        self.token_weights = torch.rand(num_tokens) + 0.5
        self.grad = torch.randn(num_tokens)

    def run(self, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
        """Returns loss, nats, log-sum-exp and both gradients, on guarded copies of the inputs."""
        dtype = dtype or self.hidden.dtype
        weight = self.weight if options.get("implementation") != "reference" else self.weight.nan_to_num()
        guards = [guarded(x.to(dtype)) for x in (self.hidden, weight)]
        hidden, weight = (guard.value.requires_grad_() for guard in guards)
        grad = self.grad if options.get("reduction", "none") == "none" else torch.tensor(0.7)
        result = linear_cross_entropy(hidden, weight, self.labels, vocab_size=self.vocab_size, **options)
        grads = torch.autograd.grad(result.loss, (hidden, weight), grad.to(result.loss.dtype))
        for guard, what in zip(guards, ("hidden", "weight"), strict=True):
            guard.check(what)
        return [result.loss.detach(), result.nats_N, result.log_sum_exp_N, *grads]

    def plain_hidden_gradient(self, rows: int, **options: Any) -> Tensor:
        """Returns plain torch's gradient of the hidden states where `rows` tokens at a time meet the table.

        A product of one row is another routine of the BLAS than one of many, with another error.
        """
        reduction, weights = options.pop("reduction", "none"), options.pop("token_weights_N", None)
        each = torch.ones(self.num_tokens) if weights is None else weights
        total = each[self.labels != IGNORED].sum() if reduction == "mean" else 1
        grad = self.grad if reduction == "none" else torch.full_like(self.grad, 0.7) / total
        weight = self.weight.nan_to_num()
        pieces = []
        for hidden, *given in zip(*(x.split(rows) for x in (self.hidden, self.labels, each, grad)), strict=True):
            hidden = hidden.clone().requires_grad_()
            loss = linear_cross_entropy(
                *(hidden, weight, given[0]), vocab_size=self.vocab_size, token_weights_N=given[1], **options
            ).loss
            pieces += torch.autograd.grad(loss, hidden, given[2].to(loss.dtype))
        return torch.cat(pieces)

    def check(self, implementation: str, budget_rows: int | None = None, **options: Any) -> list[Tensor]:
        """Asserts the 2x rule, zeros where they belong, and the same bits of a second run."""
        budget = WHOLE if budget_rows is None else budget_rows * 64 * (self.padded // 64 + 1) * 4
        ours = {**options, "implementation": implementation, "budget_bytes": budget}
        got, again = self.run(**ours), self.run(**ours)
        assert [torch.equal(one, other) for one, other in zip(got, again, strict=True)] == [True] * 5
        plain_options = {**options, "implementation": "reference"}
        plain_options.pop("logits_dtype", None)
        plain, exact = self.run(**plain_options), self.run(torch.float64, **plain_options)
        if budget_rows is not None:
            plain[3] = self.plain_hidden_gradient(budget_rows, **plain_options)
        assert [x.dtype for x in got] == [x.dtype for x in plain]
        ignored = self.labels == IGNORED
        assert not got[1][ignored].any() and not got[2][ignored].any() and not got[3][ignored].any()
        assert not got[4][self.vocab_size :].any() and not got[4][: options.get("trainable_rows", 0)].any()
        for what, *values in zip(NAMES, got, plain, exact, strict=True):
            assert_within_reference_error(*values, what)
        return got
