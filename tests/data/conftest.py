"""Texts and a tokenizer of two languages, made here and alike on every machine."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sentencepiece

from megatron_cpt.data import Document

ENGLISH = ["the", "old", "river", "runs", "past", "a", "quiet", "town", "and", "nobody", "asks", "where", "it", "goes"]
JAPANESE = ["古い", "川は", "静かな", "町を", "流れて", "冬に", "水が", "どこへ", "行くか", "誰も", "聞かない。"]


def text_of(number: int) -> str:
    """A text of 1 to 60 words; odd ones are Japanese, some hold what no vocabulary has."""
    draw = random.Random(number)
    words = draw.choices(JAPANESE if number % 2 else ENGLISH, k=draw.randint(1, 60))
    return (("" if number % 2 else " ").join(words) + ("\n\n𠮷 \t¥🙂" if number % 7 == 0 else ""))[
        : draw.randint(1, 300)
    ]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write files beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """120 documents of 40 works."""
    return [Document(text_of(n), "xx", f"memory:{n}", f"work{n // 3}#{n % 3}") for n in range(120)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE model of 400 pieces with byte fallback, bos 1 and eos 2."""
    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text_of(number) for number in range(300)]),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
