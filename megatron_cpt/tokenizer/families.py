"""Extend or replace a base of either family: SentencePiece (Llama 1 and 2) or byte-level BPE (Llama 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_level import (
    ByteLevelExtendReport,
    ByteLevelReplaceReport,
    extend_byte_level,
    replace_byte_level,
)
from megatron_cpt.tokenizer.extending import ExtendReport, extend_tokenizer
from megatron_cpt.tokenizer.loading import ByteLevelTokenizer, load_tokenizer
from megatron_cpt.tokenizer.replacing import ReplaceReport, replace_tokenizer

_LEAST_COUNT = 2  # a pair that comes up once is not worth a merge


def extend_base(
    base: str | Path,
    texts: Iterable[str],
    num_pieces: int,
    script: str,
    divisor: int,
    output: str | Path,
    language: str = "",
    character_coverage: float = 0.9995,
    *,
    scores: str = "rank-tail",
    min_count: int = 0,
    pieces: Sequence[str] | None = None,
    presegment: str = "",
) -> ExtendReport | ByteLevelExtendReport:
    """Extend a tokenizer by the way of its family: `extend_tokenizer` or `extend_byte_level`.

    The arguments are those of `extend_tokenizer`. For a byte-level base, whose pieces come of continued
    merges, `min_count` is how often a pair has to come up to be merged (at least 2), all characters are
    covered, and `scores`, `pieces` and `presegment` have no meaning.

    Raises:
        TokenizerError: such an option is given for a byte-level base, or what the two functions raise.
    """
    if not isinstance(load_tokenizer(base), ByteLevelTokenizer):
        return extend_tokenizer(
            base,
            texts,
            num_pieces,
            script,
            divisor,
            output,
            language,
            character_coverage,
            scores=scores,
            min_count=min_count,
            pieces=pieces,
            presegment=presegment,
        )
    _refuse(base, scores=scores != "rank-tail", pieces=pieces is not None, presegment=bool(presegment))
    return extend_byte_level(
        base, texts, num_pieces, script, divisor, output, language, min_count=max(min_count, _LEAST_COUNT)
    )


def replace_base(
    base: str | Path,
    texts: Iterable[str],
    vocab_size: int,
    divisor: int,
    output: str | Path,
    language: str = "",
    character_coverage: float = 0.9995,
    *,
    presegment: str = "",
) -> ReplaceReport | ByteLevelReplaceReport:
    """Replace a tokenizer by the way of its family: `replace_tokenizer` or `replace_byte_level`.

    The arguments are those of `replace_tokenizer`; for a byte-level base all characters are covered and
    `presegment` has no meaning.

    Raises:
        TokenizerError: `presegment` is given for a byte-level base, or what the two functions raise.
    """
    if not isinstance(load_tokenizer(base), ByteLevelTokenizer):
        return replace_tokenizer(
            base, texts, vocab_size, divisor, output, language, character_coverage, presegment=presegment
        )
    _refuse(base, presegment=bool(presegment))
    return replace_byte_level(base, texts, vocab_size, divisor, output, language)


def _refuse(base: str | Path, **given: bool) -> None:
    options = [name for name, is_given in given.items() if is_given]
    if options:
        raise TokenizerError(
            f"{base} is a byte-level BPE tokenizer, for which {' and '.join(options)} has no meaning: its pieces come "
            "of merges that continue its own; leave it out"
        )
