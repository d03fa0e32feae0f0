"""The work on one part of a dataset: parse a block, encode it, append its tokens."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_cpt.data import _native
from megatron_cpt.data.blocks import stop_at_fault
from megatron_cpt.data.counting import Counts
from megatron_cpt.data.encoder import Encoded, Encoder, check_block
from megatron_cpt.data.part import Part
from megatron_cpt.data.writing import check_ids
from megatron_cpt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class _Result:
    encoded: Encoded
    text_bytes: int
    checked: int
    faults: list[tuple[int, str]]


class TokenWork:
    """Encodes the blocks of a part into its files `tokens`, `lengths` (int32) and `faults` (lines of text).

    Some documents of every file are also encoded by the reference library (`check_block`), and one different id
    stops the build; `checked_documents` counts them.

    Args:
        part: the part, at its last commit.
        encoder: may be used by several threads at once.
        tokenizer: the reference.
        held_out: (share, side) to keep, or None for everything.
        on_error: "stop" or "skip".
    """

    def __init__(
        self, part: Part, encoder: Encoder, tokenizer: Tokenizer, held_out: tuple[float, str] | None, on_error: str
    ) -> None:
        self.part, self.encoder, self.tokenizer = part, encoder, tokenizer
        self.held_out, self.on_error = held_out, on_error
        self.counts, self._hash = _restored(part.state)

    def process(self, raw: Any, number: int) -> _Result:
        """Documents of a block to tokens."""
        block = raw.parse()
        if self.on_error == "stop":
            stop_at_fault(block, self.part.input)
        faults = block.faults
        if self.held_out is not None:
            fraction, side = self.held_out
            block = block.select(block.held_out(fraction) == (side == "held_out"))
        encoded = self.encoder.encode(block)
        check_ids(encoded.tokens, encoded.lengths, self.tokenizer.vocab_size, 0)
        checked = check_block(self.encoder, self.tokenizer, block, str(self.part.number), number)
        return _Result(encoded, block.text_bytes, checked, faults)

    def write(self, result: _Result) -> None:
        """Append a block's tokens, lengths and faults, and count them."""
        encoded = result.encoded
        tokens = np.ascontiguousarray(encoded.tokens).view(np.uint8).data
        self.part.write("tokens", tokens)
        self._hash.update(tokens)  # here, beside the encoding of other threads, and not alone at the end
        lengths = encoded.lengths
        self.part.write("lengths", np.ascontiguousarray(lengths[lengths > 0], "<i4").data)
        self.counts.add(encoded, result.text_bytes)
        self.counts.checked_documents += result.checked
        if result.faults:
            self.counts.add_faults(reason for _, reason in result.faults)
            lines = "".join(f"{self.part.input}:{line}: {reason}\n" for line, reason in result.faults)
            self.part.write("faults", lines.encode())

    def state(self) -> dict[str, Any]:
        """The counts and the state of the tokens' hash, as JSON."""
        saved = base64.b64encode(self._hash.saved()).decode()
        return {"counts": dataclasses.asdict(self.counts), "tokens_sha256": saved}


def counts_of(state: Mapping[str, Any]) -> Counts:
    """What `TokenWork.state` has counted."""
    return _restored(state)[0]


def tokens_sha256(state: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the part's file of tokens, up to that state."""
    return _restored(state)[1].digest().hex()


def _restored(state: Mapping[str, Any]) -> tuple[Counts, _native.Sha256]:
    if not state:
        return Counts(), _native.Sha256()
    return Counts(**state["counts"]), _native.Sha256.from_saved(base64.b64decode(state["tokens_sha256"]))
