"""What the ranks that share the vocabulary send each other, and how their statistics become one.

Shape letters: N tokens, R = N / ranks of them on a rank under sequence parallelism, D hidden size, K statistics
of a token, G ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def gather_statistics(statistics_KN: Tensor, group: str, group_size: int) -> Tensor:
    """Returns the statistics over the vocabulary of all ranks [K, N], the same bits on each: one all-gather."""
    num_statistics, num_tokens = statistics_KN.shape
    gathered = statistics_KN.new_empty(group_size * num_statistics, num_tokens)
    dist.all_gather_into_tensor(gathered, statistics_KN.contiguous(), group=_ranks(group))
    return join_statistics(gathered.view(group_size, num_statistics, num_tokens))


def join_statistics(statistics_GKN: Tensor) -> Tensor:
    """Makes one set of statistics of those of several shards of the vocabulary.

    Args:
        statistics_GKN: [G, K, N], of G >= 1 shards, each as `linear_cross_entropy_statistics` returns it. The
            order decides the last bits of the sums.

    Returns:
        [K, N], as of one shard that holds all rows: greatest logit, sum of exponentials relative to it, the label's
        logit, and with K = 4 the sum of the logits.
    """
    peak_GN, sum_GN, *others = statistics_GKN.unbind(1)
    peak_N = peak_GN.amax(0)
    sum_N = (sum_GN * (peak_GN - peak_N).exp_()).sum(0)
    return torch.stack([peak_N, sum_N, *(other_GN.sum(0) for other_GN in others)])


def gather_tokens(hidden_RD: Tensor, group: str, group_size: int) -> Tensor:
    """Returns the tokens of all ranks [N, D], in the order of the ranks."""
    hidden_ND = hidden_RD.new_empty(group_size * hidden_RD.shape[0], hidden_RD.shape[1])
    dist.all_gather_into_tensor(hidden_ND, hidden_RD.contiguous(), group=_ranks(group))
    return hidden_ND


def scatter_tokens(grad_ND: Tensor, group: str, group_size: int) -> tuple[Tensor, dist.Work]:
    """Begins to add the ranks' gradients and to give each rank its part [R, D].

    Returns:
        The part, which is not there before the second value's `wait`.
    """
    grad_RD = grad_ND.new_empty(grad_ND.shape[0] // group_size, grad_ND.shape[1])
    work = dist.reduce_scatter_tensor(grad_RD, grad_ND, group=_ranks(group), async_op=True)
    return grad_RD, work


def _ranks(group: str) -> dist.ProcessGroup:
    """The group of a name; by names groups travel through operators."""
    return _resolve_process_group(group)  # type: ignore[arg-type]
