"""The state of an optimizer in legacy checkpoints: read from both of Megatron's forms, and laid out in either.

The plain optimizer keeps its state in the rank's file, by the numbers of parameters; the distributed one keeps
buffers in a file of its own, `distrib_optim.pt`.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import lay_out_archive, read_archive
from megatron_cpt.checkpoint.archive_pickle import Array
from megatron_cpt.checkpoint.files import file_inside
from megatron_cpt.checkpoint.huggingface import dense
from megatron_cpt.checkpoint.layout import NewFile, hole
from megatron_cpt.checkpoint.mp_rank_files import RANK_FILE, SHARDED_OPTIMIZER
from megatron_cpt.checkpoint.optimizer_buffers import BUFFER_STATES, world_buffers
from megatron_cpt.checkpoint.optimizer_state import (
    LEAVE_BEHIND,
    VOCABULARY,
    OptimizerFacts,
    Shapes,
    bucket_sizes,
    buffer_layout,
    facts_of,
    members,
    nested_groups,
)
from megatron_cpt.checkpoint.rank_parts import Piece
from megatron_cpt.checkpoint.runs import MASTER, STATES, number_of
from megatron_cpt.errors import CheckpointError

_F32 = torch.float32
# Of a model chunk: where each state of each parameter lies, by local name.
State = dict[str, dict[str, list[Piece]]]


@dataclass(frozen=True)
class HeldRank:
    """A rank's file, read, and its place.

    Attributes:
        path: of its folder.
        file: the rank's file, below the checkpoint's folder.
        value: of the file.
        chunks: shapes of its parameters.
        dtypes: of its parameters, by chunk.
        first: whether it is of the first pipeline stage.
    """

    path: Path
    file: str
    value: Mapping[str, Any]
    chunks: Sequence[Shapes]
    dtypes: Sequence[Mapping[str, torch.dtype]]
    first: bool


def holds_state(path: Path, value: Mapping[str, Any]) -> bool:
    """Whether a rank's folder holds the state of an optimizer."""
    return bool(value.get("optimizer")) or (path / SHARDED_OPTIMIZER).exists()


def read_state(ranks: Sequence[HeldRank], shared: bool) -> tuple[list[list[State]], OptimizerFacts]:
    """Where the state of every parameter lies, by rank and model chunk, and what there is beside.

    Args:
        ranks: all of them.
        shared: whether a tied table lies on two stages.

    Raises:
        CheckpointError: it is missing on a rank, or cannot be told by parameter.
    """
    states: list[list[State]] = []
    groups: list[Mapping[str, Any]] = []
    steps: list[float] = []
    for rank in ranks:
        where = f"{rank.path}"
        if not rank.value.get("optimizer") or list(rank.path.glob("layer_wise_optimizer_*")):
            raise CheckpointError(
                f"{where} holds no optimizer that is plain or distributed, expected the same on every rank; "
                f"{LEAVE_BEHIND}"
            )
        sharded = (rank.path / SHARDED_OPTIMIZER).exists()
        states.append(_from_buffers(rank, shared) if sharded else _from_numbers(rank, steps))
        for group in nested_groups(rank.value["optimizer"]):
            if sharded or group.get("params"):
                groups.append(group)
                if group.get("step") is not None:
                    steps.append(number_of(rank.path / RANK_FILE, group["step"]))
    first = ranks[0].value
    args = first.get("args")
    facts = facts_of(
        groups,
        steps,
        first.get("opt_param_scheduler"),
        vars(args) if isinstance(args, Namespace) else None,
        str(ranks[0].path),
    )
    return states, facts


def _from_numbers(rank: HeldRank, steps: list[float]) -> list[State]:
    """The plain optimizer's: parameters are numbered group by group."""
    where, saved = f"{rank.path / RANK_FILE}", rank.value["optimizer"]
    if isinstance(saved, list):
        if len(saved) != 1:
            raise CheckpointError(f"{where} holds {len(saved)} optimizers, expected one; {LEAVE_BEHIND}")
        saved = saved[0]
    inner = saved.get("optimizer", saved) if isinstance(saved, Mapping) else {}
    groups, state = inner.get("param_groups"), inner.get("state")
    masters = saved.get("fp32_from_fp16_params") if isinstance(saved, Mapping) else None
    if not isinstance(groups, list) or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{where} holds no state of its optimizer, which {SHARDED_OPTIMIZER} may have held: copy that along, or "
            f"{LEAVE_BEHIND}"
        )
    found: list[State] = [{} for _ in rank.chunks]
    for index, names in enumerate(members(groups, rank.chunks, where)):
        numbers = groups[index].get("params")
        halves = [at for at in names if rank.dtypes[at[0]][at[1]] != _F32] if masters is not None else []
        mine = masters[index] if masters is not None and halves else []
        if not isinstance(numbers, list) or len(numbers) != len(names) or len(mine) != len(halves):
            raise CheckpointError(
                f"{where}: group {index} of the optimizer's parameters has not the {len(names)} ones of this model; "
                f"{LEAVE_BEHIND}"
            )
        of_half = dict(zip(halves, mine, strict=True))
        for number, (chunk, name) in zip(numbers, names, strict=True):
            entry = state.get(number) or {}
            if entry.get("step") is not None:
                steps.append(number_of(rank.path / RANK_FILE, entry["step"]))
            arrays = {kind: entry.get(kind) for kind in STATES[1:]} | {MASTER: of_half.get((chunk, name))}
            found[chunk][name] = {
                kind: [_whole(array, rank.chunks[chunk][name], rank, f"{where}: {kind} of {name}")]
                for kind, array in arrays.items()
                if array is not None
            }
    return found


def _whole(array: Any, shape: tuple[int, ...], rank: HeldRank, where: str) -> Piece:
    stored = dense(array, where, rank.path / RANK_FILE)
    if stored.shape != shape or stored.dtype != _F32:
        raise CheckpointError(
            f"{where} is {stored.shape} {stored.dtype}, expected {shape} {_F32} as the weight; {LEAVE_BEHIND}"
        )
    return Piece(rank.file, stored.offset, 0, math.prod(shape))


def _from_buffers(rank: HeldRank, shared: bool) -> list[State]:
    """The distributed optimizer's: a buffer for each model chunk."""
    path = file_inside(rank.path, SHARDED_OPTIMIZER)
    file = rank.file.replace(RANK_FILE, SHARDED_OPTIMIZER)
    buffers = world_buffers(read_archive(path), file, str(path))
    args = rank.value.get("args")
    found: list[State] = []
    for number, shapes in enumerate(rank.chunks):
        counts = [(name, math.prod(shape)) for name, shape in shapes.items()]
        closed: list[int | None] = [None]
        if rank.first and not number:
            closed = bucket_sizes(vars(args) if isinstance(args, Namespace) else None, sum(n for _, n in counts))
        again = next((name for name in shapes if name in VOCABULARY), None) if shared else None
        buffer = buffers.get(number)
        starts = None if buffer is None else buffer.starts(counts, closed, again)
        if buffer is None or starts is None:
            raise CheckpointError(
                f"{path}: model chunk {number} holds {buffer.total if buffer else 'no'} numbers, which are not "
                f"those of its parameters ({sum(n for _, n in counts)}); it is of another model, or {LEAVE_BEHIND}"
            )
        found.append({name: {kind: buffer.cut(kind, starts[name], count) for kind in STATES} for name, count in counts})
    return found


@dataclass(frozen=True)
class LaidState:
    """The state of one rank as it is going to be written.

    Attributes:
        value: for the key "optimizer" of the rank's file.
        arrays: chunk, name and state of each tensor in it, in the order of the archive.
        file: of the distributed optimizer.
        chunks: where state of parameters lies in that file.
    """

    value: Any
    arrays: list[tuple[int, str, str]]
    file: NewFile | None
    chunks: list[State]


def lay_out_plain(facts: OptimizerFacts, chunks: Sequence[Shapes], masters: bool) -> LaidState:
    """A rank's state as the plain optimizer keeps it; without masters it is that of a run in float32."""
    groups, state, halves = [], dict[int, dict[str, Array]](), []
    moments: list[tuple[int, str, str]] = []
    wide: list[tuple[int, str, str]] = []
    for group, names in zip(facts.stepped_groups(), members(facts.groups, chunks, "the optimizer"), strict=True):
        first = len(state)
        for chunk, name in names:
            state[len(state)] = {kind: hole(chunks[chunk][name], _F32) for kind in STATES[1:]}
            moments += [(chunk, name, kind) for kind in STATES[1:]]
        groups.append({**group, "params": list(range(first, len(state)))})
        halves.append([hole(chunks[chunk][name], _F32) for chunk, name in names])
        wide += [(chunk, name, MASTER) for chunk, name in names]
    inner = {"state": state, "param_groups": groups}
    if not masters:
        return LaidState(inner, moments, None, [])
    return LaidState({"optimizer": inner, "fp32_from_fp16_params": halves}, [*moments, *wide], None, [])


def lay_out_distributed(
    facts: OptimizerFacts, chunks: Sequence[Shapes], dtype: torch.dtype, file: str, shared: bool
) -> LaidState:
    """A rank's state as the distributed optimizer keeps it, in one bucket for each model chunk."""
    stored: dict[Any, Any] = {"buckets_coalesced": True}
    starts = []
    for number, shapes in enumerate(chunks):
        again = next((name for name in shapes if name in VOCABULARY), None) if shared else None
        places, total = buffer_layout([(name, math.prod(shape)) for name, shape in shapes.items()], None, again)
        world: dict[str, Any] = {name: hole((total,), _F32) for name in BUFFER_STATES.values()}
        stored[number] = {(dtype, _F32): {**world, "numel_unpadded": total}}
        starts.append((places, total))
    size, parts, offsets = lay_out_archive(stored)
    laid: list[State] = []
    begins = iter(offsets)
    for (places, total), shapes in zip(starts, chunks, strict=True):
        state: State = {name: {} for name in shapes}
        for kind in BUFFER_STATES:
            begin = next(begins)
            for name, shape in shapes.items():
                offset = begin + places[name] * _F32.itemsize
                state[name][kind] = [Piece(file, offset, 0, math.prod(shape))]
            parts += _gaps(begin, total, [(places[name], math.prod(shape)) for name, shape in shapes.items()])
        laid.append(state)
    value = {"optimizer": {"param_groups": facts.stepped_groups()}}
    return LaidState(value, [], NewFile(file, size, tuple(sorted(parts))), laid)


def _gaps(begin: int, total: int, places: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """The zeros between parameters, each of which begins aligned."""
    here = 0
    for start, count in [*sorted(places), (total, 0)]:
        if start > here:
            yield begin + here * _F32.itemsize, bytes((start - here) * _F32.itemsize)
        here = start + count
