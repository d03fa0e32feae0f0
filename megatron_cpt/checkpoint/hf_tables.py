"""The vocabulary tables of a Hugging Face folder, replaced without a change to how it is cut into files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_cpt.checkpoint.files import json_inside, read_tensor, require_space
from megatron_cpt.checkpoint.hf_writer import Entry, write_shard
from megatron_cpt.checkpoint.huggingface import INDEX, WEIGHTS, Stored, open_hf, stored_files
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.checkpoint.reader import BLOCK_BYTES, WeightsDigest, num_bytes, read_blocks, row_blocks
from megatron_cpt.checkpoint.tables import Matrix, NewTable, Progress, Table, blocks, carry
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.errors import CheckpointError

_MATRICES: dict[str, Matrix] = {EMBEDDING: "embedding", HEAD: "head"}


class HFTables:
    """A Hugging Face folder as its tables and the rest (a `VocabTables`).

    Only the weight files that hold a table are written; names, order and cut of the files stay.
    """

    format = "hf"
    vocab_size: int | None = None
    divisor = tensor_parallel = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = open_hf(folder)
        self._files = stored_files(folder)
        if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            raise CheckpointError(
                f"{folder} holds pickled weights, and surgery reads safetensors: make them by "
                "`megatron-cpt checkpoint convert SRC DST --to hf`"
            )
        self.tied = self.reader.llama.tied_embeddings
        for _ in read_blocks(self.reader, EMBEDDING) if EMBEDDING in self.reader.copies else ():
            pass  # a head that is stored beside the embedding, and must be the same, is compared as this is read
        self.tables = tuple(self._table(name) for name in _MATRICES if name in self.reader.names())

    def _table(self, name: str) -> Table:
        rows, width = self.reader.shape(name)
        return Table(name, _MATRICES[name], False, rows, width, self.reader.dtype(name))

    def read(self, table: Table) -> Tensor:
        """A whole table."""
        return self.reader.read(table.name)

    def rewrite(self, folder: Path, new: Mapping[str, NewTable], on_progress: Progress | None = None) -> dict[str, Any]:
        """Write the weights and their index; config.json and the tokenizer are the caller's."""
        reader, digest = self.reader, WeightsDigest(self.reader.names())
        # A tied model may hold its table a second time, under the head's name.
        new = {**new, HEAD: new[EMBEDDING]} if self.tied else new
        files = {name: _entries(held, new) for name, held in self._files.items()}
        remade = [name for name, held in self._files.items() if held.keys() & new.keys()]
        total = sum(num_bytes(shape, dtype) for entries in files.values() for _, shape, dtype, _ in entries)
        self._check_space(folder, {name: files[name] for name in remade})
        done = 0
        for name, entries in files.items():
            steps = write_shard(folder / name, entries, digest) if name in remade else self._carry(folder, name, digest)
            for _, size in steps:
                done += size
                if on_progress is not None:
                    on_progress(done, total)
        if INDEX in (path.name for path in reader.folder.iterdir()):
            index = read_json(json_inside(reader.folder, INDEX), CheckpointError)
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
            index["metadata"].pop("total_parameters", None)
            write_json_atomic(folder / INDEX, index)
        return {
            "files": len(remade),
            "files_carried": len(files) - len(remade),
            "bytes": total,
            "weights_sha256": digest.hexdigest(),
        }

    def _carry(self, folder: Path, file: str, digest: WeightsDigest) -> Iterator[tuple[str, int]]:
        """A file without a table; it is read all the same, for the digest that proves the new folder."""
        carry(self.folder / file, folder / file)
        known = set(self.reader.names())
        for name, stored in self._files[file].items():
            for block in read_blocks(self.reader, name) if name in known else ():
                digest.update(name, stored.dtype, stored.shape, block)
            yield name, num_bytes(stored.shape, stored.dtype)

    def _check_space(self, folder: Path, remade: Mapping[str, list[Entry]]) -> None:
        require_space(folder, sum(num_bytes(shape, dtype) for part in remade.values() for _, shape, dtype, _ in part))


def _entries(held: Mapping[str, Stored], new: Mapping[str, NewTable]) -> list[Entry]:
    """What a file of the new folder holds, in the order of the old one."""
    entries: list[Entry] = []
    for name, stored in sorted(held.items(), key=lambda item: item[1].offset):
        if name in new:
            shape = (new[name].num_rows, *stored.shape[1:])
            entries.append((name, shape, stored.dtype, partial(_made, new[name], stored)))
        else:
            entries.append((name, stored.shape, stored.dtype, partial(_copied, stored)))
    return entries


def _made(table: NewTable, stored: Stored) -> Iterator[Tensor]:
    """The blocks of a remade table; the old one is read when its turn comes."""
    rows = table.make(read_tensor(stored.path, stored.offset, stored.shape, stored.dtype))
    return blocks(rows, 0, table.num_rows, num_bytes(stored.shape[1:], stored.dtype))


def _copied(stored: Stored) -> Iterator[Tensor]:
    row = stored.shape[1:]
    row_bytes = num_bytes(row, stored.dtype)
    for start, stop in row_blocks(stored.shape[0] if stored.shape else 1, row_bytes, BLOCK_BYTES):
        shape = (stop - start, *row) if stored.shape else ()
        yield read_tensor(stored.path, stored.offset + start * row_bytes, shape, stored.dtype)
