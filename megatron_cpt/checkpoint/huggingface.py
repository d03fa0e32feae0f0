"""Hugging Face folders: a checked safetensors reader and a streamed writer.

Deviates: safetensors' own library reads into memory maps and trusts the index; here every name,
size and offset of every header is checked against the file before anything is allocated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.files import PARTIAL, file_inside, read_tensor, require_space, write_at
from megatron_cpt.checkpoint.hf_config import CONFIG, parse_hf_config
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD, hf_shapes
from megatron_cpt.checkpoint.reader import WeightsDigest, num_bytes
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_SHARD_BYTES = 5_000_000_000

Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor | Iterable[Tensor]]]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def open_hf(folder: str | Path) -> HFReader:
    """Open a Hugging Face folder of a Llama in safetensors; only headers are read.

    Raises:
        CheckpointError: not a plain Llama, a damaged or hostile file, or tensors that do not match
            the config one by one.
    """
    return HFReader(Path(folder))


class HFReader:
    """The tensors of a Hugging Face folder by name (a `ModelReader`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(file_inside(folder, CONFIG), CheckpointError)
        self.llama, self.vocab_size = parse_hf_config(self.config, str(folder / CONFIG))
        # By file, what it holds: also copies and constants that are no tensors of the model.
        self.files = _index(folder)
        self._tensors = {name: stored for held in self.files.values() for name, stored in held.items()}
        self._match_config()

    def _match_config(self) -> None:
        expected = hf_shapes(self.llama, self.vocab_size)
        for name in list(self._tensors):
            if name.endswith(".rotary_emb.inv_freq"):  # a constant that old exports carry
                del self._tensors[name]
        if self.llama.tied_embeddings and HEAD in self._tensors and EMBEDDING in self._tensors:
            self._drop_tied_copy()
        missing, extra = sorted(expected.keys() - self._tensors.keys()), sorted(self._tensors.keys() - expected.keys())
        if missing or extra:
            raise CheckpointError(
                f"{self.folder}: the tensors do not match config.json; missing {_some(missing)}, not expected "
                f"{_some(extra)}; get the complete model, of a plain Llama"
            )
        for name, shape in expected.items():
            if self._tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {self._tensors[name].shape}, config.json says {shape}; "
                    "the weights and the config are of two models"
                )

    def _drop_tied_copy(self) -> None:
        """A tied model may carry its head a second time; it must be the same."""
        table, copy = self._tensors[EMBEDDING], self._tensors[HEAD]
        if table.shape != copy.shape or not torch.equal(self.read(EMBEDDING), self.read(HEAD)):
            raise CheckpointError(
                f"{self.folder}: config.json ties the embeddings, yet {HEAD} differs from {EMBEDDING}; "
                "set tie_word_embeddings to false if the model has its own head"
            )
        del self._tensors[HEAD]

    def names(self) -> list[str]:
        """Names of all tensors, in the order of a forward pass."""
        return list(hf_shapes(self.llama, self.vocab_size))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._stored(name).dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        stored = self._stored(name)
        return read_tensor(stored.path, stored.offset, stored.shape, stored.dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; nothing else is read."""
        stored = self._stored(name)
        if not 0 <= start <= stop <= stored.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {stored.shape[0]}")
        row = stored.shape[1:]
        return read_tensor(
            stored.path, stored.offset + start * num_bytes(row, stored.dtype), (stop - start, *row), stored.dtype
        )

    def _stored(self, name: str) -> Stored:
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}")
        return self._tensors[name]


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _index(folder: Path) -> dict[str, dict[str, Stored]]:
    """File -> name -> place of every tensor of the folder, headers checked."""
    if (folder / INDEX).exists():
        index = read_json(file_inside(folder, INDEX), CheckpointError)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: expected an object weight_map of tensor names to file names")
    elif (folder / WEIGHTS).exists():
        weight_map = None
    else:
        raise CheckpointError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read, "
            "save the model as safetensors first"
        )
    tensors: set[str] = set()
    held: dict[str, dict[str, Stored]] = {}
    files = sorted(set(weight_map.values())) if weight_map is not None else [WEIGHTS]
    for file, path in [(file, file_inside(folder, file)) for file in files]:  # all names are checked first
        held[file] = _read_header(path)
        for name in held[file]:
            if name in tensors or (weight_map is not None and weight_map.get(name) != file):
                raise CheckpointError(
                    f"{folder}: {name} lies in {file} but not, or not only, by {INDEX}; the files are mixed up"
                )
            tensors.add(name)
    lost = sorted(set(weight_map or ()) - tensors)
    if lost:
        raise CheckpointError(f"{folder}: {INDEX} names {_some(lost)}, which no file holds; copy the model again")
    return held


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
        raise ValueError(f"dtype {kind!r}, expected one of {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("sizes and offsets must be integers of 0 or more")
    if end - begin != num_bytes(tuple(shape), DTYPES[kind]):
        raise ValueError(f"{end - begin} bytes for shape {shape} in {kind}")
    return Stored(path, data_start + begin, tuple(shape), DTYPES[kind])


def write_hf(
    folder: str | Path,
    entries: Iterable[Entry],
    config: dict[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write weights, config.json and generation_config.json of a Hugging Face model, tensor by tensor.

    Files are written under temporary names and renamed once all are complete; the index and then
    config.json come last, so an unfinished folder cannot be loaded.

    Args:
        folder: destination; may exist (with tokenizer files, say) but must not hold a model.
        entries: (name, shape, dtype, thunk) in the order of writing. The thunk is called when the
            tensor's turn comes and returns it, or an iterable of its row blocks in order.
        config: content of config.json.
        max_shard_bytes: largest weights file; a single tensor may exceed it.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        {"files": number of weight files, "bytes": bytes of weights, "weights_sha256": digest}.

    Raises:
        CheckpointError: the folder holds a model, the disk is too small, a name appears twice, or a
            thunk returns another shape or dtype than it announced.
    """
    folder, entries = Path(folder), list(entries)
    shards = _plan_shards(folder, entries, max_shard_bytes)
    total = sum(num_bytes(shape, dtype) for _, shape, dtype, _ in entries)
    require_space(folder, total)
    folder.mkdir(parents=True, exist_ok=True)
    digest, done, weight_map = WeightsDigest(), 0, {}
    names = (
        [WEIGHTS]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    try:
        for file_name, shard in zip(names, shards, strict=True):
            for name, written in write_shard(folder / (file_name + PARTIAL), shard, digest):
                done += written
                weight_map[name] = file_name
                if on_progress is not None:
                    on_progress(done, total)
        for file_name in names:
            os.replace(folder / (file_name + PARTIAL), folder / file_name)
    finally:
        for file_name in names:
            (folder / (file_name + PARTIAL)).unlink(missing_ok=True)
    if len(shards) > 1:
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    ends = {key: config.get(key) for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    write_json_atomic(folder / "generation_config.json", {"_from_model_config": True, **ends})
    write_json_atomic(folder / CONFIG, config)
    return {"files": len(shards), "bytes": total, "weights_sha256": digest.hexdigest()}


def _plan_shards(folder: Path, entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, cut into files of at most `max_shard_bytes`."""
    held = [path.name for path in folder.glob("*") if path.name == CONFIG or path.suffix == ".safetensors"]
    if held:
        raise CheckpointError(
            f"{folder} already holds a model ({held[0]}); choose another destination or remove it first"
        )
    if not entries or len({entry[0] for entry in entries}) != len(entries):
        raise CheckpointError(f"{folder}: nothing to write, or a tensor's name appears twice")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = num_bytes(entry[1], entry[2])
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def write_shard(path: Path, shard: list[Entry], digest: WeightsDigest) -> Iterator[tuple[str, int]]:
    """Write one safetensors file, each block hashed as it is written; yields (name, bytes) after each tensor."""
    kinds = {torch.int64: "I64", **{dtype: kind for kind, dtype in DTYPES.items()}}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype, _ in shard:
        end = position + num_bytes(shape, dtype)
        header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape, dtype, thunk in shard:
            made = thunk()
            written = 0
            for block in [made] if isinstance(made, Tensor) else made:
                if block.dtype != dtype or tuple(block.shape[1:]) != tuple(shape[1:]):
                    raise CheckpointError(
                        f"{name}: got {tuple(block.shape)} {block.dtype}, announced {tuple(shape)} {dtype}"
                    )
                hashed = beside.submit(digest.update, name, dtype, shape, block)
                written += write_at(file, block)
                hashed.result()  # before the next block: they come in order, and one is in memory at a time
            if written != num_bytes(shape, dtype):
                raise CheckpointError(f"{name}: got {written} bytes, announced {num_bytes(shape, dtype)}")
            yield name, written
        os.fsync(file.fileno())
