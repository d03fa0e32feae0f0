"""The files of one rank of a legacy checkpoint, laid out: its part of the model, and of the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import lay_out_archive
from megatron_cpt.checkpoint.layout import NewFile, Target, hole
from megatron_cpt.checkpoint.llama import STORED_EMBEDDING, STORED_HEAD, stored_shapes
from megatron_cpt.checkpoint.mp_rank_files import SHARDED_OPTIMIZER
from megatron_cpt.checkpoint.mp_rank_optimizer import LaidState, lay_out_distributed, lay_out_plain
from megatron_cpt.checkpoint.optimizer_state import OptimizerFacts
from megatron_cpt.checkpoint.rank_parts import Key, Piece, chunk_names, local_shape
from megatron_cpt.checkpoint.runs import MASTER, WEIGHTS
from megatron_cpt.config.schema import LlamaShape


def sizes_with_head(llama: LlamaShape, padded: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors; a tied model's last stage may hold the embedding again, as its head."""
    sizes = stored_shapes(llama, padded)
    return {**sizes, STORED_HEAD: sizes[STORED_EMBEDDING]}


@dataclass(frozen=True)
class Part:
    """A rank's part of a matrix.

    Attributes:
        key: of the matrix.
        size: of the whole matrix.
        shape: of the part.
    """

    key: Key
    size: tuple[int, ...]
    shape: tuple[int, ...]


def parts_of(llama: LlamaShape, padded: int, target: Target, stage: int, chunk: int) -> dict[str, Part | None]:
    """What a model chunk holds on every tensor-parallel rank, in the order of Megatron's modules."""
    sizes = sizes_with_head(llama, padded)
    each = llama.num_layers // target.pp // target.vpp
    first = (chunk * target.pp + stage) * each
    begins, ends = stage == chunk == 0, (stage, chunk) == (target.pp - 1, target.vpp - 1)
    parts: dict[str, Part | None] = {}
    for name, at in chunk_names(llama, target.spec, range(first, first + each), begins, ends, target.pp > 1):
        parts[name] = None
        if at is not None:
            size = sizes[at[0]][1:] if at[1] is not None else sizes[at[0]]
            parts[name] = Part(at, size, local_shape(at[0], size, target.tp))
    return parts


def lay_out_state(
    facts: OptimizerFacts,
    chunks: Sequence[Mapping[str, Part | None]],
    target: Target,
    dtypes: Mapping[Key, torch.dtype],
    kinds: Sequence[str],
    folder: str,
    llama: LlamaShape,
) -> LaidState:
    """A rank's state of the optimizer, in the form that is asked for."""
    shapes = [{name: part.shape for name, part in chunk.items() if part is not None} for chunk in chunks]
    if target.optimizer_form == "plain":
        return lay_out_plain(facts, shapes, MASTER in kinds)
    dtype, shared = dtypes[STORED_EMBEDDING, None], llama.tied_embeddings and target.pp > 1
    return lay_out_distributed(facts, shapes, dtype, f"{folder}/{SHARDED_OPTIMIZER}", shared)


def lay_out_rank(
    value: dict[str, Any],
    chunks: Sequence[Mapping[str, Part | None]],
    dtypes: Mapping[Key, torch.dtype],
    file: str,
    facts: OptimizerFacts | None,
    laid: LaidState | None,
) -> tuple[NewFile, list[tuple[str, Part, list[Piece]]]]:
    """A rank's file, with all that `value` holds already, and where weights and states of its parameters go."""
    order: list[tuple[str, Part]] = []
    for number, chunk in enumerate(chunks):
        model = {name: None if part is None else hole(part.shape, dtypes[part.key]) for name, part in chunk.items()}
        value["model" if len(chunks) == 1 else f"model{number}"] = model
        order += [(WEIGHTS, part) for part in chunk.values() if part is not None]
    found = []
    if laid is not None and facts is not None:
        value |= {"optimizer": laid.value, "opt_param_scheduler": facts.scheduler_state()}
        value["num_floating_point_operations_so_far"] = 0.0
        order += [(kind, part) for number, name, kind in laid.arrays if (part := chunks[number][name]) is not None]
        for number, state in enumerate(laid.chunks):
            for name, by_kind in state.items():
                if (part := chunks[number][name]) is not None:
                    found += [(kind, part, pieces) for kind, pieces in by_kind.items()]
    size, parts, offsets = lay_out_archive(value)
    for (kind, part), offset in zip(order, offsets, strict=True):
        found.append((kind, part, [Piece(file, offset, 0, prod(part.shape))]))
    return NewFile(file, size, tuple(parts)), found
