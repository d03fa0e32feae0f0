"""What methods read beside the vocabulary map: both tokenizers, and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_cpt.errors import InputError
from megatron_cpt.tokenizer import Tokenizer

Side = Literal["source", "target"]
ReadTexts = Callable[[Sequence[str], Side], Iterable[str]]
Made = TypeVar("Made")
_BATCH_BYTES = 1 << 22


@dataclass(frozen=True, eq=False)
class Inputs:
    """Both tokenizers, and a way to texts.

    Attributes:
        old: the base model's tokenizer.
        new: the one it shall have.
        read_texts: gives the texts of the files that a setting names; where it names none, those that the
            caller has at hand for the source or the target language, or an error.
    """

    old: Tokenizer
    new: Tokenizer
    read_texts: ReadTexts
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """`make()`, kept under its key: what is the same for both matrices is made for the first."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


class Reading:
    """The first `max_bytes` bytes of texts in batches, and afterwards the facts of what was read."""

    def __init__(self, texts: Iterable[str], max_bytes: int, name: str = "corpus") -> None:
        self._texts, self._max_bytes, self._name = texts, max_bytes, name
        self._num_texts = self._num_bytes = 0
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[list[str]]:
        batch: list[str] = []
        held = 0
        for text in self._texts:
            data = text.encode("utf-8", "surrogatepass")
            if self._num_texts and self._num_bytes + len(data) > self._max_bytes:
                break
            self._num_texts += 1
            self._num_bytes += len(data)
            self._hash.update(len(data).to_bytes(8, "little") + data)
            batch.append(text)
            held += len(data)
            if held >= _BATCH_BYTES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch
        if not self._num_bytes:
            raise InputError(f"the {self._name} of a surgery method holds no text: name files with text in them")

    def facts(self) -> dict[str, Any]:
        """Number of texts and bytes, and the SHA-256 of them."""
        return {"texts": self._num_texts, "bytes": self._num_bytes, "sha256": self._hash.hexdigest()}
