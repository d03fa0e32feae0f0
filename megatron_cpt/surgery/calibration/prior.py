"""The head's prior: new pieces begin with their frequencies where they belong, and out of the way elsewhere.

Two directions are fitted to hidden states h of a little text, by ridge regression: h . t is near 1 where the next
token is a new piece and near 0 elsewhere, h . s the other way round. A new row becomes

    row(v) <- keep * row(v) + (centre + log p(v)) * t - margin * s

with p(v) the frequency of the piece in the target language's text. So it starts with its unigram probability
among the new pieces; keep, centre and margin are the three numbers that fit the same text best.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.errors import DataError
from megatron_cpt.surgery.matrix import Adjustment, MatrixPlan

_RIDGE = 0.1  # of the mean square of a hidden state's elements
_FITTED_ELEMENTS = 1 << 22  # logits of new rows held while the three numbers are fitted
_ROUNDS = 30


def nothing(plan: MatrixPlan, width: int) -> Adjustment:
    """The adjustment that changes nothing."""
    feature_N = torch.zeros(len(plan.new_rows))
    return Adjustment(
        0.0, torch.zeros(width), feature_N, torch.zeros(width), torch.zeros(width, 0), torch.zeros(0, width)
    )


def fit_prior(
    forward: LlamaForward, plan: MatrixPlan, feature_N: Tensor, hidden_ND: Tensor, label_N: Tensor
) -> tuple[Adjustment, dict[str, Any]]:
    """Fit the prior of the new rows of a head.

    Args:
        forward: the model with the new rows as they are; its head is read, block by block.
        plan: of the head.
        feature_N: logarithm of each new piece's frequency.
        hidden_ND: hidden states of scored positions, float32.
        label_N: the id that follows each.

    Returns:
        The adjustment, and facts: the three numbers, the mean loss of the positions before and after, in nats.

    Raises:
        DataError: no label is a new piece, or all are.
    """
    is_new_N = torch.isin(label_N, plan.new_rows.to(label_N.device))
    share = float(is_new_N.double().mean()) if len(is_new_N) else 0.0
    if not 0.0 < share < 1.0:
        raise DataError(
            f"of {len(is_new_N)} tokens of text {share:.0%} are new pieces: expected some and not all; give text of "
            "both languages, tokenised with the new tokenizer"
        )
    target_D, source_D = directions(hidden_ND, is_new_N)
    chosen = _sample(is_new_N, max(64, _FITTED_ELEMENTS // len(plan.new_rows)))
    logits = _Logits(forward, plan, feature_N, hidden_ND[chosen], label_N[chosen], target_D, source_D)
    numbers, before, after = logits.fit()
    keep, centre, margin = numbers
    adjustment = replace(
        nothing(plan, hidden_ND.shape[1]),
        scale=keep - 1.0,
        offset_D=(centre * target_D - margin * source_D).float().cpu(),
        feature_N=feature_N,
        direction_D=target_D.float().cpu(),
    )
    facts = {"keep": keep, "centre": centre, "margin": margin, "new_labels": share}
    return adjustment, {**facts, "nats_before": before, "nats_after": after}


def directions(hidden_ND: Tensor, is_new_N: Tensor) -> tuple[Tensor, Tensor]:
    """(t, s), float64: least squares with a ridge, of is_new and of its opposite."""
    wide_ND = hidden_ND.double()
    gram_DD = wide_ND.T @ wide_ND / len(wide_ND)
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean())
    wanted_N2 = torch.stack([is_new_N, ~is_new_N], dim=1).double()
    target_D, source_D = torch.linalg.solve(gram_DD, wide_ND.T @ wanted_N2 / len(wide_ND)).unbind(dim=1)
    return target_D, source_D


def _sample(is_new_N: Tensor, count: int) -> Tensor:
    """Places of at most `count` positions, evenly spread over the text."""
    step = max(1, math.ceil(len(is_new_N) / count))
    return torch.arange(0, len(is_new_N), step, device=is_new_N.device)


class _Logits:
    """What the loss of some positions is as a function of the three numbers.

    The kept rows count by their log-sum-exp alone, the new ones by three logits that the numbers weigh.
    """

    def __init__(
        self,
        forward: LlamaForward,
        plan: MatrixPlan,
        feature_N: Tensor,
        hidden_ND: Tensor,
        label_N: Tensor,
        target_D: Tensor,
        source_D: Tensor,
    ) -> None:
        device = hidden_ND.device
        new_rows = plan.new_rows.to(device)
        self.kept_N = torch.full((len(label_N),), -math.inf, device=device)
        self.label_N = torch.zeros(len(label_N), device=device)
        rows = []
        for first, block_VD in forward.head_blocks():
            block_NV = hidden_ND @ block_VD.float().T
            inside = (label_N >= first) & (label_N < first + block_VD.shape[0])
            self.label_N[inside] = block_NV[inside, label_N[inside] - first]
            new = new_rows[(new_rows >= first) & (new_rows < first + block_VD.shape[0])] - first
            rows.append(block_NV[:, new])
            block_NV[:, new] = -math.inf
            self.kept_N = torch.logaddexp(self.kept_N, block_NV.logsumexp(dim=1))
        self.row_NR = torch.cat(rows, dim=1)
        self.place_N = torch.searchsorted(new_rows, label_N).clamp(max=len(new_rows) - 1)
        self.is_new_N = new_rows[self.place_N] == label_N
        self.feature_R = feature_N.to(device)
        self.target_N1 = (hidden_ND @ target_D.float())[:, None]
        self.source_N1 = (hidden_ND @ source_D.float())[:, None]

    def loss(self, keep: Tensor, centre: Tensor, margin: Tensor) -> Tensor:
        """Mean loss in nats."""
        new_NR = keep * self.row_NR + (centre + self.feature_R) * self.target_N1 - margin * self.source_N1
        total_N = torch.logaddexp(self.kept_N, new_NR.logsumexp(dim=1))
        chosen_N = new_NR.gather(1, self.place_N[:, None])[:, 0]
        return (total_N - torch.where(self.is_new_N, chosen_N, self.label_N)).mean()

    def fit(self) -> tuple[tuple[float, float, float], float, float]:
        """The three numbers of the least loss, the loss of the rows as they are, and the least."""
        total_N = torch.logaddexp(self.kept_N, self.row_NR.logsumexp(dim=1))
        before = float((total_N - self.label_N).mean())
        # From rows that are the prior alone: the smallest and the rows themselves are two starts, the better one wins.
        tries = [self._from(torch.tensor([keep, 8.0, 8.0])) for keep in (0.0, 1.0)]
        after, numbers = min(tries, key=lambda found: found[0])
        return numbers, before, after

    def _from(self, start: Tensor) -> tuple[float, tuple[float, float, float]]:
        numbers = start.to(self.kept_N.device).requires_grad_(True)
        optimizer = torch.optim.LBFGS([numbers], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(*numbers)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            keep, centre, margin = numbers.tolist()
            return float(self.loss(*numbers)), (keep, centre, margin)
