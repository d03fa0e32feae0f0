"""What is counted of a corpus while it is encoded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from megatron_cpt.data.encoder import Encoded

_QUOTED = re.compile(r"('.*?'(?!\w))")
_NUMBER = re.compile(r"(?<![\w.-])\d+(?!\w)")  # by itself: UTF-8 has none


@dataclass
class Counts:
    """Sums over documents; the fields are those of the manifest.

    Attributes:
        documents: documents with at least one token.
        empty_documents: documents without one, which are left out.
        text_bytes: UTF-8 bytes of the texts.
        tokens: tokens, bos and eos included.
        byte_tokens: tokens that are single bytes of characters without a piece.
        unknown_tokens: tokens that say only that something unknown stood there.
        longest_document: tokens of the longest document.
        checked_documents: documents whose ids were compared with the reference library's.
        faults: reason -> records left out for it.
    """

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    unknown_tokens: int = 0
    longest_document: int = 0
    checked_documents: int = 0
    faults: dict[str, int] = field(default_factory=dict)

    def add(self, encoded: Encoded, text_bytes: int) -> None:
        """Count one block's tokens and its bytes of text."""
        full = int(np.count_nonzero(encoded.lengths))
        self.documents += full
        self.empty_documents += len(encoded.lengths) - full
        self.text_bytes += text_bytes
        self.tokens += len(encoded.tokens)
        self.byte_tokens += encoded.byte_tokens
        self.unknown_tokens += encoded.unknown_tokens
        self.longest_document = max(self.longest_document, int(encoded.lengths.max(initial=0)))

    def add_faults(self, reasons: Iterable[str]) -> None:
        """Count faults under their kinds."""
        for reason in reasons:
            kind = fault_kind(reason)
            self.faults[kind] = self.faults.get(kind, 0) + 1

    def include(self, other: Counts) -> None:
        """Add another part's sums."""
        for name in ("documents", "empty_documents", "text_bytes", "tokens", "byte_tokens", "unknown_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_document = max(self.longest_document, other.longest_document)
        self.checked_documents += other.checked_documents
        for reason, count in other.faults.items():
            self.faults[reason] = self.faults.get(reason, 0) + count


def fault_kind(reason: str) -> str:
    """The reason of a fault without what differs from one record to the next."""
    parts = _QUOTED.split(reason)  # every second one is a name, which stays as it is
    kind = ""
    for number, part in enumerate(parts):
        if number % 2:
            kind += part
            continue
        before, detail, _ = part.partition(" (")
        kind += _NUMBER.sub("N", before)
        if detail:
            break
    return kind


def manifest_counts(counts: Counts) -> dict[str, Any]:
    """The counts as entries of a manifest, with the two ratios that compare tokenizers."""
    return {
        **dataclasses.asdict(counts),
        "bytes_per_token": counts.text_bytes / max(1, counts.tokens),
        "byte_token_share": counts.byte_tokens / max(1, counts.tokens),
    }
