"""The state of an optimizer in a `torch_dist` checkpoint, in every form of Megatron's that says or allows to know
which parameter each number is of.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import read_archive
from megatron_cpt.checkpoint.chunks import ChunkFinder
from megatron_cpt.checkpoint.files import file_inside
from megatron_cpt.checkpoint.llama import LAYERS, STORED_HEAD, stored_shapes
from megatron_cpt.checkpoint.metadata import StoredObject, StoredTensor
from megatron_cpt.checkpoint.optimizer_buffers import BUFFER_STATES, Buffer, world_buffers
from megatron_cpt.checkpoint.optimizer_state import (
    LEAVE_BEHIND,
    VOCABULARY,
    OptimizerFacts,
    bucket_sizes,
    facts_of,
    nested_groups,
    nested_values,
)
from megatron_cpt.checkpoint.rank_parts import Piece, RankBoxes, chunk_names, local_shape
from megatron_cpt.checkpoint.runs import MASTER, STATES, number_of
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

SHARDING = "fully_reshardable"
_NAMED = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(param|fp32_param|exp_avg|exp_avg_sq)\.(.+)", re.DOTALL)
_GROUP = r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d{1,6})\."
_BUCKET = re.compile(
    _GROUP + r"gbuf_idx_(\d{1,6})\.dtype_\(torch\.\w+, torch\.\w+\)\.bucket_idx_(\d{1,6})\.(param|exp_avg|exp_avg_sq)"
)
_GATHERED = re.compile(_GROUP + r"param_state/shard_0_1")
_SETTINGS = re.compile(_GROUP + r"optimizer/shard_0_1")
_STATE_OF = {"fp32_param": MASTER} | {stored: state for state, stored in BUFFER_STATES.items()}
ADVICE = (
    "save it once with --dist-ckpt-optim-fully-reshardable (or, before Megatron-LM 0.15, with "
    f"--no-ckpt-fully-parallel-save), or {LEAVE_BEHIND}"
)


class TorchDistState:
    """The state of an optimizer, found in the index of a `torch_dist` folder.

    Args:
        folder: the checkpoint.
        tensors: of the index, weights and state.
        objects: of the index.
        common: what common.pt holds.

    Raises:
        CheckpointError: it is in a form that does not say which parameter it is of.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, StoredTensor],
        objects: Mapping[str, StoredObject],
        common: Mapping[str, Any],
    ) -> None:
        self._folder, self._objects, self._common = folder, objects, common
        self._finder = ChunkFinder(folder)
        args = common.get("args")
        self._args: dict[str, Any] = {} if args is None else getattr(args, "__dict__", {})
        self.named: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        self._buckets: dict[tuple[int, int], dict[str, dict[int, StoredTensor]]] = {}
        for key, stored in tensors.items():
            if match := _NAMED.fullmatch(key):
                if match[2] in tensors and tensors[match[2]].size != stored.size:
                    raise self._unknown(f"{key} is stored as flat ranges (fully_sharded_model_space)")
                self.named[_STATE_OF[match[1]]][match[2]] = stored
            elif match := _BUCKET.fullmatch(key):
                self._refuse_several(match[1])
                held = self._buckets.setdefault((int(match[2]), int(match[3])), defaultdict(dict))
                held[_STATE_OF[match[5]]][int(match[4])] = stored
            elif "optimizer." in key:
                raise self._unknown(f"{key} is of no form that is known")
            else:
                continue
            if stored.dtype != torch.float32:
                raise self._unknown(f"{key} is {stored.dtype} instead of float32")
        weights = {key for key in tensors if "optimizer." not in key}
        for state, of_state in self.named.items():
            if lacking := sorted(weights - of_state.keys()):
                raise self._unknown(f"{state} of {lacking[0]} is missing (and {len(lacking) - 1} more)")
        self._gathered = {int(m[2]): objects[key] for key in objects if (m := _GATHERED.fullmatch(key))}

    def _unknown(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._folder}: the optimizer's state cannot be told by parameter: {what}; {ADVICE}")

    def _refuse_several(self, chained: str | None) -> None:
        if chained not in (None, "0"):
            raise self._unknown("it is of several optimizers")

    def facts(self) -> OptimizerFacts:
        """Step, settings and scheduler."""
        held = [(self._folder / "common.pt", self._common.get("optimizer"))]
        for key, at in self._objects.items():
            if _SETTINGS.fullmatch(key):
                path = file_inside(self._folder, at.file)
                held.append((path, read_archive(path, at.start, at.length)))
        groups = [group for _, value in held for group in nested_groups(value)]
        steps = [number_of(path, group["step"]) for path, value in held for group in _stepped(value)]
        steps += [number_of(held[0][0], step) for step in nested_values(held[0][1], "common_step")]
        scheduler = self._common.get("opt_param_scheduler")
        return facts_of(groups, steps, scheduler, self._args, str(self._folder))

    def buffered(self, llama: LlamaShape, padded: int) -> dict[str, RankBoxes]:
        """Where each state lies that is stored by place alone: in buffers of the distributed optimizer."""
        buffers = self._buffers()
        if not buffers:
            return {}
        tp, pp = (self._args.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline"))
        ranks = {rank for rank, _ in buffers}
        if type(tp) is not int or type(pp) is not int or len(ranks) != tp * pp or ranks != set(range(tp * pp)):
            raise self._unknown(
                f"it is of {len(ranks)} ranks, and Megatron's arguments say tensor_model_parallel_size={tp!r} and "
                f"pipeline_model_parallel_size={pp!r}"
            )
        chunks = 1 + max(chunk for _, chunk in buffers)
        found = {state: RankBoxes() for state in STATES}
        first = 0
        for chunk in range(chunks):
            for stage in range(pp):
                begins, ends = stage == chunk == 0, (stage, chunk) == (pp - 1, chunks - 1)
                mine = [buffers.get((stage * tp + tensor, chunk)) for tensor in range(tp)]
                first += self._add_chunk(found, mine, llama, padded, first, begins, ends, pp > 1)
        if first != llama.num_layers:
            raise self._unknown(f"its buffers hold {first} layers, and the model has {llama.num_layers}")
        return found

    def _buffers(self) -> dict[tuple[int, int], Buffer]:
        """By data-parallel group and model chunk."""
        found = {}
        for place, states in self._buckets.items():
            pieces, sizes = {}, {}
            for state, buckets in states.items():
                sizes[state] = [buckets[number].size[0] for number in sorted(buckets)]
                pieces[state] = list(self._pieces(buckets))
            if states.keys() != set(STATES) or len({tuple(size) for size in sizes.values()}) != 1:
                raise self._unknown(f"the group {place[0]} has {', '.join(states)} in buckets of several sizes")
            buckets_sizes = next(iter(sizes.values()))
            found[place] = Buffer(pieces, sum(buckets_sizes), buckets_sizes)
        for group, held in self._gathered.items():
            path = file_inside(self._folder, held.file)
            value = read_archive(path, held.start, held.length)
            for chunk, buffer in world_buffers(value, held.file, f"{path}: the group {group}").items():
                found[group, chunk] = buffer
        return found

    def _pieces(self, buckets: Mapping[int, StoredTensor]) -> Iterator[Piece]:
        base = 0
        for number in sorted(buckets):
            stored = buckets[number]
            for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offset):
                offset = self._finder.offset(chunk, stored.dtype)
                yield Piece(chunk.file, offset, base + chunk.offset[0], chunk.size[0])
            base += stored.size[0]

    def _add_chunk(
        self,
        found: Mapping[str, RankBoxes],
        ranks: list[Buffer | None],
        llama: LlamaShape,
        padded: int,
        first: int,
        begins: bool,
        ends: bool,
        staged: bool,
    ) -> int:
        """Name what a model chunk's buffers hold, and return its number of layers: the one that fills them."""
        tp, spec = len(ranks), "local" if self._args.get("transformer_impl") == "local" else "te"
        sizes = stored_shapes(llama, padded)
        sizes[STORED_HEAD] = (padded, llama.hidden_size)
        for count in range(llama.num_layers - first + 1):
            names = chunk_names(llama, spec, range(first, first + count), begins, ends, staged)
            keys = {name: key for name, key in names if key is not None}
            shapes = {name: sizes[key][1:] if key.startswith(LAYERS) else sizes[key] for name, (key, _) in keys.items()}
            local = [(name, _elements(local_shape(keys[name][0], size, tp))) for name, size in shapes.items()]
            shared = next((n for n in shapes if n in VOCABULARY), None) if llama.tied_embeddings and staged else None
            closed = bucket_sizes(self._args, sum(n for _, n in local)) if begins else [None]
            places = [None if buffer is None else buffer.starts(local, closed, shared) for buffer in ranks]
            if any(place is None for place in places):
                continue
            for tensor, (buffer, starts) in enumerate(zip(ranks, places, strict=True)):
                for (name, elements), size in zip(local, shapes.values(), strict=True):
                    for state, boxes in found.items():
                        assert buffer is not None and starts is not None
                        pieces = buffer.cut(state, starts[name], elements)
                        boxes.add(keys[name], tensor, tp, size, pieces, torch.float32.itemsize)
            return count
        raise self._unknown(f"the buffers from layer {first} on hold no whole number of this model's layers")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _stepped(value: Any) -> list[Mapping[str, Any]]:
    return [group for group in nested_groups(value) if group.get("step") is not None]


def common_state(facts: OptimizerFacts, args: Namespace, step: int) -> dict[str, Any]:
    """What common.pt holds with an optimizer whose tensors are stored by parameter.

    Args:
        facts: of the optimizer.
        args: Megatron's arguments that describe the model; those that say how far training went are added.
        step: number of iterations.
    """
    vars(args).update(iteration=step, **facts.progress)
    return {
        "args": args,
        "iteration": step,
        "optimizer": {"optimizer": {"param_groups": facts.stepped_groups()}, "param_state_sharding_type": SHARDING},
        "opt_param_scheduler": facts.scheduler_state(),
        "content_metadata": {
            "distrib_optim_sharding_type": SHARDING,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        },
    }
