"""One step over megatron-core's schedules: micro-batches in, summed losses out.

Every rank of a model replica reads the same samples itself: the order is a pure function of the
sample number, so nothing has to be broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cpt.data import IGNORED, Batch
from megatron_cpt.kernels import LinearCrossEntropy
from megatron_cpt.model.layers import PackedDocuments
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.mesh import Mesh


@dataclass(frozen=True)
class StepSums:
    """Summed losses of one step over the whole global batch, the same on every rank.

    Attributes:
        nats: (groups,) summed cross-entropy of the scored tokens of each group, in nats; without what
            `LossConfig` adds to it.
        tokens: (groups,) number of scored tokens of each group.
    """

    nats: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """Mean loss in nats per scored token."""
        return float(self.nats.sum() / max(1, self.tokens.sum()))


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device: N tokens of packed documents."""

    tokens_1N: Tensor
    labels_1N: Tensor
    groups_N: Tensor  # index of the group (source, language) each token's loss is added to
    documents: PackedDocuments


def to_device(batch: Batch, ignored_label: int | None = None) -> MicroBatch:
    """Move one batch to the device; its samples' sources become the loss groups.

    Args:
        batch: from `data`; samples of equal length side by side.
        ignored_label: a label that is not scored beside -100 (EOS, when text alone is scored).
    """
    device = current_device().torch_device()
    labels = torch.from_numpy(batch.labels_N)
    if ignored_label is not None:
        labels = labels.masked_fill(labels == ignored_label, IGNORED)
    per_sample = len(batch.tokens_N) // len(batch.sources)
    return MicroBatch(
        tokens_1N=torch.from_numpy(batch.tokens_N)[None].to(device, non_blocking=True),
        labels_1N=labels[None].to(device, non_blocking=True),
        groups_N=torch.from_numpy(batch.sources).repeat_interleave(per_sample).to(device, non_blocking=True),
        documents=PackedDocuments(
            cu_seqlens=torch.from_numpy(batch.cu_seqlens),
            position_ids_N=torch.from_numpy(batch.position_ids_N).to(device, non_blocking=True),
            num_scored=int((labels != IGNORED).sum()),
        ),
    )


def run_schedule(
    model: Sequence[Any], mesh: Mesh, micro_batches: Sequence[MicroBatch], num_groups: int, *, forward_only: bool
) -> StepSums:
    """Run forward (and backward) over the micro-batches of this data-parallel rank.

    All micro-batches hold the same number of tokens. Gradients are left in the DDP buffers, summed
    over data-parallel ranks and divided by the scored tokens of the global batch.
    """
    num_tokens = micro_batches[0].tokens_1N.shape[1]
    parts = get_forward_backward_func()(
        forward_step_func=_forward_step(num_groups),
        data_iterator=[iter(micro_batches) for _ in model],
        model=list(model),
        num_microbatches=len(micro_batches),
        seq_length=num_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    sums = torch.zeros(2, num_groups, dtype=torch.float64)
    for part in parts:
        sums += part.cpu()
    return _reduce(sums, mesh)


def logits_at(model: Sequence[Any], mesh: Mesh, tokens_N: Tensor, positions_P: Tensor) -> Tensor | None:
    """fp32 logits (P, V) at P positions of one document; on the ranks of the last stage, None elsewhere."""
    num_micro_batches = mesh.pipeline_size if mesh.virtual_size else 1  # the interleaved schedule's least
    num_tokens = len(tokens_N)
    device = current_device().torch_device()
    positions_N = torch.arange(num_tokens, device=device)
    borders = torch.tensor([0, num_tokens], dtype=torch.int32)
    document = PackedDocuments(borders, positions_N, positions_P.to(device))

    def forward_step(_: Any, chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        output = chunk(
            input_ids=tokens_N[None].to(device),
            position_ids=positions_N[None],
            attention_mask=None,
            packed_seq_params=document,
        )
        return output, lambda logits_PV, non_loss_data: logits_PV

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None for _ in model],
            model=list(model),
            num_microbatches=num_micro_batches,
            seq_length=num_tokens,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0].cpu() if found else None


def _forward_step(num_groups: int) -> Callable[..., Any]:
    def loss_function(batch: MicroBatch, result: LinearCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
        scored_N = batch.labels_1N[0] != IGNORED
        sums = torch.zeros(2, num_groups, dtype=torch.float64, device=result.nats_N.device)
        sums.index_add_(1, batch.groups_N, torch.stack([result.nats_N, scored_N]).double())
        return result.loss, scored_N.sum().int(), sums

    def forward_step(micro_batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(micro_batches)
        output = chunk(
            input_ids=batch.tokens_1N,
            position_ids=batch.documents.position_ids_N[None],
            attention_mask=None,
            labels=batch.labels_1N,
            packed_seq_params=batch.documents,
        )
        return output, lambda result: loss_function(batch, result)

    return forward_step


def _reduce(sums: Tensor, mesh: Mesh) -> StepSums:
    """Add over data-parallel ranks; the last pipeline stage alone holds losses, so add over stages too."""
    device_sums = sums.to(current_device().torch_device())
    dist.all_reduce(device_sums, group=mesh.data_group)
    dist.all_reduce(device_sums, group=mesh.pipeline_group)
    nats, tokens = device_sums.cpu().numpy()
    return StepSums(nats, tokens)
