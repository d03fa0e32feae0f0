"""Whether a fastText model file is whole: its library runs for ever, or ends the process, at one that is not.

The file, little endian without gaps: magic and version (i32 each); twelve settings (i32) and one more (f64); the
dictionary: entries, words, labels (i32), tokens, pruned rows or -1 (i64), then for each entry its text, a zero
byte, a count (i64) and a kind (i8), then 8 bytes a pruned row; the input matrix and the output matrix, each behind
a byte that says whether it is quantised.
Source: fastText 0.9.2, fasttext.cc, dictionary.cc, densematrix.cc, quantmatrix.cc, productquantizer.cc, read for
what they do.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_MAGIC = 793712314
_VERSIONS = (11, 12)
_SUPERVISED = 3
_LOSSES = (1, 2, 3, 4)
_BEHIND_TEXT = 9  # bytes of an entry: its count and kind
_CENTROIDS = 256


def check_fasttext_file(path: str) -> None:
    """Raise ValueError, with what is wrong, for a file that is no whole classifier of fastText."""
    if not Path(path).stat().st_size:
        raise ValueError("it is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Model(data).check()


class _Model:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def check(self) -> None:
        magic, version = self.take("<2i", "header")
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError("it does not begin as a model of fastText does")
        dim, *_, ngrams, loss, model, bucket, _, longest, _, _ = self.take("<12id", "settings")
        if model != _SUPERVISED or loss not in _LOSSES or dim < 1:
            raise ValueError("it is no classifier: its settings are of another kind of model")
        if bucket < 0 or (not bucket and (ngrams > 1 or longest > 0)):
            raise ValueError(f"its settings have n-grams and {bucket} places for them; fetch it again")
        words, labels, pruned = self.dictionary()
        self.matrix("vectors of words", words + (bucket if pruned < 0 else pruned), dim)
        self.matrix("vectors of labels", labels, dim)

    def take(self, form: str, what: str) -> tuple[Any, ...]:
        start = self.at
        self.skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, start)

    def skip(self, size: int, what: str) -> None:
        if size < 0 or self.at + size > len(self.data):
            raise ValueError(
                f"its {what} would end behind its {len(self.data)} bytes: it was cut short; fetch it again"
            )
        self.at += size

    def dictionary(self) -> tuple[int, int, int]:
        size, words, labels, _, pruned = self.take("<3i2q", "dictionary")
        if size < 1 or words < 0 or labels < 1 or words + labels != size or pruned < -1:
            raise ValueError(f"its dictionary of {size} entries has {words} words and {labels} labels; fetch it again")
        kinds = [0, 0]
        for _ in range(size):
            end = self.data.find(b"\0", self.at)
            self.skip((end - self.at if end >= 0 else len(self.data)) + 1 + _BEHIND_TEXT, "dictionary")
            kind = self.data[self.at - 1]
            if kind > 1:
                raise ValueError("its dictionary holds what is neither a word nor a label; fetch it again")
            kinds[kind] += 1
        if kinds != [words, labels]:
            raise ValueError(f"its dictionary has {kinds[1]} labels and says {labels}; fetch it again")
        self.skip(8 * max(pruned, 0), "dictionary")
        return words, labels, pruned

    def matrix(self, what: str, rows: int, dim: int) -> None:
        (quantised,) = self.take("<?", what)
        (has_norms,) = self.take("<?", what) if quantised else (False,)
        held = self.take("<2q", what)
        if held[0] < rows or held[1] != dim:
            raise ValueError(f"its {what} are {held[0]} of {held[1]} numbers, expected {rows} of {dim}; fetch it again")
        if not quantised:
            self.skip(4 * held[0] * held[1], what)
            return
        (codes,) = self.take("<i", what)
        self.skip(codes, what)
        if codes != held[0] * self.quantiser(dim, what):
            raise ValueError(f"its {what} have {codes} codes, which are not as many a row; fetch it again")
        if has_norms:
            self.skip(held[0], what)
            self.quantiser(1, what)

    def quantiser(self, dim: int, what: str) -> int:
        """Codes of a row."""
        held, parts, width, last = self.take("<4i", what)
        if held != dim or parts < 1 or not 0 < last <= width or (parts - 1) * width + last != dim:
            raise ValueError(f"its {what} are {parts} codes of {width} for {dim} numbers; fetch it again")
        self.skip(4 * dim * _CENTROIDS, what)
        return int(parts)
