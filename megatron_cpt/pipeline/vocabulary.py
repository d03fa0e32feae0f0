"""The tokenizer step of a run: the base's vocabulary fitted to the target language."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.config.schema import TokenizerConfig
from megatron_cpt.pipeline.corpus import Corpus
from megatron_cpt.tokenizer import TextMixture, extend_tokenizer, load_tokenizer, replace_tokenizer


class _TrainTexts:
    """The training side of a corpus; reading begins again with each iteration."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self._corpus.train())


def adapt_tokenizer(
    config: TokenizerConfig, base: Path, source: Corpus, target: Corpus, output: Path
) -> dict[str, Any]:
    """Make the tokenizer that a run trains with; returns what was done, nothing where the base's is kept.

    Args:
        config: the recipe's section.
        base: folder of the base's tokenizer.
        source: text of the base's language, for a replacement.
        target: text of the new language.
        output: folder to write.
    """
    if config.method == "extend":
        extension = extend_tokenizer(
            base,
            _TrainTexts(target),
            config.num_pieces,
            config.script,
            config.divisor,
            output,
            target.language,
            scores=config.scores,
            min_count=config.min_count,
            presegment=config.presegment,
        )
        return {"extension": dataclasses.asdict(extension)}
    if config.method == "replace":
        share = config.source_share
        balance = None if share is None else {source.language: share, target.language: 1 - share}
        texts = {corpus.language: _TrainTexts(corpus) for corpus in (source, target)}
        # The base's size, rounded down, where none is stated.
        size = config.vocab_size or load_tokenizer(base).vocab_size // config.divisor * config.divisor
        replacement = replace_tokenizer(
            base,
            TextMixture(texts, balance),
            size,
            config.divisor,
            output,
            ",".join(texts),
            presegment=config.presegment,
        )
        return {"replacement": dataclasses.asdict(replacement)}
    return {}
