"""`.metadata` of a `torch_dist` checkpoint: read without running anything, checked against the files; and written.

The file is a pickle. Here every class it may name becomes a stand-in that only keeps what the pickle says (see
`unpickler`); any other name is refused. Nothing of torch or of the checkpoint is executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.cover import check_cover
from megatron_cpt.checkpoint.files import file_inside, read_whole
from megatron_cpt.checkpoint.reader import num_bytes
from megatron_cpt.checkpoint.stand_ins import Named, NamedPickler, StandIn, named
from megatron_cpt.checkpoint.unpickler import DTYPES, MAX_DIMENSIONS, SIZE, Unpickler, numbers
from megatron_cpt.errors import CheckpointError

METADATA = ".metadata"
MAX_INDEX_BYTES = 256 << 20  # of a million chunks
_RECORD_MODULES = tuple(f"torch.distributed.checkpoint.{part}" for part in ("metadata", "filesystem", "planner"))
_NAMES = {
    SIZE.stands_for,
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    ("pathlib", "Path"),
    ("builtins", "slice"),
}


@dataclass(frozen=True)
class Chunk:
    """A box of a stored tensor and the bytes of the file that hold it (one torch.save archive)."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, in chunks of any shape."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StoredObject:
    """Anything else of the checkpoint that is not a tensor, and the bytes of the file that hold it."""

    file: str
    start: int
    length: int


class _Unpickler(Unpickler):
    """Reads an index: all that it may name are torch's records, dtypes and sizes."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _NAMES or (module == "torch" and name in DTYPES)
        if not known and module not in _RECORD_MODULES:
            raise ValueError(f"it names {module}.{name}, which a checkpoint's index has no use for")
        return super().find_class(module, name)


def read_metadata(folder: Path, wanted: Any) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint whose key satisfies `wanted`, checked against the files.

    Args:
        folder: the checkpoint folder.
        wanted: called with a key; tensors it refuses are skipped unread.

    Raises:
        CheckpointError: the index is damaged or hostile, names a file that is missing, too short or
            outside the folder, or its chunks overlap or leave something out.
    """
    return read_index(folder, wanted)[0]


def read_index(folder: Path, wanted: Any) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """The tensors and the other objects of a checkpoint whose key satisfies `wanted`; see `read_metadata`."""
    path, data = folder / METADATA, read_whole(folder, METADATA, MAX_INDEX_BYTES)
    try:
        tensors, objects = _parse(_Unpickler(data).load(), wanted)
    except Exception as caught:  # a damaged pickle can fail in any way
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint's index: {str(caught) or 'it is cut short'}; do not use this file"
        ) from None
    sizes: dict[str, int] = {}
    for key, tensor in tensors.items():
        check_chunks(key, tensor.size, tensor.chunks)
        for chunk in tensor.chunks:
            if chunk.file not in sizes:
                sizes[chunk.file] = file_inside(folder, chunk.file).stat().st_size
            if chunk.start + chunk.length > sizes[chunk.file] or num_bytes(chunk.size, tensor.dtype) > chunk.length:
                raise CheckpointError(
                    f"{folder}: {key} should take {num_bytes(chunk.size, tensor.dtype)} bytes from {chunk.start} to "
                    f"{chunk.start + chunk.length} of {chunk.file}, which has {sizes[chunk.file]}; it was cut short"
                )
    _check_bytes(folder, tensors)
    return tensors, objects


def write_index(folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> None:
    """Write `.metadata`, as torch and megatron-core read it, and bring it to disk; the files are there already."""
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, tensor in tensors.items():
        boxes = []
        for number, chunk in enumerate(tensor.chunks):
            index = _record("MetadataIndex", fqn=key, offset=torch.Size(chunk.offset), index=number)
            places[index] = _place(chunk.file, chunk.start, chunk.length)
            boxes.append(
                _record("ChunkStorageMetadata", offsets=torch.Size(chunk.offset), sizes=torch.Size(chunk.size))
            )
        described[key] = _record(
            "TensorStorageMetadata", properties=_properties(tensor.dtype), size=torch.Size(tensor.size), chunks=boxes
        )
    for key, held in objects.items():
        described[key] = _record("BytesStorageMetadata")
        places[_record("MetadataIndex", fqn=key, index=None)] = _place(held.file, held.start, held.length)
    root = _record("Metadata", state_dict_metadata=described, planner_data=None, storage_data=places, storage_meta=None)
    with open(folder / METADATA, "wb") as file:
        NamedPickler(file, protocol=4).dump(root)
        file.flush()
        os.fsync(file.fileno())


def _record(name: str, **fields: Any) -> StandIn:
    """What pickles as an object of torch.distributed.checkpoint.metadata, a package that takes a second to import.

    A field that not every version of torch since 2.6 knows is left out: it then has the default of its class.
    """
    return _made("metadata", name, fields)


def _place(file: str, start: int, length: int) -> StandIn:
    return _made("filesystem", "_StorageInfo", {"relative_path": file, "offset": start, "length": length})


def _properties(dtype: torch.dtype) -> StandIn:
    """Dtype, layout, requires_grad, memory format (0: torch.contiguous_format) and pin_memory."""
    encoding = _class_of("metadata", "_MEM_FORMAT_ENCODING")
    return _made("metadata", "TensorProperties", (dtype, torch.strided, False, encoding(0), False))


@cache
def _class_of(module: str, name: str) -> Named:
    return named(f"torch.distributed.checkpoint.{module}", name)


def _made(module: str, name: str, state: Any) -> StandIn:
    kind: Any = _class_of(module, name)
    made: StandIn = kind.__new__(kind)
    made.states = (state,)
    return made


def check_chunks(key: str, size: Sequence[int], chunks: Sequence[Chunk]) -> None:
    """Raise CheckpointError unless the chunks hold every element of a tensor of `size` exactly once."""
    check_cover(key, size, [(chunk.offset, chunk.size) for chunk in chunks], [chunk.file for chunk in chunks])


def _parse(root: Any, wanted: Any) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredObject] = {}
    places: dict[tuple[str, Any], tuple[str, int, int]] = {}
    for index, place in _field(root, "Metadata", "storage_data").items():
        fields = _state(place, "_StorageInfo")
        if fields.get("transform_descriptors"):
            raise ValueError("chunks are compressed, which is not supported")
        start, length = _numbers((fields["offset"], fields["length"]))
        key = _state(index, "MetadataIndex")
        places[key["fqn"], key.get("offset")] = str(fields["relative_path"]), start, length
    for key, described in _field(root, "Metadata", "state_dict_metadata").items():
        if not isinstance(key, str) or not wanted(key):
            continue
        if isinstance(described, StandIn) and _kind(described) == "BytesStorageMetadata":
            if (key, None) in places:
                objects[key] = StoredObject(*places[key, None])
            continue
        fields = _state(described, "TensorStorageMetadata")
        dtype = _state(fields["properties"], "TensorProperties", tuple)[0]
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key} has no dtype")
        shape, chunks = _numbers(fields["size"]), []
        for chunk in fields["chunks"]:
            box = _state(chunk, "ChunkStorageMetadata")
            offset, size = _numbers(box["offsets"]), _numbers(box["sizes"])
            if not len(offset) == len(size) == len(shape):
                raise ValueError(f"{key} of {shape} has a chunk at {offset} of {size}")
            if (key, offset) not in places:
                raise ValueError(f"{key}: no file holds the chunk at {offset}")
            chunks.append(Chunk(offset, size, *places[key, offset]))
        tensors[key] = StoredTensor(dtype, shape, tuple(chunks))
    return tensors, objects


def _kind(record: StandIn) -> str:
    return type(record).stands_for[1]


def _state(record: Any, kind: str, state: type = dict) -> Any:
    if not isinstance(record, StandIn) or _kind(record) != kind:
        got = _kind(record) if isinstance(record, StandIn) else type(record).__name__
        raise ValueError(f"got {got}, expected {kind}")
    if not record.states or not isinstance(record.states[0], state):
        raise ValueError(f"{kind} has no state")
    return record.states[0]


def _field(record: Any, kind: str, name: str) -> dict[Any, Any]:
    value = _state(record, kind).get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{kind}.{name} is {type(value).__name__}, expected a dict")
    return value


def _numbers(values: Any) -> tuple[int, ...]:
    return numbers(values, "a size or a place", MAX_DIMENSIONS)


def _check_bytes(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Two chunks never share bytes of a file."""
    taken = sorted((chunk.file, chunk.start, chunk.length, key) for key, t in tensors.items() for chunk in t.chunks)
    for (file, start, length, key), (next_file, next_start, _, next_key) in zip(taken, taken[1:], strict=False):
        if file == next_file and start + length > next_start:
            raise CheckpointError(
                f"{folder}: {key} and {next_key} overlap at byte {next_start} of {file}; it is damaged"
            )
