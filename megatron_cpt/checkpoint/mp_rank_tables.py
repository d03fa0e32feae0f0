"""The vocabulary tables of a legacy Megatron checkpoint: one file for each tensor and pipeline rank.

Rank t of T holds rows [t P / T, (t + 1) P / T) of a table: the first stage the embedding, the last the head.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.archive import lay_out_archive, read_archive
from megatron_cpt.checkpoint.archive_pickle import Array, dense_strides, pickled
from megatron_cpt.checkpoint.direct import write_exactly
from megatron_cpt.checkpoint.files import file_inside, new_tensor, read_exactly, read_tensor, require_space
from megatron_cpt.checkpoint.huggingface import dense
from megatron_cpt.checkpoint.layout import hole
from megatron_cpt.checkpoint.mp_rank_files import (
    RANK_FILE,
    SHARDED_OPTIMIZER,
    TRACKER,
    Rank,
    find_ranks,
    iteration_folder,
    tracked_name,
)
from megatron_cpt.checkpoint.reader import BLOCK_BYTES, num_bytes, raw_bytes, row_blocks
from megatron_cpt.checkpoint.tables import Matrix, NewTable, Progress, Rows, Table, blocks, carry
from megatron_cpt.config.manifest import write_text_atomic
from megatron_cpt.errors import CheckpointError

# megatron-core's names, flat or nested, and those from before it.
_TABLE = re.compile(
    r"(?:.*\.)?(?:(word_embeddings\.weight)|((?:output_layer|lm_head|word_embeddings_for_head)\.weight))"
)


@dataclass(frozen=True)
class _Shard:
    """The part of a table that one rank holds, at a place of nested dicts in its file."""

    rank: Rank
    keys: tuple[str, ...]
    array: Array


class MpRankTables:
    """A legacy checkpoint as its tables and the rest (a `VocabTables`).

    Args:
        folder: the one that holds the tracker file.
        with_optimizer: True refuses a checkpoint that holds an optimizer's state, False leaves it behind.

    Raises:
        CheckpointError: damaged, incomplete, with expert parallelism, or with an optimizer's state.
    """

    format = "mp_rank"
    vocab_size: int | None = None

    def __init__(self, folder: Path, with_optimizer: bool = True) -> None:
        self.folder = folder
        self.iteration = iteration_folder(folder)
        self.tensor_parallel = 0
        self._shards: dict[str, list[_Shard]] = defaultdict(list)
        self.args: dict[str, Any] = {}
        self.has_optimizer = False
        kinds: dict[str, tuple[Matrix, torch.dtype, int]] = {}
        for rank in find_ranks(self.iteration):
            held = self._load(rank)
            self.has_optimizer |= held.get("optimizer") is not None
            self.has_optimizer |= (self.iteration / rank.name / SHARDED_OPTIMIZER).exists()
            self.args = self.args or vars(held.get("args") or Namespace())
            for keys, matrix, table in _find_tables(held):
                name = f"stage {rank.stage}: {'.'.join(keys)}"
                path = self.iteration / rank.name / RANK_FILE
                dense(table, f"{path}: {'.'.join(keys)}", path)
                self._shards[name].append(_Shard(rank, keys, table))
                kinds.setdefault(name, (matrix, table.dtype, table.shape[1]))
        self._check(with_optimizer)
        self.tables = tuple(
            Table(name, matrix, False, sum(shard.array.shape[0] for shard in self._shards[name]), width, dtype)
            for name, (matrix, dtype, width) in kinds.items()
        )
        self.divisor = (self.args.get("make_vocab_size_divisible_by") or 128) * self.tensor_parallel
        self.tied = self._is_tied()

    def _load(self, rank: Rank) -> dict[str, Any]:
        """What a rank's file holds, an Array in the place of each tensor."""
        value = read_archive(file_inside(self.iteration / rank.name, RANK_FILE))
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.iteration / rank.name / RANK_FILE} holds {type(value).__name__}, expected a checkpoint's dict"
            )
        return value

    def _check(self, with_optimizer: bool) -> None:
        if not self._shards:
            raise CheckpointError(f"{self.iteration} holds no embedding of a GPT model; give another checkpoint")
        if (self.args.get("expert_model_parallel_size") or 1) > 1:
            raise CheckpointError(f"{self.iteration} is of a mixture of experts; expected a plain Llama")
        self.tensor_parallel = 1 + max(shard.rank.tensor for shards in self._shards.values() for shard in shards)
        for name, shards in self._shards.items():
            numbers, rows = [shard.rank.tensor for shard in shards], [shard.array.shape[0] for shard in shards]
            if numbers != list(range(self.tensor_parallel)) or len(set(rows)) != 1:
                raise CheckpointError(
                    f"{self.iteration}: {name} lies on the tensor ranks {numbers} with {rows} rows, expected the same "
                    f"on each of {self.tensor_parallel}; the checkpoint is incomplete"
                )
        if self.has_optimizer and with_optimizer:
            raise CheckpointError(
                f"{self.iteration} holds the state of an optimizer, in which rows have no place of their own; bring it "
                "to torch_dist with `checkpoint convert`, whose state follows, or leave the state behind with "
                "--no-optimizer (Megatron then loads with --no-load-optim or --finetune)"
            )

    def _is_tied(self) -> bool:
        """Whether the head, where a stage holds one, is the embedding's copy."""
        heads = [table for table in self.tables if table.matrix == "head"]
        untied = self.args.get("untie_embeddings_and_output_weights")
        if untied is not None or not heads:
            return not untied
        first = next(table for table in self.tables if table.matrix == "embedding")
        return first.num_rows == heads[0].num_rows and torch.equal(self.read(first), self.read(heads[0]))

    def read(self, table: Table) -> Tensor:
        """A whole table, put together from all ranks."""
        whole = new_tensor((table.num_rows, table.width), table.dtype)
        first = 0
        for shard in self._shards[table.name]:
            view = whole[first : first + shard.array.shape[0]]
            read_exactly(self.iteration / shard.rank.name / RANK_FILE, shard.array.offset, raw_bytes(view))
            first += len(view)
        return whole

    def rewrite(self, folder: Path, new: Mapping[str, NewTable], on_progress: Progress | None = None) -> dict[str, Any]:
        """Write the ranks and, last, the tracker.

        A rank without a table is written too where its arguments state the size of the vocabulary: Megatron compares
        them when it loads.
        """
        made: dict[str, Rows] = {table.name: new[table.name].make(self.read(table)) for table in self.tables}
        sizes = {rank: (self.iteration / rank.name / RANK_FILE).stat().st_size for rank in find_ranks(self.iteration)}
        require_space(folder, sum(sizes.values()))
        target = folder / self.iteration.name
        files = carried = done = 0
        for rank, size in sizes.items():
            source, here = self.iteration / rank.name, target / rank.name
            here.mkdir(parents=True)
            for path in source.iterdir():
                if path.is_file() and path.name not in (RANK_FILE, SHARDED_OPTIMIZER):
                    carry(path, here / path.name)
            if self._write_rank(rank, here / RANK_FILE, new, made):
                files += 1
            else:
                carry(source / RANK_FILE, here / RANK_FILE)
                carried += 1
            done += size
            if on_progress is not None:
                on_progress(done, sum(sizes.values()))
        write_text_atomic(folder / TRACKER, f"{tracked_name(self.iteration.name)}\n")
        return {
            "files": files,
            "files_carried": carried,
            "bytes": sum(num_bytes((new[t.name].num_rows, t.width), t.dtype) for t in self.tables),
        }

    def _write_rank(self, rank: Rank, path: Path, new: Mapping[str, NewTable], made: Mapping[str, Rows]) -> bool:
        """Write a rank's file where anything in it changes; whether it does."""
        held, source = self._load(rank), self.iteration / rank.name / RANK_FILE
        remade: dict[int, tuple[Table, int, int]] = {}  # by the place of an Array in memory
        changed = held.pop("optimizer", None) is not None
        args = held.get("args")
        if isinstance(args, Namespace):
            any_table = next(iter(new.values()))
            for name, size in (("padded_vocab_size", any_table.num_rows), ("vocab_size", any_table.vocab_size)):
                if getattr(args, name, None) not in (None, size):
                    setattr(args, name, size)
                    changed = True
        for table in self.tables:
            shard = next((shard for shard in self._shards[table.name] if shard.rank == rank), None)
            if shard is not None:
                rows = new[table.name].num_rows // self.tensor_parallel
                place: Any = held
                for key in shard.keys[:-1]:
                    place = place[key]
                first = rank.tensor * rows
                left = place[shard.keys[-1]] = hole((rows, table.width), table.dtype)
                remade[id(left)] = (table, first, first + rows)
                changed = True
        if changed:
            size, parts, offsets = lay_out_archive(held)
            with open(path, "wb") as file:
                for offset, data in parts:
                    write_exactly(file.fileno(), offset, data)
                for array, offset in zip(pickled(held)[1], offsets, strict=True):
                    if id(array) in remade:
                        table, first, last = remade[id(array)]
                        blocks_of_it = blocks(made[table.name], first, last, num_bytes((table.width,), table.dtype))
                    else:
                        blocks_of_it = _read_blocks(source, array)
                    for block in blocks_of_it:
                        write_exactly(file.fileno(), offset, raw_bytes(block))
                        offset += num_bytes(tuple(block.shape), block.dtype)
                os.ftruncate(file.fileno(), size)
                os.fsync(file.fileno())
        return changed


def _read_blocks(path: Path, array: Array) -> Iterator[Tensor]:
    """The elements of a tensor in row-major order, as rows of bytes, or whole where they do not lie so."""
    count, itemsize = num_bytes(array.shape, torch.uint8), array.dtype.itemsize
    if array.strides == dense_strides(array.shape) or not count:
        for start, stop in row_blocks(count * itemsize, 1, BLOCK_BYTES):
            yield read_tensor(path, array.offset + start, (stop - start,), torch.uint8)
        return
    extent = 1 + sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    yield read_tensor(path, array.offset, (extent,), array.dtype).as_strided(array.shape, array.strides).contiguous()


def _find_tables(held: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Matrix, Array]]:
    """Where tables lie in a rank's model, or its model chunks (interleaved stages)."""

    def walk(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Matrix, Array]]:
        if isinstance(value, Array):
            match = _TABLE.fullmatch(".".join(keys))
            if match and len(value.shape) == 2:
                yield keys, "embedding" if match[1] else "head", value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                if isinstance(key, str):
                    yield from walk(inner, (*keys, key))

    for name in held:
        if re.fullmatch(r"model\d*", str(name)):
            yield from walk(held[name], (name,))
