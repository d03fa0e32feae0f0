"""The legacy Megatron layout (`--ckpt-format torch`): a torch.save file for each tensor and pipeline rank.

A rank's file holds `model`, or `model0`, `model1`... with interleaved stages, where layers count from 0 in each.
Chunk v of stage p comes after all chunks before v, then after the stages before p. Read with the names of
Transformer Engine's modules and of megatron-core's own; written with those that the target asks for.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import lay_out_archive, read_archive
from megatron_cpt.checkpoint.archive_pickle import Array
from megatron_cpt.checkpoint.described import Hints, args_of_llama, describe
from megatron_cpt.checkpoint.files import file_inside
from megatron_cpt.checkpoint.huggingface import dense
from megatron_cpt.checkpoint.layout import NewFile, NewLayout, Target, hole
from megatron_cpt.checkpoint.llama import (
    EMBEDDING,
    HEAD,
    LAYERS,
    STORED_EMBEDDING,
    STORED_HEAD,
    hf_shapes,
    placements,
    stored_shapes,
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
from megatron_cpt.checkpoint.runs import Box, Placed, Rows, StoredModel, check_cover, place
from megatron_cpt.config.manifest import write_text_atomic
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

# The tensors of a layer, in the order of Megatron's modules; a norm is part of the matrix behind it, or a module.
_STORED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_LOCAL_ORDER = (
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_TE_ORDER = (
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
_BY_COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_GATE_AND_UP = "mlp.linear_fc1.weight"
_LAYER = re.compile(re.escape(LAYERS) + r"(0|[1-9]\d{0,5})\.(.+)")
_MODEL = re.compile(r"model(\d{0,3})")
Key = tuple[str, int | None]  # stored tensor, layer


@dataclass
class _Boxes:
    """Where the matrices lie: each tensor-parallel rank's part, or one copy for each rank of what is not cut."""

    parts: dict[Key, list[Box]] = field(default_factory=lambda: defaultdict(list))
    copies: dict[Key, list[Box]] = field(default_factory=lambda: defaultdict(list))

    def add(self, key: Key, rank: int, tp: int, size: tuple[int, ...], offset: int, itemsize: int, file: str) -> None:
        """A rank's tensor, at `offset` of its file."""
        rows, columns = (*size, 1)[:2]
        name = key[0]
        if len(size) == 1:
            (self.copies if self.parts[key] else self.parts)[key].append(Box(file, offset, 0, rows, 0, columns))
        elif name.endswith(_BY_COLUMNS):
            self.parts[key].append(Box(file, offset, 0, rows, rank * columns // tp, columns // tp))
        elif name.endswith(_GATE_AND_UP):  # a rank's gate, then its up
            half = rows // 2 // tp
            for number in range(2):
                at = offset + number * half * columns * itemsize
                self.parts[key].append(Box(file, at, number * (rows // 2) + rank * half, half, 0, columns))
        else:
            self.parts[key].append(Box(file, offset, rank * rows // tp, rows // tp, 0, columns))


def local_shape(name: str, size: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Shape of a rank's part of a stored matrix."""
    if len(size) == 1:
        return size
    rows, columns = size
    return (rows, columns // tp) if name.endswith(_BY_COLUMNS) else (rows // tp, columns)


def open_mp_rank(folder: str | Path, hints: Hints | None = None) -> StoredModel:
    """Open a legacy checkpoint; of its files only the pickles are read, and nothing in them is run.

    Args:
        folder: the one that holds the tracker file, or an iteration's.
        hints: what the checkpoint does not say of itself.

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
    chunks = {(rank, number): model for rank, value in held.items() for number, model in _chunks(value)}
    if any("language_model" in value.get(name, {}) for value in held.values() for name in ("model", "model0")):
        raise CheckpointError(
            f"{iteration} is from before megatron-core (language_model...); bring it into megatron-core's form with "
            "Megatron-LM's tools/checkpoint first"
        )
    rows = next((a.shape[0] for m in chunks.values() if isinstance(a := m.get(STORED_EMBEDDING), Array)), 0) * tp
    if not rows:
        raise CheckpointError(f"{iteration} holds no {STORED_EMBEDDING}; expected a GPT model of megatron-core")
    described = describe(root, None if first_args is None else vars(first_args), rows, hints)
    boxes, dtypes = _find_boxes(root, below, described.llama, rows, tp, chunks)
    tensors, padding, copies = _placed(described.llama, described.vocab_size, rows, boxes, dtypes, str(iteration))
    layout = {"tensor_parallel": tp, "pipeline_parallel": pp, "virtual_pipeline": 1 + max(n for _, n in chunks)}
    model = StoredModel(root, "mp_rank", described.llama, described.vocab_size, rows, tensors)
    model.padding, model.copies, model.stated, model.layout = padding, copies, described.stated, layout
    return model


def _read_rank(folder: Path) -> dict[str, Any]:
    value = read_archive(file_inside(folder, RANK_FILE))
    if isinstance(value, dict) and (value.get("checkpoint_version") or 0) < 3:
        raise CheckpointError(
            f"{folder / RANK_FILE} has version {value.get('checkpoint_version')!r}, expected 3.0: before, q, k "
            "and v lay in another order; load and save it with Megatron-LM first"
        )
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / RANK_FILE} holds {type(value).__name__}, expected a checkpoint's dict")
    return value


def _chunks(value: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Model chunks of a rank, by number."""
    for name, model in value.items():
        match = _MODEL.fullmatch(name) if isinstance(name, str) else None
        if match and isinstance(model, Mapping):
            yield int(match[1] or 0), model


def _sizes(llama: LlamaShape, padded: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors; a tied model's last stage may hold the embedding again, as its head."""
    sizes = stored_shapes(llama, padded)
    return {**sizes, STORED_HEAD: sizes[STORED_EMBEDDING]}


def _find_boxes(
    root: Path,
    below: str,
    llama: LlamaShape,
    padded: int,
    tp: int,
    chunks: Mapping[tuple[Rank, int], Mapping[str, Any]],
) -> tuple[_Boxes, dict[Key, torch.dtype]]:
    """Where every tensor of every rank lies; each is of the model, in the shape that it has to have."""
    boxes, dtypes = _Boxes(), dict[Key, torch.dtype]()
    sizes = _sizes(llama, padded)
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
                key, layer = LAYERS + _STORED_NORMS.get(inside, inside), layer_offset + int(match[1])
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
            boxes.add((key, layer), rank.tensor, tp, size, stored.offset, stored.dtype.itemsize, file)
        if rank.tensor == tp - 1:
            layer_offset += len(seen)
    return boxes, dtypes


def _placed(
    llama: LlamaShape,
    vocab_size: int,
    padded: int,
    boxes: _Boxes,
    dtypes: Mapping[Key, torch.dtype],
    where: str,
) -> tuple[dict[str, Placed], dict[str, Placed], dict[str, tuple[Placed, ...]]]:
    """Tensors, padding and copies by HF name."""
    tensors, padding, copies = {}, {}, {}
    shapes = hf_shapes(llama, vocab_size)
    for name, at in placements(llama, vocab_size).items():
        key = (at.key, at.layer)
        if key not in dtypes:
            raise CheckpointError(f"{where}: {name} is missing; the checkpoint is incomplete or of another model")
        rows = [Rows(row, stored, count) for row, stored, count in at.runs]
        tensors[name] = place(shapes[name], dtypes[key], rows, boxes.parts[key])
        copies[name] = tuple(place(shapes[name], dtypes[key], rows, [box]) for box in boxes.copies[key])
        if name in (EMBEDDING, HEAD) and padded > vocab_size:
            beyond = [Rows(0, vocab_size, padded - vocab_size)]
            shape = (padded - vocab_size, shapes[name][1])
            padding[name] = place(shape, dtypes[key], beyond, boxes.parts[key])
        check_cover(name, tensors[name])
    if llama.tied_embeddings and (again := boxes.parts.get((STORED_HEAD, None))):
        rows, dtype = [Rows(0, 0, vocab_size)], dtypes[STORED_HEAD, None]
        copies[EMBEDDING] += (place(shapes[EMBEDDING], dtype, rows, again),)
        if padded > vocab_size:
            padding[HEAD] = replace(padding[EMBEDDING], runs=place(shape, dtype, beyond, again).runs)
    return tensors, padding, {name: each for name, each in copies.items() if each}


def lay_out_mp_rank(
    source: StoredModel, dtypes: Mapping[str, torch.dtype], target: Target, padded_size: int
) -> NewLayout:
    """Lay out the weights of a model for a tensor- and pipeline-parallel legacy checkpoint.

    Raises:
        CheckpointError: the model cannot be cut so.
    """
    llama = source.llama
    _check_cut(llama, padded_size, target)
    sizes = _sizes(llama, padded_size)
    places = placements(llama, source.vocab_size)
    by_key: dict[Key, torch.dtype] = {(at.key, at.layer): dtypes[name] for name, at in places.items()}
    by_key.setdefault((STORED_HEAD, None), dtypes[EMBEDDING])
    step = source.stated.get("step")
    iteration = "release" if not step else f"iter_{step:07d}"
    dtype = str(dtypes[EMBEDDING]).removeprefix("torch.")
    args = args_of_llama(llama, source.vocab_size, padded_size, rank_divisor(target, padded_size), dtype)
    vars(args).update(
        tensor_model_parallel_size=target.tp,
        pipeline_model_parallel_size=target.pp,
        virtual_pipeline_model_parallel_size=None if target.vpp == 1 else target.vpp,
        num_layers_per_virtual_pipeline_stage=None if target.vpp == 1 else llama.num_layers // target.pp // target.vpp,
        transformer_impl="transformer_engine" if target.spec == "te" else "local",
        iteration=step or 0,
    )
    boxes, files = _Boxes(), []
    for stage in range(target.pp):
        for tensor in range(target.tp):
            name = f"{iteration}/{rank_folder(stage, tensor, target.pp)}/{RANK_FILE}"
            value: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": step or 0}
            held = []
            for chunk in range(target.vpp):
                model: dict[str, Any] = {}
                for local, at in _names_of(llama, target, stage, chunk):
                    model[local] = None
                    if at is not None:
                        key, layer = at
                        size = sizes[key][1:] if layer is not None else sizes[key]
                        model[local] = hole(local_shape(key, size, target.tp), by_key[at])
                        held.append((key, layer, size))
                value["model" if target.vpp == 1 else f"model{chunk}"] = model
            length, parts, offsets = lay_out_archive(value)
            files.append(NewFile(name, length, tuple(parts)))
            for (key, layer, size), offset in zip(held, offsets, strict=True):
                boxes.add((key, layer), tensor, target.tp, size, offset, by_key[key, layer].itemsize, name)
    tensors, padding, copies = _placed(llama, source.vocab_size, padded_size, boxes, by_key, "the new checkpoint")
    finish = partial(_finish, tracked=tracked_name(iteration))
    return NewLayout(tuple(files), tensors, finish, padding, copies)


def rank_divisor(target: Target, padded_size: int) -> int:
    """What Megatron, which multiplies it by its tensor-parallel size, pads to the same number of rows with."""
    whole, rest = divmod(target.vocab_divisor, target.tp)
    return padded_size // target.tp if rest else whole


def _finish(folder: Path, tracked: str) -> None:
    write_text_atomic(folder / TRACKER, f"{tracked}\n")


def _names_of(llama: LlamaShape, target: Target, stage: int, chunk: int) -> Iterator[tuple[str, Key | None]]:
    """Names in a model chunk, in the order of Megatron's modules, and what each is; nothing: an empty extra state."""
    per_chunk = llama.num_layers // target.pp // target.vpp
    first = (chunk * target.pp + stage) * per_chunk
    if stage == 0 and chunk == 0:
        yield STORED_EMBEDDING, (STORED_EMBEDDING, None)
    for local in range(per_chunk):
        for inside in _LOCAL_ORDER if target.spec == "local" else _TE_ORDER:
            key = LAYERS + _STORED_NORMS.get(inside, inside)
            yield f"{LAYERS}{local}.{inside}", (key, first + local)
            if inside.endswith(".weight") and "linear_" in inside:  # strict loading asks for it, of Transformer Engine
                yield f"{LAYERS}{local}.{inside.removesuffix('weight')}_extra_state", None
    if stage == target.pp - 1 and chunk == target.vpp - 1:
        yield "decoder.final_layernorm.weight", ("decoder.final_layernorm.weight", None)
        if not llama.tied_embeddings or target.pp > 1:
            yield STORED_HEAD, (STORED_HEAD, None)


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
            f"got {groups} key-value heads and a tensor-parallel size of {target.tp}, expected a multiple or a divisor"
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
