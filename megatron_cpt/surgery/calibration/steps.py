"""Steps of Adam on the few numbers of an adjustment, with the model frozen.

The body is computed and differentiated one layer at a time, the head in blocks of rows, so that memory does not
grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.config.surgery import CalibrationConfig
from megatron_cpt.surgery.matrix import Adjustment, MatrixPlan
from megatron_cpt.surgery.plan import SurgeryPlan

if TYPE_CHECKING:
    from megatron_cpt.surgery.calibration import Tokens

_BETAS = (0.9, 0.95)
_SLOWER = 0.1  # learning rate of a scale and of a map of low rank, relative to that of an offset
_UP_STD = 0.05


@dataclass(frozen=True)
class Calibrated:
    """The adjustments of both matrices; one and the same in a tied model."""

    embedding: Adjustment
    head: Adjustment


def learn(
    forward: LlamaForward,
    plan: SurgeryPlan,
    start: Calibrated,
    take: Callable[[int], Tokens],
    settings: CalibrationConfig,
) -> tuple[Calibrated, dict[str, Any]]:
    """Improve adjustments by `settings.steps` steps; the learning rate falls linearly to zero.

    Returns:
        The adjustments, and facts: the loss of the first and of the last step's text, nats per token.
    """
    tied = forward.shape.tied_embeddings
    size = _hidden_size(forward, take(settings.step_tokens))
    name = EMBEDDING if tied else HEAD
    head = _Matrix(forward, plan.head, name, start.head, settings.rank, settings.seed, size)
    embedding = (
        head
        if tied
        else _Matrix(forward, plan.embedding, EMBEDDING, start.embedding, 0, settings.seed, size, has_direction=False)
    )
    groups = [*head.groups(settings.learning_rate), *([] if tied else embedding.groups(settings.learning_rate))]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(settings.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 - step / settings.steps)
        optimizer.zero_grad()
        losses.append(_gradient(forward, embedding, head, take(settings.step_tokens)))
        optimizer.step()
    found = Calibrated(embedding.adjustment(), head.adjustment())
    return found, {"nats_first": losses[0], "nats_last": losses[-1]}


def _hidden_size(forward: LlamaForward, tokens: Tokens) -> float:
    hidden_NSD = forward.hidden(torch.from_numpy(tokens.tokens_N)[None], torch.from_numpy(tokens.cu_seqlens))
    return float(hidden_NSD.float().abs().sum(dim=-1).mean())


@dataclass
class _Matrix:
    """The numbers of one matrix as parameters.

    One unit of an offset's every element moves an embedding row by its own size, and a logit by 1: Adam's steps
    have the size of the learning rate in every element, whatever the model's width and norms are.
    """

    forward: LlamaForward
    plan: MatrixPlan
    name: str
    start: Adjustment
    rank: int
    seed: int
    hidden_size_1: float  # mean sum of the absolute values of a hidden state
    has_direction: bool = True  # one of the first feature, which is learnt: the frequency's, in a head
    new_rows: Tensor = field(init=False)
    base_RD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.new_rows = self.plan.new_rows.to(self.forward.device)
        self.base_RD = self.forward.embed(self.new_rows).float() if self.name == EMBEDDING else self._of_head()
        width, device = self.base_RD.shape[1], self.forward.device
        self.unit = float(self.base_RD.square().mean().sqrt()) or 1.0
        if self.name == HEAD:
            self.unit = 1.0 / self.hidden_size_1
        self.features_RF = self.start.features_NF.to(device)
        spread = float(self.features_RF[:, 0].square().mean().sqrt()) if self.features_RF.shape[1] else 0.0
        self.direction_unit = self.unit / spread if spread and self.has_direction else 0.0
        generator = torch.Generator().manual_seed(self.seed)
        up = torch.randn(self.rank, width, generator=generator) * _UP_STD
        self.scale = torch.tensor(self.start.scale, device=device, requires_grad=True)
        self.offset_D = torch.zeros(width, device=device, requires_grad=True)
        self.direction_D = torch.zeros(width, device=device, requires_grad=True)
        self.down_DR = torch.zeros(width, self.rank, device=device, requires_grad=True)
        self.up_RD = up.to(device).requires_grad_(True)

    def _of_head(self) -> Tensor:
        parts = []
        for first, block_VD in self.forward.head_blocks():
            inside = (self.new_rows >= first) & (self.new_rows < first + block_VD.shape[0])
            parts.append(block_VD[self.new_rows[inside] - first].float())
        return torch.cat(parts)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Adam's groups: offsets in their units, the scale slower."""
        shapes = [self.offset_D, *([self.direction_D] if self.direction_unit else [])]
        maps = [self.down_DR, self.up_RD] if self.rank else []
        return [{"params": shapes, "lr": rate}, {"params": [self.scale, *maps], "lr": rate * _SLOWER}]

    def rows(self, places: Tensor | None = None) -> Tensor:
        """The adjusted new rows, or those at some places among them; a function of the parameters."""
        base_RD = self.base_RD if places is None else self.base_RD[places]
        features_RF = self.features_RF if places is None else self.features_RF[places]
        offset_D = self.start.offset_D.to(base_RD.device) + self.unit * self.offset_D
        rows_RD = base_RD * (1.0 + self.scale) + offset_D + features_RF @ self._directions()
        return rows_RD + (base_RD @ self.down_DR) @ self.up_RD if self.rank else rows_RD

    def _directions(self) -> Tensor:
        directions_FD = self.start.directions_FD.to(self.base_RD.device)
        learnt_1D = self.direction_unit * self.direction_D[None]
        return torch.cat([directions_FD[:1] + learnt_1D, directions_FD[1:]]) if len(directions_FD) else directions_FD

    def adjustment(self) -> Adjustment:
        """The numbers found."""
        return Adjustment(
            float(self.scale.detach()),
            self.start.offset_D + (self.unit * self.offset_D).detach().cpu(),
            self.start.features_NF,
            self._directions().detach().cpu(),
            self.down_DR.detach().cpu(),
            self.up_RD.detach().cpu(),
        )


def _gradient(forward: LlamaForward, embedding: _Matrix, head: _Matrix, tokens: Tokens) -> float:
    """Add the gradient of the mean loss to the parameters; returns the loss in nats per token."""
    token_N = torch.from_numpy(tokens.tokens_N).to(forward.device)
    label_N = torch.from_numpy(tokens.labels_N).to(forward.device)
    layout = forward.layout(1, len(token_N), torch.from_numpy(tokens.cu_seqlens))
    place_N = torch.searchsorted(embedding.new_rows, token_N).clamp(max=len(embedding.new_rows) - 1)
    new_N = torch.nonzero(embedding.new_rows[place_N] == token_N).flatten()
    embedded_ND = forward.embed(token_N)
    made_RD = embedding.rows(place_N[new_N])
    embedded_ND[new_N] = made_RD.detach().to(embedded_ND.dtype)
    tape: list[Tensor] = []
    hidden_ND = forward.body(embedded_ND, layout, tape)
    loss, grad_ND = _head_gradient(forward, head, hidden_ND, label_N)
    grad_ND = forward.body_gradient(tape, layout, grad_ND.to(hidden_ND.dtype))
    if len(new_N):
        made_RD.backward(grad_ND[new_N].float())  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def _head_gradient(forward: LlamaForward, head: _Matrix, hidden_ND: Tensor, label_N: Tensor) -> tuple[float, Tensor]:
    """Mean loss of the scored positions, its gradient by the hidden states, and (added) by the parameters."""
    scored_N = label_N >= 0
    count = max(1, int(scored_N.sum()))
    with torch.enable_grad():
        made_RD = head.rows()
    sum_N = torch.full(label_N.shape, -math.inf, device=forward.device)
    chosen_N = torch.zeros(label_N.shape, device=forward.device)
    for first, rows_VD, _, _ in _blocks(forward, head, made_RD):
        logits_NV = hidden_ND.float() @ rows_VD.T
        sum_N = torch.logaddexp(sum_N, logits_NV.logsumexp(dim=1))
        inside = (label_N >= first) & (label_N < first + len(rows_VD))
        chosen_N[inside] = logits_NV[inside, label_N[inside] - first]
    grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
    grad_RD = torch.zeros_like(made_RD)
    for first, rows_VD, new, span in _blocks(forward, head, made_RD):
        share_NV = (hidden_ND.float() @ rows_VD.T - sum_N[:, None]).exp()
        inside = torch.nonzero((label_N >= first) & (label_N < first + len(rows_VD))).flatten()
        share_NV[inside, label_N[inside] - first] -= 1.0
        share_NV *= (scored_N / count)[:, None]
        grad_ND += share_NV @ rows_VD
        grad_RD[span] = share_NV[:, new].T @ hidden_ND.float()
    with torch.enable_grad():
        made_RD.backward(grad_RD)  # type: ignore[no-untyped-call]
    return float((sum_N - chosen_N)[scored_N].sum() / count), grad_ND


def _blocks(forward: LlamaForward, head: _Matrix, made_RD: Tensor) -> Iterator[tuple[int, Tensor, Tensor, slice]]:
    """The head with its adjusted rows: (first row, fp32 rows, places of new rows in them, their span in `made_RD`)."""
    for first, block_VD in forward.head_blocks():
        low, high = torch.searchsorted(
            head.new_rows, torch.tensor([first, first + len(block_VD)], device=head.new_rows.device)
        ).tolist()
        new = head.new_rows[low:high] - first
        rows_VD = block_VD.float().clone() if high > low else block_VD.float()
        rows_VD[new] = made_RD[low:high].detach()
        yield first, rows_VD, new, slice(low, high)
