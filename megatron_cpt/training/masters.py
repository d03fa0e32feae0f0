"""The optimizer's masters in a checkpoint: each stored under its own name, and read only beside its own weight.

A master is the fp32 number that a bf16 weight is the rounding of; an fp32 weight is its own master.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpt.errors import CheckpointError
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import engine_version

OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def optimizer_state_to_save(optimizer: Any, model_state: dict[str, Any]) -> dict[str, Any]:
    """Sharded state of the optimizer, every tensor under the name of the parameter that it belongs to.

    megatron-core 0.16.1 (and 0.17.1, 0.18.2 and 0.19.0; mended after that) gathers a buffer without the padding at the
    ends of its buckets, and then cuts it at the places that parameters have with that padding. What lies behind a
    padded end would be stored shifted, the last of it lost. It takes several buckets, which a tied table makes on
    several stages and `overlap_grad_reduce` on any, and data parallelism that does not divide their sizes, as by
    three. Loading is sound.

    Raises:
        CheckpointError: on every rank; this engine needs something else, and masters would be stored wrongly.
    """
    (sharded,) = optimizer.chained_optimizers
    with _places_without_padding(sharded.buffers):
        state: dict[str, Any] = optimizer.sharded_state_dict(model_state, metadata=OPTIMIZER_METADATA)
    wrong = torch.zeros(1, dtype=torch.int64)
    parameters = (parameter for buffer in sharded.buffers for parameter in buffer.param_index_map)
    for index, parameter in enumerate(parameters):
        if parameter in sharded.model_param_group_index_map:  # this rank has a part of it
            stored = _own_part(sharded, parameter, state["param_state"][index]["param"].data)
            wrong += (stored != _master(sharded, parameter).to(stored.device)).sum().cpu()
    if found := _over_all_ranks(wrong):
        raise CheckpointError(
            f"megatron-core {engine_version()} hands out {found} masters that are not the optimizer's; this step is "
            "not saved: install release 0.16.1, for which the saving was made"
        )
    return state


@contextmanager
def _places_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Give the parameters the places that they have in buffers without the padding at the ends of buckets."""
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer, places in zip(buffers, padded, strict=True):
            before = [0]  # elements of padding before each bucket
            for bucket in buffer.buckets:
                before.append(before[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            if before[-2]:
                buffer.param_index_map = {
                    parameter: (start - before[bucket], end - before[bucket], bucket)
                    for parameter, (start, end, bucket) in places.items()
                }
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


class LoadedWeights:
    """The weights of a checkpoint, kept to hold the masters against that are loaded after them.

    Kept, because an fp32 weight is overwritten by its master. Each rank has the part whose masters it has.
    """

    def __init__(self, model: Sequence[Any], optimizer: Any) -> None:
        (self._optimizer,) = optimizer.chained_optimizers
        self._held: list[tuple[Any, Tensor]] = []
        for chunk in model:
            for parameter in chunk.module.parameters():
                if parameter in self._optimizer.model_param_group_index_map:
                    self._held.append((parameter, _own_part(self._optimizer, parameter, parameter).clone()))

    def refuse_other_masters(self, folder: Path) -> None:
        """Check that the masters are now those of the weights: a weight is its master, or that rounded, bit for bit.

        An fp32 run may begin with bf16 weights, so what was rounded is seen by the numbers and not by the type.

        Raises:
            CheckpointError: on every rank, so that none waits for the others.
        """
        wrong = torch.zeros(1, dtype=torch.int64)
        for parameter, weights in self._held:
            master, expected = _master(self._optimizer, parameter), weights.float()
            wrong += ((master != expected) & (master.bfloat16().float() != expected)).sum().cpu()
        if found := _over_all_ranks(wrong):
            raise CheckpointError(
                f"{folder} holds an optimizer's state that is not of its weights ({found} masters do not round to "
                "them), as megatron-core saves it where data parallelism does not divide a bucket; begin a new run "
                "with this folder as initial_checkpoint and without initial_optimizer"
            )


def _own_part(sharded: Any, parameter: Any, whole: Tensor) -> Tensor:
    """The part of a parameter, flat, whose master this rank has."""
    part = sharded._get_model_param_range_map(parameter)["param"]
    return whole.detach().reshape(-1)[part.start : part.end]


def _master(sharded: Any, parameter: Any) -> Tensor:
    """The master of this rank's part of a parameter, flat."""
    master: Tensor = sharded._get_main_param_and_optimizer_states(parameter)["param"]
    return master.detach().view(-1)


def _over_all_ranks(count: Tensor) -> int:
    total = count.to(current_device().torch_device())
    dist.all_reduce(total)
    return int(total)
