"""Where the bytes of a model lie, the same for every format: tensors by Hugging Face name, made of runs of rows.

A format is known by two things: a function that reads headers and says where each tensor lies (`StoredModel`), and
one that lays out new files and says where each tensor goes (`layout.NewLayout`). What moves, compares and hashes
tensors (`execute`, `verify`) knows nothing of formats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.archive_pickle import Array
from megatron_cpt.checkpoint.cover import check_cover
from megatron_cpt.checkpoint.direct import write_at, write_exactly, write_past_cache
from megatron_cpt.checkpoint.files import new_tensor, read_exactly
from megatron_cpt.checkpoint.llama import EMBEDDING, hf_shapes
from megatron_cpt.checkpoint.optimizer_state import LEAVE_BEHIND, OptimizerFacts
from megatron_cpt.checkpoint.reader import BLOCK_BYTES, bits, num_bytes, raw_bytes, row_blocks
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

WEIGHTS = "weights"
# State of an optimizer is named like the weight it belongs to: "exp_avg/model.norm.weight".
STATES = (MASTER := "master", "exp_avg", "exp_avg_sq")
# What copies that differ are a sign of, without and with a head that is the embedding's.
_DIFFER = (
    "the files are of two models, or damaged",
    "the files are of two models, or damaged, or the model has a head of its own and its description has to say so "
    "(tie_word_embeddings: false)",
)


@dataclass(frozen=True, slots=True)
class Run:
    """A rectangle of a tensor, and the rows of a file that hold it.

    Attributes:
        file: path below the checkpoint's folder.
        offset: of the first row's first byte.
        pitch: bytes from one row to the next; `columns` elements when the rows lie densely.
        row, rows, column, columns: the rectangle. A tensor of one dimension has rows of one column.
    """

    file: str
    offset: int
    pitch: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and the runs that it consists of, by row and column."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[1] if len(self.shape) == 2 else 1


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a stored matrix, and where it lies: what a file or a chunk of one holds."""

    file: str
    offset: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True, slots=True)
class Rows:
    """`rows` rows of an HF tensor from `row` on, which are every `step`-th of a stored matrix from `stored` on."""

    row: int
    stored: int
    rows: int
    step: int = 1


def place(shape: tuple[int, ...], dtype: torch.dtype, rows: Iterable[Rows], boxes: Sequence[Box]) -> Placed:
    """Where a tensor lies whose rows are in a stored matrix that is cut into boxes.

    Boxes that were cut between rows that `step` keeps apart are not needed by any format, and refused.
    """
    runs = []
    itemsize = dtype.itemsize
    for part in rows:
        end = part.stored + (part.rows - 1) * part.step
        for box in boxes:
            first, last = max(part.stored, box.row), min(end, box.row + box.rows - 1)
            if first > last:
                continue
            skipped, rest = divmod(first - part.stored, part.step)
            if rest or (part.step > 1 and (first, last) != (part.stored, end)):
                raise CheckpointError(f"{box.file}: it is cut inside a head, which has to be whole")
            pitch = box.columns * itemsize
            offset = box.offset + (first - box.row) * pitch
            count = (last - first) // part.step + 1
            runs.append(Run(box.file, offset, pitch * part.step, part.row + skipped, count, box.column, box.columns))
    return Placed(shape, dtype, tuple(sorted(runs, key=lambda run: (run.row, run.column))))


def check_runs(name: str, placed: Placed) -> None:
    """Raise CheckpointError unless the runs hold every element of the tensor exactly once."""
    boxes = [((run.row, run.column), (run.rows, run.columns)) for run in placed.runs]
    check_cover(name, (*placed.shape, 1, 1)[:2], boxes, [run.file for run in placed.runs])


@dataclass
class StoredModel:
    """A Llama on disk, in any format; only headers have been read.

    Attributes:
        folder: of the checkpoint.
        format: "hf", "torch_dist", "mp_rank", "meta" or "nxd".
        llama: its architecture.
        vocab_size: the true one.
        padded_vocab_size: rows that are stored.
        tensors: weights by HF name, state of an optimizer by "<state>/<HF name>".
        padding: of the vocabulary tables, the rows beyond the true vocabulary.
        copies: where a tensor lies a second time, as norms do on every tensor-parallel rank.
        stated: what the format says beside: a manifest's fields, or those of config.json.
        layout: how it is cut, e.g. {"tensor_parallel": 8}.
        optimizer: what belongs to the state of an optimizer beside tensors; None where there is none, or it was not
            asked for.
        holds_optimizer: whether there is one, asked for or not.
        rounded: for a float32 tensor, the weight that it has to be, bit for bit, when it is rounded to its dtype.
    """

    folder: Path
    format: str
    llama: LlamaShape
    vocab_size: int
    padded_vocab_size: int
    tensors: dict[str, Placed]
    padding: dict[str, Placed] = field(default_factory=dict)
    copies: dict[str, tuple[Placed, ...]] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerFacts | None = None
    holds_optimizer: bool = False
    rounded: dict[str, Placed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.state_names():
            kind, weight = name.split("/", 1)
            if kind == MASTER and weight in self.tensors:
                self.rounded.setdefault(name, self.tensors[weight])
        self._first_rows = {name: [run.row for run in placed.runs] for name, placed in self.tensors.items()}
        self._highest = {
            name: max((run.rows for run in placed.runs), default=0) for name, placed in self.tensors.items()
        }

    def names(self) -> list[str]:
        """Hugging Face names of the weights, in the order of a forward pass."""
        return list(hf_shapes(self.llama, self.vocab_size))

    def state_names(self) -> list[str]:
        """Names of the optimizer's state."""
        return [name for name in self.tensors if name.split("/", 1)[0] in STATES]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, the vocabulary without its padding."""
        return self._placed(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._placed(name).dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        shape = self.shape(name)
        return self.read_rows(name, 0, shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; raises CheckpointError where a copy of it is not the same there."""
        placed = self._placed(name)
        if not 0 <= start <= stop <= placed.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {placed.shape[0]}")
        out = new_tensor((stop - start, *placed.shape[1:]), placed.dtype)
        self.read_into(name, start, out)
        self.check_copies(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a contiguous tensor with its rows from `start` on."""
        placed = self._placed(name)
        runs, firsts = placed.runs, self._first_rows[name]
        low = bisect_right(firsts, start - self._highest[name])
        high = bisect_right(firsts, start + len(out) - 1)
        _fill(self.folder, runs[low:high], placed, start, out)

    def check_copies(self, name: str, start: int, rows: Tensor) -> None:
        """Raise CheckpointError unless a tensor's copies hold these rows from `start` on."""
        for copy in self.copies.get(name, ()):
            others = _blocks(self.folder, copy, start, start + len(rows))
            if not all(torch.equal(bits(rows[first - start :][: len(other)]), bits(other)) for first, other in others):
                raise CheckpointError(
                    f"{self.folder}: {name} in {copy.runs[0].file} differs from its copy in "
                    f"{self.tensors[name].runs[0].file}; {_DIFFER[name == EMBEDDING and self.llama.tied_embeddings]}"
                )

    def check_rounded(self, name: str, start: int, rows: Tensor) -> None:
        """Raise CheckpointError unless these rows, rounded, are those of the weight that they are the master of.

        Every update rounds the masters to the weights, so a state that is another's, or misread, shows here.
        """
        weight = self.rounded.get(name)
        if weight is None:
            return
        written = new_tensor(tuple(rows.shape), weight.dtype)
        _fill(self.folder, weight.runs, weight, start, written)
        if not torch.equal(bits(rows.to(weight.dtype)), bits(written)):
            raise CheckpointError(
                f"{self.folder}: the optimizer's state is not that of these weights ({name}, rounded, is not the "
                f"weight in {weight.runs[0].file}); it was saved damaged, or belongs to others: {LEAVE_BEHIND}"
            )

    def padding_blocks(self, name: str) -> Iterator[Tensor]:
        """The stored rows of a vocabulary table beyond the true vocabulary, in blocks of at most BLOCK_BYTES."""
        if name in self.padding:
            placed = self.padding[name]
            yield from (block for _, block in _blocks(self.folder, placed, 0, placed.shape[0]))

    def _placed(self, name: str) -> Placed:
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}")
        return self.tensors[name]


def same_rows(folder: Path, one: Placed, other: Placed) -> bool:
    """Whether two stored tensors are the same bit for bit; read in blocks."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pairs = zip(*(_blocks(folder, placed, 0, one.shape[0]) for placed in (one, other)), strict=True)
    return all(torch.equal(bits(ours), bits(theirs)) for (_, ours), (_, theirs) in pairs)


def _blocks(folder: Path, placed: Placed, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Rows [start, stop) of what is stored as (first row, rows), in blocks of at most BLOCK_BYTES."""
    for first, last in row_blocks(stop - start, num_bytes(placed.shape[1:], placed.dtype), BLOCK_BYTES):
        block = new_tensor((last - first, *placed.shape[1:]), placed.dtype)
        _fill(folder, placed.runs, placed, start + first, block)
        yield start + first, block


def _fill(folder: Path, runs: Iterable[Run], placed: Placed, start: int, out: Tensor) -> None:
    """Put what the runs hold of rows [start, start + len(out)) into place."""
    matrix = out.view(len(out), placed.columns)
    itemsize = placed.dtype.itemsize
    for run in runs:
        first, last = max(start, run.row), min(start + len(out), run.row + run.rows)
        if first >= last:
            continue
        offset, row_bytes = run.offset + (first - run.row) * run.pitch, run.columns * itemsize
        target = matrix[first - start : last - start, run.column : run.column + run.columns]
        if target.is_contiguous() and run.pitch == row_bytes:
            read_exactly(folder / run.file, offset, raw_bytes(target))
            continue
        held = new_tensor(((last - first - 1) * (run.pitch // itemsize) + run.columns,), placed.dtype)
        read_exactly(folder / run.file, offset, raw_bytes(held))
        target.copy_(held.as_strided((last - first, run.columns), (run.pitch // itemsize, 1)))


def number_of(path: Path, value: Any) -> float:
    """A number, or what a tensor of one element in an archive holds."""
    if type(value) is float or type(value) is int and abs(value) < 2**63:
        return float(value)
    if not isinstance(value, Array) or num_bytes(value.shape, torch.uint8) != 1:
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected a number or a tensor of one element")
    held = torch.zeros((), dtype=value.dtype)
    read_exactly(path, value.offset, raw_bytes(held))
    return float(held)


def write_runs(
    folder: Path, placed: Placed, start: int, rows: Tensor, runs: Iterable[Run], past_cache: bool = False
) -> None:
    """Write rows [start, start + len(rows)) of a tensor to where the runs say, in files that are there.

    Args:
        folder: of the files.
        placed: the tensor.
        start: its first row here.
        rows: contiguous.
        runs: those of the tensor, or some of them.
        past_cache: write whole pages directly to the disk (see `direct`); nobody may read the files meanwhile.
    """
    matrix = rows.view(len(rows), placed.columns)
    for run in runs:
        first, last = max(start, run.row), min(start + len(rows), run.row + run.rows)
        if first >= last:
            continue
        part = matrix[first - start : last - start, run.column : run.column + run.columns].contiguous()
        offset, view = run.offset + (first - run.row) * run.pitch, raw_bytes(part)
        row_bytes = run.columns * placed.dtype.itemsize
        if run.pitch == row_bytes:
            (write_past_cache if past_cache else write_at)(folder / run.file, offset, view)
            continue
        with open(folder / run.file, "r+b", buffering=0) as file:
            for row in range(last - first):
                at = row * row_bytes
                write_exactly(file.fileno(), offset + row * run.pitch, view[at : at + row_bytes])


def total_bytes(model: StoredModel, names: Iterable[str]) -> int:
    """Bytes of some of a model's tensors, without padding."""
    return sum(num_bytes(model.shape(name), model.dtype(name)) for name in names)
