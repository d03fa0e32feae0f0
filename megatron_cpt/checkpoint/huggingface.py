"""Hugging Face folders of a Llama: safetensors, or the older pickled `.bin` files, read; safetensors laid out.

Deviates: safetensors' own library reads into memory maps and trusts the index; here every name,
size and offset of every header is checked against the file before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_cpt.checkpoint.archive import read_archive
from megatron_cpt.checkpoint.archive_pickle import Array, dense_strides
from megatron_cpt.checkpoint.files import brief, file_inside, json_inside
from megatron_cpt.checkpoint.hf_config import CONFIG, DECIDED_FIELDS, parse_hf_config
from megatron_cpt.checkpoint.layout import NewFile, NewLayout
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD, hf_shapes
from megatron_cpt.checkpoint.manifest import own_manifest
from megatron_cpt.checkpoint.reader import num_bytes
from megatron_cpt.checkpoint.runs import Placed, Run, StoredModel
from megatron_cpt.checkpoint.unpickler import MAX_DIMENSIONS, numbers
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.errors import CheckpointError

WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
BIN_WEIGHTS = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_SHARD_BYTES = 5_000_000_000
_KINDS = {torch.int64: "I64", **{dtype: kind for kind, dtype in DTYPES.items()}}
_ALIGNMENT = 4096  # of the data in what is laid out here: tensors of whole pages begin at one
_T = TypeVar("_T")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_hf(folder: str | Path) -> StoredModel:
    """Open a Hugging Face folder of a Llama; only headers are read.

    Raises:
        CheckpointError: not a plain Llama, a damaged or hostile file, or tensors that do not match
            the config one by one.
    """
    folder = Path(folder)
    config: dict[str, Any] = read_json(json_inside(folder, CONFIG), CheckpointError)
    llama, vocab_size = parse_hf_config(config, str(folder / CONFIG))
    held = {name: stored for file in stored_files(folder).values() for name, stored in file.items()}
    # A constant that old exports carry, and a tied model's head, which may stand there a second time.
    held = {name: stored for name, stored in held.items() if not name.endswith(".rotary_emb.inv_freq")}
    copy = held.pop(HEAD, None) if llama.tied_embeddings and EMBEDDING in held else None
    expected = hf_shapes(llama, vocab_size)
    missing, extra = sorted(expected.keys() - held.keys()), sorted(held.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder}: the tensors do not match config.json; missing {_some(missing)}, not expected "
            f"{_some(extra)}; get the complete model, of a plain Llama"
        )
    for name, shape in expected.items():
        if held[name].shape != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {held[name].shape}, config.json says {shape}; "
                "the weights and the config are of two models"
            )
    tensors = {name: _placed(held[name]) for name in expected}
    if copy is not None and (copy.shape, copy.dtype) != (tensors[EMBEDDING].shape, tensors[EMBEDDING].dtype):
        raise CheckpointError(
            f"{folder}: config.json ties the embeddings, yet {HEAD} is {copy.shape}, {copy.dtype} and {EMBEDDING} is "
            f"{tensors[EMBEDDING].shape}, {tensors[EMBEDDING].dtype}; set tie_word_embeddings to false if the model "
            "has its own head"
        )
    # Compared when the rows are read.
    copies: dict[str, tuple[Placed, ...]] = {} if copy is None else {EMBEDDING: (_placed(copy),)}
    stated = own_manifest(folder)
    stated |= {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    stated["huggingface"] = _other_settings(folder, config)
    return StoredModel(folder, "hf", llama, vocab_size, vocab_size, tensors, copies=copies, stated=stated)


def _other_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json and generation_config.json say beside the architecture, to be said again by an export."""
    path = folder / GENERATION
    generation = read_json(json_inside(folder, GENERATION), CheckpointError) if path.exists() else None
    other = {key: value for key, value in config.items() if key not in DECIDED_FIELDS}
    return {"config": other, "generation_config": generation if isinstance(generation, dict) else None}


def _placed(stored: Stored) -> Placed:
    """One run of rows."""
    columns = stored.shape[1] if len(stored.shape) == 2 else 1
    pitch = columns * stored.dtype.itemsize
    rows = stored.shape[0] if stored.shape else 1
    return Placed(stored.shape, stored.dtype, (Run(stored.path.name, stored.offset, pitch, 0, rows, 0, columns),))


def lay_out_hf(
    source: StoredModel,
    dtypes: Mapping[str, torch.dtype],
    config: dict[str, Any],
    generation: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> NewLayout:
    """Lay out the weights of a model as safetensors.

    Args:
        source: the model.
        dtypes: of each weight as it is written.
        config: content of config.json.
        generation: content of generation_config.json; None: the ends of a text alone.
        max_shard_bytes: largest weights file; a single tensor may exceed it.
    """
    entries = [(name, source.shape(name), dtypes[name]) for name in source.names()]
    sizes = [num_bytes(shape, dtype) for _, shape, dtype in entries]
    shards = split_into_shards(entries, sizes, max_shard_bytes)
    files, tensors, weight_map = [], {}, {}
    for file, shard in zip(shard_names(len(shards)), shards, strict=True):
        raw, offsets = shard_header(shard, _ALIGNMENT)
        for (name, shape, dtype), offset in zip(shard, offsets, strict=True):
            tensors[name] = _placed(Stored(Path(file), offset, shape, dtype))
            weight_map[name] = file
        size = offsets[-1] + num_bytes(*shard[-1][1:])
        files.append(NewFile(file, size, ((0, raw),)))
    index = weight_map if len(shards) > 1 else None
    finish = partial(write_descriptions, config=config, weight_map=index, total=sum(sizes), generation=generation)
    return NewLayout(tuple(files), tensors, finish)


def write_descriptions(
    folder: Path,
    config: dict[str, Any],
    weight_map: Mapping[str, str] | None,
    total: int,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write the index of several weight files, generation_config.json and, last, config.json."""
    if weight_map is not None:
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    ends = {key: config.get(key) for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    write_json_atomic(folder / GENERATION, {**(generation or {"_from_model_config": True}), **ends})
    write_json_atomic(folder / CONFIG, config)


def shard_names(count: int) -> list[str]:
    """Names of weight files."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def split_into_shards(entries: Sequence[_T], sizes: Sequence[int], max_bytes: int) -> list[list[_T]]:
    """Entries in their order, cut into lists of at most `max_bytes`; a single entry may exceed it."""
    shards: list[list[_T]] = [[]]
    filled = 0
    for entry, size in zip(entries, sizes, strict=True):
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def shard_header(
    shard: Sequence[tuple[str, tuple[int, ...], torch.dtype]], alignment: int = 8
) -> tuple[bytes, list[int]]:
    """The bytes before the data of a safetensors file, and where in the file each tensor begins.

    They are those of the safetensors library at its alignment, 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, begins = 0, []
    for name, shape, dtype in shard:
        begins.append(position)
        end = position + num_bytes(shape, dtype)
        header[name] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % alignment)
    raw = len(raw).to_bytes(8, "little") + raw
    return raw, [len(raw) + begin for begin in begins]


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def stored_files(folder: Path) -> dict[str, dict[str, Stored]]:
    """File -> name -> place of every tensor of the folder, headers checked; copies and constants among them."""
    weights, index, read = _kind_of_weights(folder)
    weight_map = None
    if (folder / index).exists():
        stated = read_json(json_inside(folder, index), CheckpointError)
        weight_map = stated.get("weight_map") if isinstance(stated, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / index}: expected an object weight_map of tensor names to file names")
    tensors: set[str] = set()
    held: dict[str, dict[str, Stored]] = {}
    files = sorted(set(weight_map.values())) if weight_map is not None else [weights]
    if files != [weights] and (folder / weights).exists():
        raise CheckpointError(
            f"{folder} holds {weights} beside {index}, which names other files; transformers loads the former "
            f"alone, so it is unclear which model this is: remove {weights}, or {index} and the files that it names"
        )
    for file, path in [(file, file_inside(folder, file)) for file in files]:  # all names are checked first
        held[file] = read(path)
        for name in held[file]:
            if name in tensors or (weight_map is not None and weight_map.get(name) != file):
                raise CheckpointError(
                    f"{folder}: {name} lies in {file} but not, or not only, by {index}; the files are mixed up"
                )
            tensors.add(name)
    lost = sorted(set(weight_map or ()) - tensors)
    if lost:
        raise CheckpointError(f"{folder}: {index} names {_some(lost)}, which no file holds; copy the model again")
    return held


def _kind_of_weights(folder: Path) -> tuple[str, str, Callable[[Path], dict[str, Stored]]]:
    """Names of the weights' file and index, and what reads a file: of the kind that the folder holds."""
    kinds = [(WEIGHTS, INDEX, _read_header), (BIN_WEIGHTS, BIN_INDEX, _read_bin)]
    for weights, index, read in kinds:
        if (folder / weights).exists() or (folder / index).exists():
            return weights, index, read
    names = [name for weights, index, _ in kinds for name in (weights, index)]
    raise CheckpointError(f"{folder} holds none of {', '.join(names)}; get the complete model")


def _read_bin(path: Path) -> dict[str, Stored]:
    """The tensors of one torch.save file, none of it run or read but the pickle."""
    value = read_archive(path)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a dict of tensors by name")
    return {name: dense(array, f"{path}: {name}", path) for name, array in value.items()}


def dense(array: Any, where: str, path: Path) -> Stored:
    """A tensor of an archive that lies row by row; raises CheckpointError for any other."""
    if not isinstance(array, Array):
        raise CheckpointError(f"{where} is {type(array).__name__}, expected a tensor")
    expected = dense_strides(array.shape)
    if any(size > 1 and a != b for size, a, b in zip(array.shape, array.strides, expected, strict=True)):
        raise CheckpointError(f"{where} is stored with strides {array.strides}; save it again as .contiguous()")
    if array.dtype not in DTYPES.values():
        raise CheckpointError(f"{where} is {array.dtype}, expected {', '.join(map(str, DTYPES.values()))}")
    return Stored(path, array.offset, array.shape, array.dtype)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name appears twice")
    return dict(pairs)


def _read_header(path: Path) -> dict[str, Stored]:
    """The header of one safetensors file: offsets must cover the data exactly, without overlap."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: a header of {length} bytes in a file of {size}; cut short or not safetensors"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(entry, 8 + length, path) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as caught:
        raise CheckpointError(f"{path}: the header is not safetensors' ({caught!r}); the file is damaged") from None
    position = 8 + length
    for name, stored in sorted(
        entries.items(), key=lambda item: (item[1].offset, num_bytes(item[1].shape, item[1].dtype))
    ):
        if stored.offset != position:
            raise CheckpointError(f"{path}: {name} begins at byte {stored.offset}, expected {position}; overlap or gap")
        position += num_bytes(stored.shape, stored.dtype)
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes, the file has {size}; it was cut short or extended"
        )
    return entries


def _parse_entry(entry: dict[str, Any], data_start: int, path: Path) -> Stored:
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    begin, end = offsets
    if kind not in DTYPES:
        raise ValueError(f"dtype {brief(kind)}, expected one of {', '.join(DTYPES)}")
    shape = numbers(tuple(shape), "a shape", MAX_DIMENSIONS)
    begin, end = numbers((begin, end), "a place")
    if end - begin != num_bytes(shape, DTYPES[kind]):
        raise ValueError(f"{end - begin} bytes for shape {shape} in {kind}")
    return Stored(path, data_start + begin, shape, DTYPES[kind])
