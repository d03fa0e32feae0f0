"""Which offered pieces join a base vocabulary, and with which scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from struct import pack, unpack

import sentencepiece

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.mixture import lines_of
from megatron_cpt.tokenizer.model_file import ModelFile, Piece, PieceType, without_prefix
from megatron_cpt.tokenizer.scripts import script_rule

SCORES = ("rank-tail", "own-rank", "zero")
_RUN_SCORE = -1e9  # what Llama 2 gives to runs of spaces: far below every rank, so not part of the ranking
_BATCH = 4096


class Choice:
    """Offered pieces on their way into a base vocabulary, and those that were left behind.

    The score decides which merges come first. "rank-tail": the pieces follow in their own order below every
    score of the base, so all merges of the base still come first. "own-rank": a piece keeps its rank in the
    model that offers it, just below the base's piece of the same rank; shorter where the two share a script,
    but it recuts the base's own languages. "zero": all new pieces come first and tie with each other.

    Attributes:
        model: the base.
        scores: how the pieces are scored, one of `SCORES`.
        pieces: what is still chosen, in order, with the scores of the model that offered them.
        dropped: the texts of the pieces left behind, by reason.
    """

    def __init__(self, model: ModelFile, offered: Sequence[Piece], scores: str) -> None:
        if scores not in SCORES:
            raise TokenizerError(f"scores is {scores!r}: expected one of {', '.join(SCORES)}")
        self.model, self.scores = model, scores
        self.pieces = list(offered)
        self.dropped: dict[str, list[str]] = {}

    def scored(self) -> list[Piece]:
        """The chosen pieces with the scores they have in the extended model."""
        return _scored(self.model, self.pieces, self.scores)

    def new_to_the_base(self) -> None:
        """Drop what the base has."""
        known = {piece.text for piece in self.model.pieces}
        self._keep("in_base", [piece for piece in self.pieces if piece.text not in known])

    def of_script(self, script: str) -> None:
        """Drop what has no character of a script."""
        rule = script_rule(script)
        self._keep("script", [piece for piece in self.pieces if rule.search(piece.text)])

    def reachable(self) -> None:
        """Drop what the extended model does not produce for its own surface; see `reachable`."""
        self._keep("unreachable", _reachable(self.model, self.pieces, self.scores))

    def frequent(self, texts: Iterable[str], min_count: int) -> None:
        """Drop what the extended model uses fewer than `min_count` times in the texts.

        A piece stays when a piece that stays is merged through it. What a dropped piece was used for is cut
        into other pieces, so the counts are taken again until none is too low.
        """
        kept = list(self.pieces)
        while kept:
            scored = _scored(self.model, kept, self.scores)
            counts = _counts(self.model.with_appended(scored), texts)
            first = len(self.model.pieces)
            often = [piece.text for id, piece in enumerate(scored, start=first) if counts[id] >= min_count]
            needed = _with_parts(often, [*self.model.pieces, *scored])
            remaining = [piece for piece in kept if piece.text in needed]
            if len(remaining) == len(kept):
                break
            kept = remaining
        self._keep("rare", kept)

    def rounded(self, divisor: int) -> None:
        """Drop the last merges, so that the size is a multiple of `divisor`.

        Merges go before characters: a dropped character would take with it every piece that contains it.
        """
        kept = list(self.pieces)
        while kept and (excess := (len(self.model.pieces) + len(kept)) % divisor):
            last = set(sorted(range(len(kept)), key=lambda place: (len(kept[place].text) > 1, place))[-excess:])
            # A dropped piece may have been a part of one that stays.
            left = [piece for place, piece in enumerate(kept) if place not in last]
            kept = _reachable(self.model, left, self.scores)
        self._keep("divisor", kept)

    def counts(self) -> dict[str, int]:
        """Number of pieces left behind, by reason."""
        return {reason: len(texts) for reason, texts in self.dropped.items()}

    def _keep(self, reason: str, kept: list[Piece]) -> None:
        texts = {piece.text for piece in kept}
        self.dropped[reason] = [piece.text for piece in self.pieces if piece.text not in texts]
        self.pieces = kept


def lost_pieces(model: ModelFile, extended: bytes) -> int:
    """How many pieces of a base its extension no longer produces for their own surface."""
    before, after = (
        sentencepiece.SentencePieceProcessor(model_proto=without_prefix(data)) for data in (model.data, extended)
    )
    ids = [id for id, piece in enumerate(model.pieces) if piece.type is PieceType.NORMAL]
    texts = [model.pieces[id].text for id in ids]
    cuts = zip(ids, before.encode(texts), after.encode(texts), strict=True)
    return sum(old == [id] and new != [id] for id, old, new in cuts)


def _scored(model: ModelFile, pieces: Sequence[Piece], scores: str) -> list[Piece]:
    if scores == "zero":
        return [Piece(piece.text, 0.0, PieceType.NORMAL) for piece in pieces]
    ranked = [piece.score for piece in model.pieces if piece.type is PieceType.NORMAL and piece.score > _RUN_SCORE]
    if scores == "rank-tail":
        lowest = min(ranked)
        return [Piece(piece.text, lowest - rank, PieceType.NORMAL) for rank, piece in enumerate(pieces, start=1)]
    taken = set(ranked)
    scored = []
    for piece in pieces:
        score = piece.score - 0.5
        while score in taken:  # a base that was extended in the same way
            score = _below(score)
        taken.add(score)
        scored.append(Piece(piece.text, score, PieceType.NORMAL))
    return scored


def _below(score: float) -> float:
    """The next lower 32-bit number."""
    (bits,) = unpack("<i", pack("<f", score))
    (lower,) = unpack("<f", pack("<i", bits + 1))  # negative numbers grow with their bits
    return float(lower)


def _reachable(model: ModelFile, pieces: Sequence[Piece], scores: str) -> list[Piece]:
    """Those of the new pieces that the extended model produces for their own surface.

    A piece that is not produced alone is produced nowhere: inside a longer text the same merges happen in
    the same order. So leaving it out changes no encoding. SentencePiece also merges through characters that
    are no pieces, which a tokenizer.json cannot: such pieces count as unreachable.
    """
    alphabet = model.alphabet().union(piece.text for piece in pieces if len(piece.text) == 1)
    spelled = [piece for piece in pieces if alphabet.issuperset(piece.text)]
    data = without_prefix(model.with_appended(_scored(model, spelled, scores)))
    encoded = sentencepiece.SentencePieceProcessor(model_proto=data).encode([piece.text for piece in spelled])
    first = len(model.pieces)
    return [piece for id, (piece, ids) in enumerate(zip(spelled, encoded, strict=True), start=first) if ids == [id]]


def _counts(data: bytes, texts: Iterable[str]) -> Counter[int]:
    """How often a model uses each id in the lines of texts."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    counts: Counter[int] = Counter()
    lines = lines_of(texts)
    while batch := list(islice(lines, _BATCH)):
        counts.update(chain.from_iterable(processor.encode(batch)))
    return counts


def _with_parts(texts: Iterable[str], pieces: Sequence[Piece]) -> set[str]:
    """The texts and every piece that they are merged through."""
    scores = {piece.text: piece.score for piece in pieces if piece.type is PieceType.NORMAL}
    needed: set[str] = set()
    for text in texts:
        needed.add(text)
        parts = list(text)
        needed.update(parts)
        while len(parts) > 1:
            pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
            ranks = [scores.get(pair, -math.inf) for pair in pairs]
            at = ranks.index(max(ranks))
            if ranks[at] == -math.inf:
                break
            needed.add(pairs[at])
            parts[at : at + 2] = [pairs[at]]
    return needed
