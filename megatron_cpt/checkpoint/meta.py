"""Meta's own checkpoints of Llama 1 to 3.3: `consolidated.NN.pth`, one for each model-parallel rank, and `params.json`.

Each file is a flat dict of tensors. Meta rotates neighbouring elements of a head, Hugging Face its two halves, so rows
of q and k are every second row of a head here. docs/formats/meta.md has names, splits, and what no file states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cpt.checkpoint.archive import lay_out_archive, read_archive
from megatron_cpt.checkpoint.archive_pickle import Array
from megatron_cpt.checkpoint.described import Hints, told_by_config
from megatron_cpt.checkpoint.files import file_inside
from megatron_cpt.checkpoint.huggingface import BIN_INDEX, BIN_WEIGHTS, INDEX, WEIGHTS, Stored, dense
from megatron_cpt.checkpoint.layout import NewFile, NewLayout, Target, hole
from megatron_cpt.checkpoint.llama import EMBEDDING, FINAL_NORM, HEAD, check_supported, hf_shapes
from megatron_cpt.checkpoint.manifest import own_manifest, read_checkpoint_manifest
from megatron_cpt.checkpoint.meta_params import (
    PARAMS,
    Params,
    check_agrees,
    check_statable,
    embedding_split_by_rows,
    ffn_size,
    params_of,
    read_params,
    shape_of,
)
from megatron_cpt.checkpoint.runs import Box, Placed, Rows, StoredModel, place, same_rows
from megatron_cpt.config.manifest import MANIFEST, write_json_atomic
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

# How a tensor is cut over the files: by rows, by columns, or not, with a copy in each.
Split = Literal["rows", "columns", "copy"]
File = Mapping[str, Stored]

_FILE = re.compile(r"consolidated\.(\d{2,4})\.pth")
_LAYER = re.compile(r"layers\.(\d+)\..+")
_CONSTANT = "rope.freqs"
_TABLE, _HEAD_TABLE, _GATE = "tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"
_INSIDE: dict[str, tuple[str, Split]] = {
    "input_layernorm.weight": ("attention_norm.weight", "copy"),
    "self_attn.q_proj.weight": ("attention.wq.weight", "rows"),
    "self_attn.k_proj.weight": ("attention.wk.weight", "rows"),
    "self_attn.v_proj.weight": ("attention.wv.weight", "rows"),
    "self_attn.o_proj.weight": ("attention.wo.weight", "columns"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "copy"),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", "rows"),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", "columns"),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", "rows"),
}


def is_meta(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint of Meta's, and holds no weights in the form of Hugging Face."""
    others = (WEIGHTS, INDEX, BIN_WEIGHTS, BIN_INDEX)
    return any(folder.glob("consolidated.*.pth")) and not any((folder / name).exists() for name in others)


def open_meta(folder: str | Path, hints: Hints | None = None) -> StoredModel:
    """Open a checkpoint of Meta's; headers are read, and of the head as much as shows whether it is the embedding.

    Context length, scaling factor of the rope and whether the head is tied stand in no file of Meta's. They come from
    `hints.config`, else from the manifest of what `convert` wrote, else from the release that the model looks like.

    Args:
        folder: the one with the `.pth` files.
        hints: a config.json decides what is not in the files, and has to agree with what is. All rows belong to the
            vocabulary here.

    Raises:
        CheckpointError: a file is missing, damaged or unsafe, its tensors are not exactly those of the Llama that
            params.json describes, or this and what was told disagree.
    """
    folder = Path(folder)
    params = read_params(folder)
    files = _read_files(folder, params)
    names, vocab_size, ffn = _sizes(folder, params, files)
    model, assumed = shape_of(params, ffn, vocab_size, HEAD not in names)
    check_supported(model, str(folder / PARAMS))
    tensors, copies = {}, {}
    for name, shape in hf_shapes(model, vocab_size).items():
        key, split = names[name]
        held = _parts(key, split, shape, files)
        offsets = [(file, stored.offset) for file, stored in zip(files, held, strict=True)]
        tensors[name], copies[name] = _placed(name, shape, held[0].dtype, split, model, offsets)
    manifest = read_checkpoint_manifest(folder) if own_manifest(folder) else {}
    where, told = _told(folder, hints, manifest, vocab_size)
    tied = _is_tied(folder, tensors, told, where)
    if told is None:
        model, assumed = shape_of(params, ffn, vocab_size, tied)
        stated: dict[str, Any] = {"assumed": assumed}
    else:
        check_agrees(params, model, told, where)
        model, stated = told, manifest
    if tied and HEAD in tensors:
        head = tensors.pop(HEAD)
        copies[EMBEDDING] = () if head == tensors[EMBEDDING] else (head,)
    copies = {name: each for name, each in copies.items() if each}
    layout = {"tensor_parallel": len(files)}
    return StoredModel(
        folder, "meta", model, vocab_size, vocab_size, tensors, copies=copies, stated=stated, layout=layout
    )


def _read_files(folder: Path, params: Params) -> dict[str, File]:
    """Name of each file, in the order of ranks -> its tensors by key, all of them expected ones."""
    names = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    matches = [match for name in names if (match := _FILE.fullmatch(name))]
    numbers = sorted(int(match[1]) for match in matches)
    if len(matches) != len(names) or numbers != list(range(len(names))):
        raise CheckpointError(
            f"{folder} holds {', '.join(names[:8])}; expected consolidated.00.pth and on without a gap: copy the "
            "missing files"
        )
    if scales := sorted(path.name for path in folder.glob("fp8_scales_*")):
        raise CheckpointError(f"{folder} holds {scales[0]}: the model is quantised; get it in bfloat16")
    files: dict[str, File] = {}
    for name in sorted(names, key=lambda name: int(name.split(".")[1])):
        path = file_inside(folder, name)
        value = read_archive(path)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise CheckpointError(f"{path} holds {type(value).__name__}, expected a dict of tensors by name")
        files[name] = {k: dense(array, f"{path}: {k[:80]!r}", path) for k, array in value.items() if k != _CONSTANT}
        layers = {match[1] for key in files[name] if (match := _LAYER.fullmatch(key))}
        if len(layers) != params.n_layers:
            raise CheckpointError(f"{path} holds {len(layers)} layers, {PARAMS} says {params.n_layers}")
    return files


def _sizes(folder: Path, params: Params, files: Mapping[str, File]) -> tuple[dict[str, tuple[str, Split]], int, int]:
    """Key and split by HF name, the vocabulary's size and that of the FFN; every key of every file is among them."""
    first = next(iter(files.values()))
    for key in (_TABLE, _GATE):
        if key not in first or len(first[key].shape) != 2:
            raise CheckpointError(f"{folder}: {key} is missing or no matrix; get the complete model, of a plain Llama")
    rows, width = first[_TABLE].shape
    by_rows = width == params.dim
    names = _names(params.n_layers, by_rows)
    if _HEAD_TABLE not in first:
        del names[HEAD]
    expected = {key for key, _ in names.values()}
    for file, held in files.items():
        if wrong := sorted(held.keys() ^ expected):
            said = "not one of a plain Llama" if wrong[0] in held else "missing"
            more = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
            raise CheckpointError(f"{folder / file}: {wrong[0][:80]!r} is {said}{more}; get the complete model")
    vocab_size = first[_HEAD_TABLE].shape[0] * len(files) if HEAD in names else rows * (len(files) if by_rows else 1)
    if params.vocab_size not in (None, vocab_size):
        raise CheckpointError(
            f"{folder}: {len(files)} files hold a vocabulary of {vocab_size}, {PARAMS} says {params.vocab_size}; files "
            "are missing, or of another model"
        )
    ffn, said_ffn = (
        first[_GATE].shape[0] * len(files),
        ffn_size(params.dim, params.multiple_of, params.ffn_dim_multiplier),
    )
    if ffn != said_ffn:
        raise CheckpointError(
            f"{folder}: {len(files)} files hold an FFN of {ffn}, {PARAMS} leads to {said_ffn}; files are missing, "
            "or of another model"
        )
    return names, vocab_size, ffn


def _names(layers: int, embedding_by_rows: bool) -> dict[str, tuple[str, Split]]:
    """HF name -> key in Meta's files, and how it is cut."""
    names: dict[str, tuple[str, Split]] = {EMBEDDING: (_TABLE, "rows" if embedding_by_rows else "columns")}
    for layer in range(layers):
        for name, (key, split) in _INSIDE.items():
            names[f"model.layers.{layer}.{name}"] = f"layers.{layer}.{key}", split
    return names | {FINAL_NORM: ("norm.weight", "copy"), HEAD: (_HEAD_TABLE, "rows")}


def _parts(key: str, split: Split, shape: tuple[int, ...], files: Mapping[str, File]) -> list[Stored]:
    """A tensor in each of the files, in the shape that the model's has there, and of one dtype."""
    expected = _part_shape(key, split, shape, len(files))
    held = [file[key] for file in files.values()]
    for stored in held:
        if stored.shape != expected or stored.dtype != held[0].dtype:
            raise CheckpointError(
                f"{stored.path}: {key} is {stored.shape}, {stored.dtype}, expected {expected}, {held[0].dtype} in one "
                f"of {len(files)} files; files are missing, or of another model"
            )
    return held


def _part_shape(key: str, split: Split, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Shape of a tensor in one of `count` files."""
    if split == "copy":
        return shape
    axis = 0 if split == "rows" else 1
    if shape[axis] % count:
        raise CheckpointError(
            f"{key}: {shape[axis]} {split} cannot lie in {count} files, which have to hold the same; to read, give all "
            "files of a model; to write, another --tp"
        )
    return *shape[:axis], shape[axis] // count, *shape[axis + 1 :]


def _placed(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    split: Split,
    llama: LlamaShape,
    offsets: Sequence[tuple[str, int]],
) -> tuple[Placed, tuple[Placed, ...]]:
    """Where an HF tensor lies that begins at (file, offset) in each file, and its copies."""
    rows, columns = (*shape, 1)[:2]
    count = len(offsets)
    boxes = []
    for rank, (file, offset) in enumerate(offsets):
        if split == "rows":
            boxes.append(Box(file, offset, rank * (rows // count), rows // count, 0, columns))
        elif split == "columns":
            boxes.append(Box(file, offset, 0, rows, rank * (columns // count), columns // count))
        else:
            boxes.append(Box(file, offset, 0, rows, 0, columns))
    lines = [Rows(0, 0, rows)]
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        head, half = llama.head_dim, llama.head_dim // 2
        lines = [Rows(first + side * half, first + side, half, 2) for first in range(0, rows, head) for side in (0, 1)]
    if split != "copy":
        return place(shape, dtype, lines, boxes), ()
    whole, *copies = [place(shape, dtype, lines, [box]) for box in boxes]
    return whole, tuple(copies)


def _told(
    folder: Path, hints: Hints | None, manifest: Mapping[str, Any], vocab_size: int
) -> tuple[str, LlamaShape | None]:
    """Who tells the architecture, and what it is; None where nobody does."""
    hints = hints or Hints()
    if hints.config is not None:
        path = hints.config
        shape, size = told_by_config(path)
    elif manifest:
        path = folder / MANIFEST
        shape, size = check_supported(manifest["shape"], str(path)), manifest["vocab_size"]
    else:
        return "", None
    if size != vocab_size:
        raise CheckpointError(f"{path}: it says a vocabulary of {size}, the files of {folder} have {vocab_size} rows")
    return str(path), shape


def _is_tied(folder: Path, tensors: Mapping[str, Placed], told: LlamaShape | None, where: str) -> bool:
    """Whether the head is the embedding; that of files may be left out, or stored as a copy."""
    if told is not None and not told.tied_embeddings:
        if HEAD not in tensors:
            raise CheckpointError(f"{folder}: {_HEAD_TABLE} is missing, and {where} does not tie the head")
        return False
    same = HEAD not in tensors or tensors[HEAD] == tensors[EMBEDDING]
    same = same or same_rows(folder, tensors[EMBEDDING], tensors[HEAD])
    if told is not None and not same:
        raise CheckpointError(f"{where}: it ties the head to the embedding, yet {_HEAD_TABLE} of {folder} differs")
    return same


def lay_out_meta(source: StoredModel, dtypes: Mapping[str, torch.dtype], target: Target) -> NewLayout:
    """Lay out the weights of a model for `target.tp` model-parallel ranks.

    Args:
        source: the model.
        dtypes: of each weight as it is written.
        target: how many files.

    Raises:
        CheckpointError: params.json cannot describe the model, or it cannot be cut into so many files.
    """
    llama, count = source.llama, target.tp
    check_statable(llama, str(source.folder))
    params = params_of(llama, source.vocab_size)
    if count < 1 or llama.num_attention_heads % count or llama.num_query_groups % count:
        raise CheckpointError(
            f"{source.folder}: {llama.num_attention_heads} heads and {llama.num_query_groups} key-value heads cannot "
            f"lie in {count} files, which have to hold the same whole heads; choose a divisor of both"
        )
    names = _names(llama.num_layers, embedding_split_by_rows(llama, source.vocab_size))
    shapes = hf_shapes(llama, source.vocab_size)
    _part_shape(_HEAD_TABLE, "rows", shapes[EMBEDDING], count)
    held: dict[str, Array] = {}
    for name, shape in shapes.items():
        key, split = names[name]
        held[key] = hole(_part_shape(key, split, shape, count), dtypes[name])
    if llama.tied_embeddings:
        held[_HEAD_TABLE] = held[_TABLE]  # one tensor under two names; Meta's code asks for both
    size, parts, offsets = lay_out_archive(held)
    files = tuple(NewFile(f"consolidated.{rank:02d}.pth", size, tuple(parts)) for rank in range(count))
    tensors, copies = {}, {}
    for (name, shape), offset in zip(shapes.items(), offsets, strict=True):
        places = [(file.name, offset) for file in files]
        tensors[name], copies[name] = _placed(name, shape, dtypes[name], names[name][1], llama, places)
    finish = partial(_finish, params=params)
    return NewLayout(files, tensors, finish, copies={name: each for name, each in copies.items() if each})


def _finish(folder: Path, params: Mapping[str, Any]) -> None:
    """Write params.json, without which nothing can be loaded."""
    write_json_atomic(folder / PARAMS, params)
