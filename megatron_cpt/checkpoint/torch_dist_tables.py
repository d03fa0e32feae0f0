"""The vocabulary tables of a `torch_dist` folder, those of its optimizer included.

The new tables go to a data file of their own. The files that the rest lies in keep their bytes, old tables among
them: nothing refers to those any more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_cpt.checkpoint.chunks import MAX_CHUNK_BYTES, BoxReader, DataFiles
from megatron_cpt.checkpoint.execute import Tally
from megatron_cpt.checkpoint.files import file_inside, require_space
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD, STORED_EMBEDDING, STORED_HEAD
from megatron_cpt.checkpoint.metadata import Chunk, StoredTensor, read_index, write_index
from megatron_cpt.checkpoint.reader import WeightsDigest, num_bytes, read_blocks, row_blocks
from megatron_cpt.checkpoint.tables import Matrix, NewTable, Progress, Rows, Table, carry, filled
from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.errors import CheckpointError

_MATRICES: dict[str, tuple[Matrix, str]] = {STORED_EMBEDDING: ("embedding", EMBEDDING), STORED_HEAD: ("head", HEAD)}
_OF_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(.*)", re.DOTALL)
_STATE = re.compile(r"state\.([A-Za-z0-9_]+)\.(.+)")  # fully reshardable: one tensor for each parameter and state
_MASTER = "param"


class TorchDistTables:
    """A `torch_dist` folder as its tables and the rest (a `VocabTables`).

    Args:
        folder: the checkpoint, with its manifest.
        with_optimizer: False: the state of the optimizer is left behind.

    Raises:
        CheckpointError: damaged, hostile, or an optimizer's state that is not stored by parameter.
    """

    format = "torch_dist"
    tensor_parallel = 1

    def __init__(self, folder: Path, with_optimizer: bool = True) -> None:
        self.folder = folder
        self.reader = open_torch_dist(folder)
        self.tied = self.reader.llama.tied_embeddings
        self.vocab_size: int | None = self.reader.vocab_size
        self.divisor = int(self.reader.stated.get("vocab_divisor", 128))
        tensors, self._objects = read_index(folder, lambda key: with_optimizer or not _OF_OPTIMIZER.fullmatch(key))
        self._tensors: dict[str, StoredTensor] = tensors
        self.has_optimizer = any(_OF_OPTIMIZER.fullmatch(key) for key in self._tensors)
        self.tables = tuple(table for key in self._tensors if (table := self._table(key)) is not None)
        self._boxes = BoxReader(folder)

    def _table(self, key: str) -> Table | None:
        stored = self._tensors[key]
        if key in _MATRICES:
            return Table(key, _MATRICES[key][0], False, stored.size[0], stored.size[1], stored.dtype)
        of_optimizer = _OF_OPTIMIZER.fullmatch(key)
        if of_optimizer is None:
            return None
        state = _STATE.fullmatch(of_optimizer[1])
        if state is None:
            raise CheckpointError(
                f"{self.folder}: the optimizer's state {key} is not stored by parameter (fully_reshardable), so its "
                "rows cannot follow the vocabulary; leave it behind with --no-optimizer, or save it in that form"
            )
        name = state[2]
        if name not in _MATRICES:
            return None
        if stored.size != self._tensors[name].size:
            raise CheckpointError(
                f"{self.folder}: {key} has shape {stored.size}, {name} has {self._tensors[name].size}"
            )
        is_master = state[1] == _MASTER
        masters_of = name if is_master else None
        rows, width = stored.size
        return Table(key, _MATRICES[name][0], not is_master, rows, width, stored.dtype, masters_of)

    def read(self, table: Table) -> Tensor:
        """A whole table."""
        stored = self._tensors[table.name]
        return self._boxes.read(stored, (0, 0), stored.size)

    def rewrite(self, folder: Path, new: Mapping[str, NewTable], on_progress: Progress | None = None) -> dict[str, Any]:
        """Write all but the manifest; `proof.safetensors` holds logits of the old vocabulary and is left out."""
        old, reader = self._tensors, self.reader
        rest = {key: tensor for key, tensor in old.items() if key not in new}
        held = sorted({chunk.file for tensor in rest.values() for chunk in tensor.chunks})
        held = sorted({*held, *(place.file for place in self._objects.values())})
        sizes = {key: num_bytes((table.num_rows, old[key].size[1]), old[key].dtype) for key, table in new.items()}
        require_space(folder, sum(sizes.values()))
        digest = WeightsDigest() if "weights_sha256" in reader.stated else None
        body = [name for name in reader.names() if name not in (EMBEDDING, HEAD)]
        body_bytes = sum(num_bytes(reader.shape(name), reader.dtype(name)) for name in body)
        tally = Tally(sum(sizes.values()) + (body_bytes if digest else 0), on_progress)
        for name in ("common.pt", "metadata.json", *held):
            carry(file_inside(self.folder, name), folder / name)
        with DataFiles(folder, _free_name(held)) as files:
            made = {key: self._write(files, key, table, digest, tally) for key, table in new.items()}
        write_index(folder, {key: made.get(key, tensor) for key, tensor in old.items()}, self._objects)
        for name in body if digest is not None else ():
            for block in read_blocks(reader, name):
                digest.update(name, block.dtype, reader.shape(name), block)  # type: ignore[union-attr]
                tally.add(num_bytes(tuple(block.shape), block.dtype))
        return {
            "files": files.count,
            "files_carried": len(held),
            "bytes": body_bytes + sum(size for key, size in sizes.items() if key in _MATRICES),
            **({} if digest is None else {"weights_sha256": digest.hexdigest()}),
        }

    def _write(
        self, files: DataFiles, key: str, table: NewTable, digest: WeightsDigest | None, tally: Tally
    ) -> StoredTensor:
        stored = self._tensors[key]
        width, dtype = stored.size[1], stored.dtype
        rows: Rows = table.make(self._boxes.read(stored, (0, 0), stored.size))
        chunks = []
        for start, stop in row_blocks(table.num_rows, num_bytes((width,), dtype), MAX_CHUNK_BYTES):
            block = filled(rows, start, stop, width, dtype)
            chunks.append(Chunk((start, 0), (stop - start, width), *files.save(block)))
            if digest is not None and key in _MATRICES:
                true = block[: max(0, table.vocab_size - start)]
                digest.update(_MATRICES[key][1], dtype, (table.vocab_size, width), true)
            tally.add(num_bytes(tuple(block.shape), dtype))
        return replace(stored, size=(table.num_rows, width), chunks=tuple(chunks))


def _free_name(names: list[str]) -> str:
    """What the names of new data files begin with, so that they are no others' even after several surgeries."""
    number = 0
    while any(name.startswith(f"__surgery{number}_") for name in names):
        number += 1
    return f"__surgery{number}"
