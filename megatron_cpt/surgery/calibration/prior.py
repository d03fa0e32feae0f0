"""The prior: what text says of new pieces, before anything is learnt of them.

Of each piece v it says how frequent it is, p(v), and what stands around it, the vector x(v) (pieces of like
surroundings have like vectors; their mean is 0). In the embedding of an untied model the vector is added to the row
through a random rotation P, at half the length of an old row:

    row(v) <- row(v) + x(v) @ P

In the head three things are fitted to hidden states h of a little text. Two directions by ridge regression: h . t is
near 1 where the next token is a new piece and near 0 elsewhere, h . s the other way round. And a linear-Gaussian
model of the vector that comes next, x ~ N((h - m) B, S), whose log likelihood is linear in x(v):

    row(v) <- keep * row(v) + (centre + log p(v)) * t - margin * s + share * x(v) @ (S^-1 B' - (S^-1 B' m) t')

So a new piece starts with its unigram probability among the new pieces, raised where pieces like it come next;
keep, centre, margin and share are the four numbers that fit further text best, old pieces counted sixteen times.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.errors import TooLittleText
from megatron_cpt.surgery.matrix import Adjustment, MatrixPlan
from megatron_cpt.surgery.random_rows import normal_rows

_RIDGE = 0.1  # of the mean square of a hidden state's elements
_FITTED_ELEMENTS = 1 << 22  # logits of new rows held while the four numbers are fitted,
_FITTED_POSITIONS = 512  # but of this many positions at least
_ROUNDS = 30
_LEAST_LABELS, _LEAST_FITTED = 200, 50  # labels of each kind that the directions, and that the numbers are fitted to
_RIDGE_HIDDEN, _RIDGE_LEFT = 0.3, 0.1  # of the mean variance of hidden states, and of what they leave of the vectors
_OLD_WEIGHT = 16.0  # in the fit of the numbers, of a position before an old piece: what the base can do comes first
_VECTOR_LENGTH = 0.5  # in the embedding, of the mean length of an old row


def nothing(plan: MatrixPlan, width: int) -> Adjustment:
    """The adjustment that changes nothing."""
    shapes = (width,), (len(plan.new_rows), 0), (0, width), (width, 0), (0, width)
    return Adjustment(0.0, *(torch.zeros(shape) for shape in shapes))


def with_vectors(plan: MatrixPlan, vectors_NE: Tensor, old_length: float, width: int, seed: int) -> Adjustment:
    """The adjustment of an embedding by vectors of its new pieces.

    Args:
        plan: of the embedding.
        vectors_NE: of the new pieces, those that have one of about length 1; E may be above `width`, then the
            first `width` numbers count.
        old_length: mean length of an old row.
        width: D.
        seed: of the rotation.
    """
    used = min(vectors_NE.shape[1], width)
    # Of numbers that each depend on the seed and their place alone, in float64: the same on every machine.
    drawn_DE = normal_rows(seed, 0, range(width), used).double()
    rotation_ED = torch.linalg.qr(drawn_DE).Q.T.float()
    return replace(
        nothing(plan, width),
        features_NF=vectors_NE[:, :used].contiguous(),
        directions_FD=_VECTOR_LENGTH * old_length * rotation_ED,
    )


def fit_prior(
    forward: LlamaForward, plan: MatrixPlan, features_NF: Tensor, hidden_ND: Tensor, label_N: Tensor
) -> tuple[Adjustment | None, dict[str, Any]]:
    """Fit the prior of the new rows of a head: directions to the first half of the text, numbers to the second.

    Args:
        forward: the model with the new rows as they are; its head is read, block by block.
        plan: of the head.
        features_NF: of each new piece, the logarithm of its frequency and (F > 1) its vector.
        hidden_ND: hidden states of scored positions, float32.
        label_N: the id that follows each.

    Returns:
        The adjustment, or None where none lowers the loss; and facts: the numbers, and what they were fitted by, the
        mean loss of the second half before and after, in nats, old pieces counted sixteen times.

    Raises:
        TooLittleText: a half of the text has few labels that are new pieces, or few that are not.
    """
    half = len(label_N) // 2
    is_new_N = torch.isin(label_N, plan.new_rows.to(label_N.device))
    later = hidden_ND[half:], label_N[half:]
    chosen = _sample(later[1], max(_FITTED_POSITIONS, _FITTED_ELEMENTS // len(plan.new_rows)))
    _check_enough(is_new_N[:half], _LEAST_LABELS, "directions are fitted to")
    _check_enough(is_new_N[half:][chosen], _LEAST_FITTED, "numbers are fitted to")
    hidden_ND, label_N, is_new_N = hidden_ND[:half], label_N[:half], is_new_N[:half]
    target_D, source_D = directions(hidden_ND, is_new_N)
    vectors_ED = vector_directions(
        hidden_ND[is_new_N], features_NF.to(hidden_ND.device)[_places(plan, label_N[is_new_N]), 1:], target_D
    )
    shapes = target_D, source_D, vectors_ED
    logits = _Logits(forward, plan, features_NF, later[0][chosen], later[1][chosen], shapes)
    numbers, before, after = logits.fit()
    facts = {"new_labels": float(is_new_N.double().mean()), "nats_before": before, "nats_after": after}
    if numbers is None:
        return None, facts
    keep, centre, margin, vector_share = numbers
    adjustment = replace(
        nothing(plan, hidden_ND.shape[1]),
        scale=keep - 1.0,
        offset_D=(centre * target_D - margin * source_D).float().cpu(),
        features_NF=features_NF,
        directions_FD=torch.cat([target_D[None], vector_share * vectors_ED]).float().cpu(),
    )
    return adjustment, {"keep": keep, "centre": centre, "margin": margin, "share": vector_share, **facts}


def _check_enough(is_new_N: Tensor, least: int, purpose: str) -> None:
    """Check that a part of the text, given by whether its labels are new pieces, has enough of both kinds."""
    num_new = int(is_new_N.sum())
    for kind, count in (("new pieces", num_new), ("old ones", len(is_new_N) - num_new)):
        if count < least:
            raise TooLittleText(
                f"of the {len(is_new_N)} labels that {purpose}, {count} are {kind}, expected at least {least}: give "
                "more text of both languages, read more of it (prior_tokens), or leave calibration out (in a recipe: "
                "surgery.calibration=null)"
            )


def directions(hidden_ND: Tensor, is_new_N: Tensor) -> tuple[Tensor, Tensor]:
    """(t, s), float64: least squares with a ridge, of is_new and of its opposite."""
    wide_ND = hidden_ND.double()
    gram_DD = wide_ND.T @ wide_ND / len(wide_ND)
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean())
    wanted_N2 = torch.stack([is_new_N, ~is_new_N], dim=1).double()
    target_D, source_D = torch.linalg.solve(gram_DD, wide_ND.T @ wanted_N2 / len(wide_ND)).unbind(dim=1)
    return target_D, source_D


def vector_directions(hidden_ND: Tensor, vectors_NE: Tensor, target_D: Tensor) -> Tensor:
    """S^-1 B' - (S^-1 B' m) t', float64 [E, D], of hidden states before new pieces and those pieces' vectors."""
    wide_ND, vectors_NE = hidden_ND.double(), vectors_NE.double()
    mean_D = wide_ND.mean(dim=0)
    centred_ND = wide_ND - mean_D
    map_DE = torch.linalg.solve(_covariance(centred_ND, _RIDGE_HIDDEN), centred_ND.T @ vectors_NE / len(wide_ND))
    found_ED = torch.linalg.solve(_covariance(vectors_NE - centred_ND @ map_DE, _RIDGE_LEFT), map_DE.T)
    return found_ED - torch.outer(found_ED @ mean_D, target_D)


def _covariance(centred_NE: Tensor, ridge: float) -> Tensor:
    found_EE = centred_NE.T @ centred_NE / len(centred_NE)
    diagonal = found_EE.diagonal()
    diagonal.add_(ridge * diagonal.mean() + 1e-12)
    return found_EE


def _places(plan: MatrixPlan, label_N: Tensor) -> Tensor:
    """Where ids stand among the new rows; of ids that are none of them, any place."""
    new_rows = plan.new_rows.to(label_N.device)
    return torch.searchsorted(new_rows, label_N).clamp(max=len(new_rows) - 1)


def _sample(label_N: Tensor, count: int) -> Tensor:
    """Places of at most `count` positions, evenly spread over the text."""
    step = max(1, math.ceil(len(label_N) / count))
    return torch.arange(0, len(label_N), step, device=label_N.device)


class _Logits:
    """What the loss of some positions is as a function of the four numbers.

    The kept rows count by their log-sum-exp alone, the new ones by four logits that the numbers weigh.
    """

    def __init__(
        self,
        forward: LlamaForward,
        plan: MatrixPlan,
        features_NF: Tensor,
        hidden_ND: Tensor,
        label_N: Tensor,
        shapes: tuple[Tensor, Tensor, Tensor],
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
        self.place_N = _places(plan, label_N)
        self.is_new_N = new_rows[self.place_N] == label_N
        self.weight_N = torch.where(self.is_new_N, 1.0, _OLD_WEIGHT)
        features_RF = features_NF.to(device)
        target_D, source_D, vectors_ED = (shape.float() for shape in shapes)
        self.frequency_R = features_RF[:, 0]
        self.target_N1 = (hidden_ND @ target_D)[:, None]
        self.source_N1 = (hidden_ND @ source_D)[:, None]
        self.vector_NR = (hidden_ND @ vectors_ED.T) @ features_RF[:, 1:].T

    def loss(self, keep: Tensor, centre: Tensor, margin: Tensor, share: Tensor) -> Tensor:
        """Mean loss in nats."""
        new_NR = keep * self.row_NR + (centre + self.frequency_R) * self.target_N1 - margin * self.source_N1
        new_NR = new_NR + share * self.vector_NR
        total_N = torch.logaddexp(self.kept_N, new_NR.logsumexp(dim=1))
        chosen_N = new_NR.gather(1, self.place_N[:, None])[:, 0]
        nats_N = total_N - torch.where(self.is_new_N, chosen_N, self.label_N)
        return (self.weight_N * nats_N).sum() / self.weight_N.sum()

    def fit(self) -> tuple[tuple[float, float, float, float] | None, float, float]:
        """The four numbers of the least loss, the loss of the rows as they are, and the least; None: as they are."""
        total_N = torch.logaddexp(self.kept_N, self.row_NR.logsumexp(dim=1))
        before = float((self.weight_N * (total_N - self.label_N)).sum() / self.weight_N.sum())
        # Two starts: rows that are the prior alone, and rows that have it too.
        tries = [self._from(torch.tensor([keep, 8.0, 8.0, 0.3])) for keep in (0.0, 1.0)]
        better = [found for found in tries if found[0] < before]  # which no NaN is
        if not better:
            return None, before, before
        after, numbers = min(better)
        return numbers, before, after

    def _from(self, start: Tensor) -> tuple[float, tuple[float, float, float, float]]:
        numbers = start.to(self.kept_N.device).requires_grad_(True)
        optimizer = torch.optim.LBFGS([numbers], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(*numbers)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            keep, centre, margin, share = numbers.tolist()
            return float(self.loss(*numbers)), (keep, centre, margin, share)
