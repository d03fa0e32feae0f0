"""The legacy Megatron layout (`--ckpt-format torch`): a torch.save file for each tensor and pipeline rank.

A rank's file holds `model`, or `model0`, `model1`... with interleaved stages, where layers count from 0 in each.
Chunk v of stage p comes after all chunks before v, then after the stages before p. Read with the names of
Transformer Engine's modules and of megatron-core's own; written with those that the target asks for.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import read_archive
from megatron_cpt.checkpoint.archive_pickle import Array
from megatron_cpt.checkpoint.described import Hints, args_of_llama, describe
from megatron_cpt.checkpoint.files import brief, file_inside
from megatron_cpt.checkpoint.huggingface import Stored, dense
from megatron_cpt.checkpoint.layout import NewFile, NewLayout, Target
from megatron_cpt.checkpoint.llama import (
    EMBEDDING,
    LAYERS,
    STORED_EMBEDDING,
    STORED_HEAD,
    placements,
)
from megatron_cpt.checkpoint.mp_rank_files import (
    RANK_FILE,
    TRACKER,
    Rank,
    find_ranks,
    iteration_folder,
    rank_folder,
    tracked_name,
)
from megatron_cpt.checkpoint.mp_rank_layout import lay_out_rank, lay_out_state, parts_of, sizes_with_head
from megatron_cpt.checkpoint.mp_rank_optimizer import (
    HeldRank,
    holds_state,
    read_state,
)
from megatron_cpt.checkpoint.rank_parts import STORED_NORMS, Key, Named, Piece, RankBoxes, local_shape
from megatron_cpt.checkpoint.runs import MASTER, STATES, WEIGHTS, StoredModel
from megatron_cpt.config.manifest import write_text_atomic
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

_LAYER = re.compile(re.escape(LAYERS) + r"(0|[1-9]\d{0,5})\.(.+)")
_MODEL = re.compile(r"model\d{0,3}")


@dataclass(frozen=True)
class _Held:
    """A tensor of a rank's model chunk."""

    rank: Rank
    chunk: int
    name: str
    key: Key
    size: tuple[int, ...]
    stored: Stored
    file: str


def open_mp_rank(folder: str | Path, hints: Hints | None = None, with_optimizer: bool = False) -> StoredModel:
    """Open a legacy checkpoint; of its files only the pickles are read, and nothing in them is run.

    Args:
        folder: the one that holds the tracker file, or an iteration's.
        hints: what the checkpoint does not say of itself.
        with_optimizer: find the state of its optimizer too.

    Raises:
        CheckpointError: incomplete, damaged, unsafe, or not of a plain Llama.
    """
    folder = Path(folder)
    iteration = iteration_folder(folder)
    root = folder if (folder / TRACKER).is_file() else iteration
    below = "" if root == iteration else f"{iteration.name}/"
    ranks = find_ranks(iteration)
    tp, pp = 1 + max(rank.tensor for rank in ranks), 1 + max(rank.stage for rank in ranks)
    held = {rank: _read_rank(iteration / rank.name) for rank in ranks}
    first_args = next((value["args"] for value in held.values() if isinstance(value.get("args"), Namespace)), None)
    chunks = {
        (rank, number): model
        for rank, value in held.items()
        for number, model in _chunks(value, str(iteration / rank.name / RANK_FILE)).items()
    }
    if any("language_model" in model for model in chunks.values()):
        raise CheckpointError(
            f"{iteration} is from before megatron-core (language_model...); bring it into megatron-core's form with "
            "Megatron-LM's tools/checkpoint first"
        )
    tables = [model[STORED_EMBEDDING] for model in chunks.values() if STORED_EMBEDDING in model]
    rows = tables[0].shape[0] * tp if tables and isinstance(tables[0], Array) and tables[0].shape else 0
    if not rows:
        raise CheckpointError(f"{iteration} holds no {STORED_EMBEDDING}; expected a GPT model of megatron-core")
    described = describe(root, None if first_args is None else vars(first_args), rows, hints)
    llama, sizes = described.llama, (described.vocab_size, rows)
    found = list(_find(root, below, llama, rows, tp, chunks))
    layout = {"tensor_parallel": tp, "pipeline_parallel": pp, "virtual_pipeline": 1 + max(n for _, n in chunks)}
    named = Named()
    weights = [(tensor, [Piece(tensor.file, tensor.stored.offset, 0, prod(tensor.stored.shape))]) for tensor in found]
    _add(named, WEIGHTS, llama, sizes, tp, weights, str(iteration))
    facts, holds = None, any(holds_state(iteration / rank.name, value) for rank, value in held.items())
    if with_optimizer and holds:
        of_ranks = [_held_rank(iteration, below, rank, value, found) for rank, value in held.items()]
        states, facts = read_state(of_ranks, llama.tied_embeddings and pp > 1)
        by_rank = dict(zip(held, states, strict=True))
        for kind in STATES:
            pieces = [(tensor, by_rank[tensor.rank][tensor.chunk][tensor.name].get(kind)) for tensor in found]
            known = [(tensor, places) for tensor, places in pieces if places is not None]
            if kind != MASTER or known:
                _add(named, kind, llama, sizes, tp, known, str(iteration))
    return StoredModel(
        root,
        "mp_rank",
        llama,
        described.vocab_size,
        rows,
        named.tensors,
        named.padding,
        named.copies,
        described.stated,
        layout=layout,
        optimizer=facts,
        holds_optimizer=holds,
    )


def _held_rank(iteration: Path, below: str, rank: Rank, value: Mapping[str, Any], found: Sequence[_Held]) -> HeldRank:
    """A rank for those who name the state of its optimizer."""
    mine = [tensor for tensor in found if tensor.rank == rank]
    numbers = range(1 + max((tensor.chunk for tensor in mine), default=-1))
    shapes = [{tensor.name: tensor.stored.shape for tensor in mine if tensor.chunk == number} for number in numbers]
    dtypes = [{tensor.name: tensor.stored.dtype for tensor in mine if tensor.chunk == number} for number in numbers]
    file = f"{below}{rank.name}/{RANK_FILE}"
    return HeldRank(iteration / rank.name, file, value, shapes, dtypes, rank.stage == 0)


def _add(
    named: Named,
    kind: str,
    llama: LlamaShape,
    sizes: tuple[int, int],
    tp: int,
    found: Sequence[tuple[_Held, list[Piece]]],
    where: str,
) -> None:
    """Put the ranks' parts of every matrix together, of the weights or of a state of them."""
    boxes, dtypes = RankBoxes(), dict[Key, torch.dtype]()
    for tensor, pieces in found:
        dtype = dtypes[tensor.key] = tensor.stored.dtype if kind == WEIGHTS else torch.float32
        boxes.add(tensor.key, tensor.rank.tensor, tp, tensor.size, pieces, dtype.itemsize)
    named.add(kind, llama, sizes, boxes, dtypes, where)


def _read_rank(folder: Path) -> dict[str, Any]:
    value = read_archive(file_inside(folder, RANK_FILE))
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / RANK_FILE} holds {type(value).__name__}, expected a checkpoint's dict")
    version = value.get("checkpoint_version")
    if not isinstance(version, (int, float)) or not version >= 3:
        raise CheckpointError(
            f"{folder / RANK_FILE} has version {brief(version)}, expected 3.0: before, q, k and v lay in another "
            "order; load and save it with Megatron-LM first"
        )
    return value


def _chunks(value: Mapping[str, Any], where: str) -> dict[int, Mapping[str, Any]]:
    """Model chunks of a rank, by number."""
    names = [name for name in value if isinstance(name, str) and _MODEL.fullmatch(name)]
    found = {int(name.removeprefix("model") or 0): value[name] for name in names}
    if len(found) != len(names) or sorted(found) != list(range(len(found))):
        raise CheckpointError(
            f"{where} holds {', '.join(sorted(names)[:4])}; expected `model`, or `model0`, `model1` and on, no gap"
        )
    for model in found.values():
        if not isinstance(model, Mapping) or not all(isinstance(name, str) for name in model):
            raise CheckpointError(f"{where}: a model is {type(model).__name__}, expected a dict of tensors by name")
    return found


def _find(
    root: Path,
    below: str,
    llama: LlamaShape,
    padded: int,
    tp: int,
    chunks: Mapping[tuple[Rank, int], Mapping[str, Any]],
) -> Iterator[_Held]:
    """Every tensor of every rank; each is of the model, in the shape that it has to have."""
    dtypes = dict[Key, torch.dtype]()
    sizes = sizes_with_head(llama, padded)
    layer_offset = 0
    # In the order of a forward pass: chunk by chunk, stage by stage; of one stage, rank by rank.
    for rank, number in sorted(chunks, key=lambda chunk: (chunk[1], chunk[0])):
        file = f"{below}{rank.name}/{RANK_FILE}"
        seen = set()
        for name, array in chunks[rank, number].items():
            match = _LAYER.fullmatch(name)
            key, layer = name, None
            if match:
                inside = match[2]
                key, layer = LAYERS + STORED_NORMS.get(inside, inside), layer_offset + int(match[1])
                seen.add(int(match[1]))
            if key.endswith("_extra_state"):
                continue
            if key not in sizes or (layer is not None and layer >= llama.num_layers):
                raise CheckpointError(f"{root / file}: {name} does not belong to the Llama that is described")
            size = sizes[key][1:] if layer is not None else sizes[key]
            stored = dense(array, f"{root / file}: {name}", root / file)
            if stored.shape != local_shape(key, size, tp):
                raise CheckpointError(
                    f"{root / file}: {name} has shape {stored.shape}, expected {local_shape(key, size, tp)}; the "
                    "weights and the description are of two models"
                )
            if dtypes.setdefault((key, layer), stored.dtype) != stored.dtype:
                raise CheckpointError(f"{root / file}: {name} is {stored.dtype}, on another rank it is not")
            yield _Held(rank, number, name, (key, layer), size, stored, file)
        if rank.tensor == tp - 1:
            layer_offset += len(seen)


def lay_out_mp_rank(
    source: StoredModel, dtypes: Mapping[str, torch.dtype], target: Target, padded_size: int
) -> NewLayout:
    """Lay out a model, and the state of its optimizer where `dtypes` names it, for tensor- and pipeline-parallel ranks.

    Raises:
        CheckpointError: the model cannot be cut so.
    """
    llama = source.llama
    _check_cut(llama, padded_size, target)
    places = placements(llama, source.vocab_size)
    by_key: dict[Key, torch.dtype] = {(at.key, at.layer): dtypes[name] for name, at in places.items()}
    by_key.setdefault((STORED_HEAD, None), dtypes[EMBEDDING])
    kinds = [kind for kind in STATES if f"{kind}/{EMBEDDING}" in dtypes]
    facts = source.optimizer if kinds else None
    step = source.stated.get("step") or (facts.step if facts else 0)
    iteration = f"iter_{step:07d}" if step else "release"
    args = args_of_llama(
        llama,
        source.vocab_size,
        padded_size,
        rank_divisor(target, padded_size),
        str(dtypes[EMBEDDING]).removeprefix("torch."),
    )
    vars(args).update(_args_of_cut(llama, target, step), **(facts.progress if facts else {}))
    boxes = {kind: RankBoxes() for kind in (WEIGHTS, *kinds)}
    files: list[NewFile] = []
    for stage in range(target.pp):
        chunks = [parts_of(llama, padded_size, target, stage, chunk) for chunk in range(target.vpp)]
        for tensor in range(target.tp):
            folder = f"{iteration}/{rank_folder(stage, tensor, target.pp)}"
            value: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": step}
            laid = None if facts is None else lay_out_state(facts, chunks, target, by_key, kinds, folder, llama)
            made, found = lay_out_rank(value, chunks, by_key, f"{folder}/{RANK_FILE}", facts, laid)
            files += [made] if laid is None or laid.file is None else [made, laid.file]
            for kind, part, pieces in found:
                itemsize = by_key[part.key].itemsize if kind == WEIGHTS else torch.float32.itemsize
                boxes[kind].add(part.key, tensor, target.tp, part.size, pieces, itemsize)
    named = Named()
    for kind, held in boxes.items():
        wide = by_key if kind == WEIGHTS else dict.fromkeys(by_key, torch.float32)
        named.add(kind, llama, (source.vocab_size, padded_size), held, wide, "the new checkpoint")
    finish = partial(_finish, tracked=tracked_name(iteration))
    return NewLayout(tuple(files), named.tensors, finish, named.padding, named.copies)


def _args_of_cut(llama: LlamaShape, target: Target, step: int) -> dict[str, Any]:
    """Megatron's arguments that say how a checkpoint is cut."""
    return {
        "tensor_model_parallel_size": target.tp,
        "pipeline_model_parallel_size": target.pp,
        "virtual_pipeline_model_parallel_size": None if target.vpp == 1 else target.vpp,
        "num_layers_per_virtual_pipeline_stage": (
            None if target.vpp == 1 else llama.num_layers // target.pp // target.vpp
        ),
        "transformer_impl": "transformer_engine" if target.spec == "te" else "local",
        "iteration": step,
    }


def rank_divisor(target: Target, padded_size: int) -> int:
    """What Megatron, which multiplies it by its tensor-parallel size, pads to the same number of rows with."""
    whole, rest = divmod(target.vocab_divisor, target.tp)
    return padded_size // target.tp if rest else whole


def _finish(folder: Path, tracked: str) -> None:
    write_text_atomic(folder / TRACKER, f"{tracked}\n")


def _check_cut(llama: LlamaShape, padded_size: int, target: Target) -> None:
    if target.spec not in ("te", "local"):
        raise CheckpointError(f"got spec {target.spec!r}, expected 'te' or 'local'")
    if min(target.tp, target.pp, target.vpp) < 1 or (target.vpp > 1 and target.pp == 1):
        raise CheckpointError(
            f"got tensor, pipeline and virtual sizes {target.tp}, {target.pp}, {target.vpp}; expected 1 or more, and "
            "virtual stages with a pipeline of 2 or more only"
        )
    groups = llama.num_query_groups
    if groups % target.tp and target.tp % groups:
        raise CheckpointError(
            f"got --tp {target.tp} for {groups} key-value heads, expected a multiple or a divisor of them"
        )
    # With fewer groups than ranks, Megatron cuts the rows of the grouped matrix as they come.
    for what, size, parts in (
        ("attention heads", llama.num_attention_heads, target.tp),
        ("rows of q, k and v", (llama.num_attention_heads + 2 * groups) * llama.head_dim, target.tp),
        ("FFN size", llama.ffn_hidden_size, target.tp),
        ("padded vocabulary", padded_size, target.tp),
        ("layers", llama.num_layers, target.pp * target.vpp),
    ):
        if size % parts:
            raise CheckpointError(
                f"got {what} {size} to be cut into {parts}, expected a multiple; choose other sizes (--tp, --pp, --vpp)"
            )
