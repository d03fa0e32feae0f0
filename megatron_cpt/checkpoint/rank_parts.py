"""What a tensor- and pipeline-parallel rank of Megatron holds of a Llama, and where that lies in the whole matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from megatron_cpt.checkpoint.llama import (
    EMBEDDING,
    HEAD,
    LAYERS,
    STORED_EMBEDDING,
    STORED_FINAL_NORM,
    STORED_HEAD,
    hf_shapes,
    placements,
)
from megatron_cpt.checkpoint.optimizer_state import LEAVE_BEHIND
from megatron_cpt.checkpoint.runs import WEIGHTS, Box, Placed, Rows, check_runs, place
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

# The tensors of a layer, in the order of Megatron's modules; a norm is part of the matrix behind it, or a module.
STORED_NORMS = {
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
Key = tuple[str, int | None]  # stored tensor, layer


@dataclass(frozen=True, slots=True)
class Piece:
    """Where elements [first, first + count) of a tensor, row by row, lie in a file."""

    file: str
    offset: int
    first: int
    count: int


@dataclass
class RankBoxes:
    """Where the matrices lie: each tensor-parallel rank's part, or one copy for each rank of what is not cut."""

    parts: dict[Key, list[Box]] = field(default_factory=lambda: defaultdict(list))
    copies: dict[Key, list[list[Box]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, key: Key, rank: int, tp: int, size: tuple[int, ...], pieces: Iterable[Piece], itemsize: int) -> None:
        """Add the part of one tensor-parallel rank.

        Args:
            key: of the matrix.
            rank: which part of it this is.
            tp: number of parts.
            size: of the whole matrix.
            pieces: that the part consists of.
            itemsize: bytes of an element.
        """
        local = local_shape(key[0], size, tp)
        boxes = [box for piece in pieces for box in _rectangles(piece, (*local, 1)[1], itemsize)]
        if len(size) == 1:
            if self.parts[key]:
                self.copies[key].append(boxes)
            else:
                self.parts[key] = boxes
            return
        for box in boxes:
            self.parts[key].extend(_in_whole(key[0], box, rank, local, size[0], itemsize))


def _rectangles(piece: Piece, columns: int, itemsize: int) -> Iterator[Box]:
    """A piece as rectangles of a matrix: what is left of a row, whole rows, and what is left of another."""
    first, stop = piece.first, piece.first + piece.count
    while first < stop:
        row, column = divmod(first, columns)
        rows = 0 if column else (stop - first) // columns
        width = columns if rows else min(columns - column, stop - first)
        yield Box(piece.file, piece.offset + (first - piece.first) * itemsize, row, max(rows, 1), column, width)
        first += max(rows, 1) * width


def _in_whole(name: str, box: Box, rank: int, local: tuple[int, ...], whole_rows: int, itemsize: int) -> Iterator[Box]:
    """A rectangle of a rank's part, as one or two of the whole matrix."""
    rows, columns = local
    if name.endswith(_BY_COLUMNS):
        yield Box(box.file, box.offset, box.row, box.rows, box.column + rank * columns, box.columns)
    elif name.endswith(_GATE_AND_UP):  # a rank's gate, then its up
        half = rows // 2
        for number in range(2):
            first, last = max(box.row, number * half), min(box.row + box.rows, (number + 1) * half)
            if first < last:
                at = box.offset + (first - box.row) * box.columns * itemsize
                row = number * (whole_rows // 2) + rank * half + first - number * half
                yield Box(box.file, at, row, last - first, box.column, box.columns)
    else:
        yield Box(box.file, box.offset, box.row + rank * rows, box.rows, box.column, box.columns)


def local_shape(name: str, size: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Shape of a rank's part of a stored matrix."""
    if len(size) == 1:
        return size
    rows, columns = size
    return (rows, columns // tp) if name.endswith(_BY_COLUMNS) else (rows // tp, columns)


def chunk_names(
    llama: LlamaShape, spec: str, layers: range, begins: bool, ends: bool, staged: bool
) -> Iterator[tuple[str, Key | None]]:
    """Names in a model chunk, in the order of Megatron's modules, and what each is; nothing: an empty extra state.

    Args:
        llama: the model.
        spec: "te" (Transformer Engine's modules) or "local" (megatron-core's own).
        layers: of the chunk, by their numbers in the model.
        begins: whether it is the first chunk, which has the embedding.
        ends: whether it is the last one, which has the head.
        staged: whether there are several pipeline stages; the last then has a tied table again, as its head.
    """
    if begins:
        yield STORED_EMBEDDING, (STORED_EMBEDDING, None)
    for local, layer in enumerate(layers):
        for inside in _LOCAL_ORDER if spec == "local" else _TE_ORDER:
            yield f"{LAYERS}{local}.{inside}", (LAYERS + STORED_NORMS.get(inside, inside), layer)
            if inside.endswith(".weight") and "linear_" in inside:  # strict loading asks for it, of Transformer Engine
                yield f"{LAYERS}{local}.{inside.removesuffix('weight')}_extra_state", None
    if ends:
        yield STORED_FINAL_NORM, (STORED_FINAL_NORM, None)
        if not llama.tied_embeddings or staged:
            yield STORED_HEAD, (STORED_HEAD, None)


@dataclass
class Named:
    """Tensors by HF name: those of a model, and of the state of its optimizer under "<state>/<HF name>".

    Attributes:
        tensors: where each lies.
        padding: of the vocabulary tables, the rows beyond the true vocabulary.
        copies: where a tensor lies a second time.
    """

    tensors: dict[str, Placed] = field(default_factory=dict)
    padding: dict[str, Placed] = field(default_factory=dict)
    copies: dict[str, tuple[Placed, ...]] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        llama: LlamaShape,
        sizes: tuple[int, int],
        boxes: RankBoxes,
        dtypes: Mapping[Key, torch.dtype],
        where: str,
    ) -> None:
        """Add the weights or one state of all of them.

        Args:
            kind: WEIGHTS, or the state.
            llama: the model.
            sizes: the true vocabulary size, and the padded one.
            boxes: where the stored matrices lie.
            dtypes: of the stored matrices.
            where: for messages.

        Raises:
            CheckpointError: something of the model is missing or is stored twice.
        """
        vocab_size, padded = sizes
        prefix = "" if kind == WEIGHTS else f"{kind}/"
        shapes = hf_shapes(llama, vocab_size)
        beyond, extra = [Rows(0, vocab_size, padded - vocab_size)], (padded - vocab_size, llama.hidden_size)
        for name, at in placements(llama, vocab_size).items():
            key, full = (at.key, at.layer), prefix + name
            if key not in dtypes:
                advice = "" if kind == WEIGHTS else f"; complete it, or {LEAVE_BEHIND}"
                raise CheckpointError(
                    f"{where}: {full} is missing; the checkpoint is incomplete or of another model{advice}"
                )
            rows = [Rows(row, stored, count) for row, stored, count in at.runs]
            self.tensors[full] = place(shapes[name], dtypes[key], rows, boxes.parts[key])
            check_runs(full, self.tensors[full])
            if copies := boxes.copies.get(key):
                self.copies[full] = tuple(place(shapes[name], dtypes[key], rows, copy) for copy in copies)
            if name in (EMBEDDING, HEAD) and padded > vocab_size:
                self.padding[full] = place(extra, dtypes[key], beyond, boxes.parts[key])
        again = boxes.parts.get((STORED_HEAD, None))
        if llama.tied_embeddings and again:  # the last stage holds the tied table again, as its head
            full, dtype = prefix + EMBEDDING, dtypes[STORED_HEAD, None]
            copy = place(shapes[EMBEDDING], dtype, [Rows(0, 0, vocab_size)], again)
            self.copies[full] = (*self.copies.get(full, ()), copy)
            if padded > vocab_size:
                runs = place(extra, dtype, beyond, again).runs
                self.padding[prefix + HEAD] = replace(self.padding[full], runs=runs)
