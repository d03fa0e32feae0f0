"""How NeuronX Distributed names and cuts the tensors of a Llama: which rectangle of which tensor a rank holds.

Written from the format's public description, not verified on hardware. One table serves reading and writing.

Queries and values of a rank have to belong together, and a rank has to have a key-value head of its own. Where there
are more ranks than such heads, each head is repeated; a slot is one of these copies with the query heads that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_cpt.checkpoint.llama import EMBEDDING, FINAL_NORM, HEAD, hf_shapes
from megatron_cpt.checkpoint.runs import Placed, Run
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

Form = Literal["separate", "stacked", "split", "fused"]
Order = Literal["trn1", "trn2"]

# Form -> names of what holds q, k and v: three tensors, or one that holds a rank's rows of each after another.
FORMS: dict[Form, tuple[str, ...]] = {
    "separate": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "stacked": ("self_attn.qkv_proj.weight",),
    "split": ("self_attn.qkv_proj.weight_q", "self_attn.qkv_proj.weight_k", "self_attn.qkv_proj.weight_v"),
    "fused": ("self_attn.qkv_proj.weight_qkv",),
}
OUT, GATE_UP, DOWN = "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Cut:
    """How the tensors are cut.

    Attributes:
        tp: tensor-parallel size.
        form: of q, k and v.
        replication: how often each key-value head is stored; "separate" and "stacked" store it once.
        order: of the slots where heads are stored more than once: trn1 has copy 0 of all heads, then copy 1 of all;
            trn2 has all copies of a head beside each other.
    """

    tp: int
    form: Form
    replication: int = 1
    order: Order = "trn1"


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of an HF tensor (a norm is one column), and where it begins in a stored tensor of one rank."""

    rank: int
    key: str
    stored_row: int
    stored_column: int
    row: int
    rows: int
    column: int
    columns: int


Version = tuple[Piece, ...]  # the pieces that a tensor consists of; several versions are copies of each other


@dataclass(frozen=True, slots=True)
class Held:
    """Where a stored tensor of a rank lies: densely from `offset` on."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def check_cut(llama: LlamaShape, cut: Cut, where: str, remedy: str) -> None:
    """Raise CheckpointError, which ends with `remedy`, unless every rank gets whole heads and an equal share."""
    heads, groups, tp, times = llama.num_attention_heads, llama.num_query_groups, cut.tp, cut.replication
    if heads * llama.head_dim != llama.hidden_size:
        raise CheckpointError(
            f"{where}: got {heads} heads of {llama.head_dim} in a hidden size of {llama.hidden_size}, the heads of "
            f"NeuronX Distributed's Llama add up to the hidden size; {remedy}"
        )
    for what, size in (("attention heads", heads), ("ffn rows", llama.ffn_hidden_size)):
        if size % tp:
            raise CheckpointError(f"{where}: got tp {tp} for {size} {what}, expected a divisor; {remedy}")
    if groups * times % tp or tp % times or heads % (groups * times):
        raise CheckpointError(
            f"{where}: got tp {tp} for {groups} key-value heads stored {times} times, expected a divisor or a "
            f"multiple of the key-value heads; {remedy}"
        )
    if cut.form == "stacked" and heads != groups:
        raise CheckpointError(
            f"{where}: {FORMS['stacked'][0]} is of models with as many key-value heads as heads, config.json says "
            f"{groups} and {heads}; {remedy}"
        )


def stored_shapes(llama: LlamaShape, table_rows: int, cut: Cut) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape on each rank, in the order of a forward pass; a tied model's head is among them.

    Args:
        llama: the architecture.
        table_rows: rows of the vocabulary tables on a rank.
        cut: how it is cut.
    """
    hidden, ffn = llama.hidden_size, llama.ffn_hidden_size // cut.tp
    query, kv = _query_rows(llama, cut), _kv_rows(llama, cut)
    keys = FORMS[cut.form]
    layer: dict[str, tuple[int, ...]] = {NORMS[0]: (hidden,)}
    layer |= {keys[0]: (query + 2 * kv, hidden)} if len(keys) == 1 else {keys[0]: (query, hidden)}
    layer |= dict.fromkeys(keys[1:], (kv, hidden))
    layer |= {OUT: (hidden, query), NORMS[1]: (hidden,), GATE_UP: (2 * ffn, hidden), DOWN: (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (table_rows, hidden)}
    for number in range(llama.num_layers):
        shapes |= {f"model.layers.{number}.{key}": shape for key, shape in layer.items()}
    return shapes | {FINAL_NORM: (hidden,), HEAD: (table_rows, hidden)}


def pieces_of(llama: LlamaShape, vocab_size: int, table_rows: int, cut: Cut) -> dict[str, list[Version]]:
    """Where each HF tensor lies: its versions, of which the first is the tensor and all others are copies."""
    tables = [_table(key, llama, table_rows, cut.tp, 0, vocab_size) for key in (EMBEDDING, HEAD)]
    found = {EMBEDDING: tables if llama.tied_embeddings else tables[:1]}
    for number in range(llama.num_layers):
        prefix = f"model.layers.{number}."
        found |= {prefix + name: versions for name, versions in layer_pieces(llama, cut, prefix).items()}
    found[FINAL_NORM] = _norm(FINAL_NORM, llama, cut)
    return found if llama.tied_embeddings else found | {HEAD: tables[1:]}


def padding_pieces(llama: LlamaShape, vocab_size: int, table_rows: int, cut: Cut) -> dict[str, Version]:
    """Where the rows of the vocabulary tables beyond the true vocabulary lie."""
    if table_rows * cut.tp == vocab_size:
        return {}
    names = (EMBEDDING,) if llama.tied_embeddings else (EMBEDDING, HEAD)
    return {name: _table(name, llama, table_rows, cut.tp, vocab_size, table_rows * cut.tp) for name in names}


def layer_pieces(llama: LlamaShape, cut: Cut, prefix: str) -> dict[str, list[Version]]:
    """Versions of the HF tensors of a layer, by their names without the layer's prefix."""
    hidden, ffn = llama.hidden_size, llama.ffn_hidden_size // cut.tp
    keys, query, kv = FORMS[cut.form], _query_rows(llama, cut), _kv_rows(llama, cut)
    starts = (0, query, query + kv) if len(keys) == 1 else (0, 0, 0)
    keys = keys * 3 if len(keys) == 1 else keys
    q: list[Piece] = []
    out: list[Piece] = []
    k: list[list[Piece]] = [[] for _ in range(cut.replication)]
    v: list[list[Piece]] = [[] for _ in range(cut.replication)]
    for slot in _slots(llama, cut):
        rank, copy, wide, tall = slot.rank, slot.copy, slot.query_rows, slot.kv_rows
        row, column = slot.kv * tall, slot.query * wide
        q.append(Piece(rank, prefix + keys[0], slot.place * wide, 0, column, wide, 0, hidden))
        out.append(Piece(rank, prefix + OUT, 0, slot.place * wide, 0, hidden, column, wide))
        for each, key, start in ((k, keys[1], starts[1]), (v, keys[2], starts[2])):
            each[copy].append(Piece(rank, prefix + key, start + slot.place * tall, 0, row, tall, 0, hidden))
    ranks = range(cut.tp)
    return {
        NORMS[0]: _norm(prefix + NORMS[0], llama, cut),
        "self_attn.q_proj.weight": [tuple(q)],
        "self_attn.k_proj.weight": [tuple(each) for each in k],
        "self_attn.v_proj.weight": [tuple(each) for each in v],
        OUT: [tuple(out)],
        NORMS[1]: _norm(prefix + NORMS[1], llama, cut),
        "mlp.gate_proj.weight": [tuple(Piece(r, prefix + GATE_UP, 0, 0, r * ffn, ffn, 0, hidden) for r in ranks)],
        "mlp.up_proj.weight": [tuple(Piece(r, prefix + GATE_UP, ffn, 0, r * ffn, ffn, 0, hidden) for r in ranks)],
        DOWN: [tuple(Piece(r, prefix + DOWN, 0, 0, 0, hidden, r * ffn, ffn) for r in ranks)],
    }


@dataclass(frozen=True, slots=True)
class _Slot:
    rank: int
    place: int  # among those of its rank
    kv: int  # which distinct key-value heads, counted in slots
    copy: int
    query: int  # which query heads, counted in slots
    query_rows: int
    kv_rows: int


def _slots(llama: LlamaShape, cut: Cut) -> Iterator[_Slot]:
    """All slots in the order of the ranks; without replication all of a rank's heads are one slot."""
    times = cut.replication
    distinct = cut.tp if times == 1 else llama.num_query_groups
    query_rows = llama.num_attention_heads * llama.head_dim // (distinct * times)
    kv_rows = llama.num_query_groups * llama.head_dim // distinct
    for number in range(distinct * times):
        rank, place = divmod(number, distinct * times // cut.tp)
        copy, kv = divmod(number, distinct) if cut.order == "trn1" else (number % times, number // times)
        yield _Slot(rank, place, kv, copy, kv * times + copy, query_rows, kv_rows)


def _query_rows(llama: LlamaShape, cut: Cut) -> int:
    return llama.num_attention_heads * llama.head_dim // cut.tp


def _kv_rows(llama: LlamaShape, cut: Cut) -> int:
    return llama.num_query_groups * cut.replication * llama.head_dim // cut.tp


def _norm(key: str, llama: LlamaShape, cut: Cut) -> list[Version]:
    """A version on every rank."""
    return [(Piece(rank, key, 0, 0, 0, llama.hidden_size, 0, 1),) for rank in range(cut.tp)]


def _table(key: str, llama: LlamaShape, table_rows: int, tp: int, start: int, stop: int) -> Version:
    """Rows [start, stop) of a vocabulary table, counted from `start` on."""
    pieces = []
    for rank in range(tp):
        first, last = max(start, rank * table_rows), min(stop, (rank + 1) * table_rows)
        if first < last:
            at = first - rank * table_rows
            pieces.append(Piece(rank, key, at, 0, first - start, last - first, 0, llama.hidden_size))
    return tuple(pieces)


def place_all(
    llama: LlamaShape, vocab_size: int, pieces: Mapping[str, list[Version]], held: Mapping[str, Sequence[Held]]
) -> tuple[dict[str, Placed], dict[str, tuple[Placed, ...]]]:
    """Where all tensors lie, and their copies; a tied model's head may be missing.

    Args:
        llama: the architecture.
        vocab_size: the true one.
        pieces: of the model.
        held: by stored name, the tensor of each tensor-parallel rank.
    """
    tensors, copies = {}, {}
    for name, shape in hf_shapes(llama, vocab_size).items():
        versions = [version for version in pieces[name] if version[0].key in held]
        tensors[name], *others = (place_version(name, shape, version, held) for version in versions)
        if others:
            copies[name] = tuple(others)
    if different := [name for name in copies if any(copy.dtype != tensors[name].dtype for copy in copies[name])]:
        raise CheckpointError(f"{different[0]}: its copies have different dtypes; the files are of two models")
    return tensors, copies


def place_version(
    name: str, shape: tuple[int, ...], pieces: Iterable[Piece], held: Mapping[str, Sequence[Held]]
) -> Placed:
    """Where one version of a tensor lies."""
    runs, dtypes = [], set[torch.dtype]()
    for piece in pieces:
        at = held[piece.key][piece.rank]
        width, size = (*at.shape, 1)[1], at.dtype.itemsize
        offset = at.offset + (piece.stored_row * width + piece.stored_column) * size
        runs.append(Run(at.file, offset, width * size, piece.row, piece.rows, piece.column, piece.columns))
        dtypes.add(at.dtype)
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{name} is stored as {' and as '.join(sorted(map(str, dtypes)))}; the files are of two models"
        )
    return Placed(shape, dtypes.pop(), tuple(sorted(runs, key=lambda run: (run.row, run.column))))
