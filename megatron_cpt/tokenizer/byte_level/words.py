"""The words of a corpus: what a byte-level tokenizer cuts a text into before it merges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import numpy as np
import tokenizers

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_level.learning import Words

_BATCH = 4096


class Texts:
    """Documents of a corpus, counted and hashed while they pass; empty ones are left out.

    Attributes:
        lines: lines that passed, without empty ones.
        bytes: of the documents in UTF-8.
        sha256: hex SHA-256 of the documents.

    Raises:
        TokenizerError: while it is read, of a text that is not valid Unicode, or at the end if there was none.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self._digest = hashlib.sha256()
        self.lines = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            try:
                data = text.encode()
            except UnicodeEncodeError as caught:
                raise TokenizerError(f"a text is not valid Unicode ({caught}): remove lone surrogates first") from None
            if data.strip():
                self.lines += sum(bool(line.strip()) for line in text.split("\n"))
                self.bytes += len(data)
                self._digest.update(data + b"\n")
                yield text
        if not self.bytes:
            raise TokenizerError(
                "the text to train on is empty: check the corpus files and the name of their text field"
            )

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of what has passed."""
        return self._digest.hexdigest()


def count_words(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each word comes up, in the byte alphabet, as a tokenizer's pre-tokenizer cuts texts."""
    found: Counter[str] = Counter()
    for text in texts:
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        found.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    return found


def cut_words(model: tokenizers.Tokenizer, counts: Mapping[str, int]) -> Words:
    """The words as a bare model cuts them."""
    remaining = iter(counts)
    ids, sizes = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    while batch := list(islice(remaining, _BATCH)):
        encoded = [encoding.ids for encoding in model.encode_batch_fast(batch, add_special_tokens=False)]
        sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        ids.append(np.fromiter((id for word in encoded for id in word), np.int32, int(sizes[-1].sum())))
    return Words(np.concatenate(ids), np.concatenate(sizes), np.fromiter(counts.values(), np.int64, len(counts)))
