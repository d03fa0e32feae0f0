"""How long texts are under extensions of several sizes, to choose one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.base_model import read_base
from megatron_cpt.tokenizer.choosing import Choice
from megatron_cpt.tokenizer.extending import choose, train_offer
from megatron_cpt.tokenizer.model_file import Piece, PieceType
from megatron_cpt.tokenizer.scripts import script_rule


@dataclass(frozen=True)
class SweepRow:
    """One size of a sweep.

    Attributes:
        num_pieces: pieces offered; 0 for the base itself.
        vocab_size: ids of the extended vocabulary.
        bytes_per_token: UTF-8 bytes per token of each language's text.
    """

    num_pieces: int
    vocab_size: int
    bytes_per_token: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """Rows by growing size, the base first.

    Attributes:
        rows: the base and each size.
        knee: `num_pieces` where the curve of tokens per byte over vocabulary size, of the first language, lies
            furthest below the straight line from the base to the largest size. A suggestion and no more: it
            knows nothing of what the rows of a larger vocabulary cost in training.
    """

    rows: tuple[SweepRow, ...]
    knee: int


def sweep_sizes(
    base: str | Path,
    texts: Iterable[str],
    sizes: Sequence[int],
    held_out: Mapping[str, Sequence[str]],
    script: str,
    divisor: int,
    *,
    character_coverage: float = 0.9995,
    scores: str = "rank-tail",
    presegment: str = "",
) -> Sweep:
    """Measure extensions of several sizes on held-out text; nothing is written.

    One model is trained, of the largest size. BPE adds merges one by one, so a smaller model is its first
    merges with all its characters, exactly as if it had been trained alone.

    Args:
        base: a folder with tokenizer.model, or that file.
        texts: documents of the target language, read once.
        sizes: pieces to offer, as `num_pieces` of `extend_tokenizer`.
        held_out: lines to measure by language, the target language first.
        script: as for `extend_tokenizer`; `divisor`, `character_coverage`, `scores` and `presegment` alike.

    Raises:
        TokenizerError: there is nothing to measure, a size is smaller than the text's alphabet, or what
            `extend_tokenizer` raises.
    """
    _, model = read_base(base)
    sizes = sorted(set(sizes))
    empty = [language for language, lines in held_out.items() if not any(lines)]
    if not sizes or sizes[0] < 1 or not held_out or empty:
        raise TokenizerError(
            f"the sweep has sizes {list(sizes)} and text of {', '.join(held_out) or 'no language'}"
            f"{' (empty: ' + ', '.join(empty) + ')' if empty else ''}: expected sizes of at least 1 and text to measure"
        )
    script_rule(script)
    Choice(model, (), scores)  # unknown scores are refused before the training
    offer = train_offer(model, texts, sizes[-1], character_coverage, presegment)
    rows = [SweepRow(0, len(model.pieces), _measured(model.data, held_out))]
    for size in sizes:
        choice = choose(model, smaller_model(offer.pieces, size), script, divisor, scores)
        data = model.with_appended(choice.scored())
        rows.append(SweepRow(size, len(model.pieces) + len(choice.pieces), _measured(data, held_out)))
    return Sweep(tuple(rows), _knee(rows, next(iter(held_out))))


def smaller_model(pieces: Sequence[Piece], size: int) -> list[Piece]:
    """The pieces of the BPE model of `size` pieces that the same training makes: first merges, all characters."""
    merges = [piece for piece in pieces if len(piece.text) > 1]
    characters = [piece for piece in pieces if len(piece.text) == 1]
    if size < len(characters) or (size == len(characters) and merges):
        raise TokenizerError(
            f"{size} pieces cannot hold the text's alphabet of {len(characters)} characters: sweep sizes above "
            f"{len(characters)}, or lower the character coverage"
        )
    kept = [*merges[: size - len(characters)], *characters]
    return [Piece(piece.text, -float(rank), PieceType.NORMAL) for rank, piece in enumerate(kept)]


def _measured(data: bytes, held_out: Mapping[str, Sequence[str]]) -> dict[str, float]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    per_token = {}
    for language, lines in held_out.items():
        num_tokens = sum(map(len, processor.encode(list(lines))))
        per_token[language] = sum(len(line.encode()) for line in lines) / num_tokens
    return per_token


def _knee(rows: Sequence[SweepRow], language: str) -> int:
    x = [row.vocab_size for row in rows]
    y = [1 / row.bytes_per_token[language] for row in rows]
    if x[-1] == x[0] or y[-1] == y[0]:
        return rows[-1].num_pieces
    below = [(y[0] - b) / (y[0] - y[-1]) - (a - x[0]) / (x[-1] - x[0]) for a, b in zip(x, y, strict=True)]
    return rows[below.index(max(below))].num_pieces
