"""Blocks of documents to token ids: exact and fast in C++ for SentencePiece BPE, the libraries for the rest.

An encoder gives the ids the tokenizer's own library gives, or it is a defect: `check_encoder` compares them.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data import _native
from megatron_cpt.errors import DataError, VerificationError
from megatron_cpt.tokenizer import Tokenizer
from megatron_cpt.tokenizer.loading import SentencePieceTokenizer

_NONE = -1
_SHOWN = 8  # ids shown on each side of a difference
_CHECKED_EVERY = 64  # blocks
_CHECKED_DOCUMENTS = 4  # of such a block
_CHECKED_BYTES = 16 << 10
_BATCH_CHARACTERS = 64 << 10


@dataclass(frozen=True)
class Encoded:
    """The ids of a block.

    Attributes:
        tokens: ids of all documents back to back, bos and eos included, of the dtype asked for.
        lengths: int32, tokens of each document; 0 where its text gives no token (then it has no bos or eos either).
        byte_tokens: how many of them stand for single bytes of characters the vocabulary lacks.
        unknown_tokens: how many of them are the unknown id.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    byte_tokens: int
    unknown_tokens: int


class Encoder(ABC):
    """Encodes blocks; several threads may use one encoder at once, and the ids do not depend on how.

    Attributes:
        name: what encodes: "native", "sentencepiece" or "tokenizers".
        reason: why it is not "native"; empty where it is.
        bos: id put before each document that has tokens, None for none; `eos` behind it.
    """

    name: str
    reason: str = ""

    def __init__(self, bos: int | None, eos: int | None, dtype: np.dtype[Any]) -> None:
        self.bos, self.eos, self._dtype = bos, eos, dtype

    @abstractmethod
    def encode(self, block: _native.Block) -> Encoded:
        """Ids of each document of `block`: [bos] + the text's + [eos]. Any cut into blocks gives the same ids."""


class _NativeEncoder(Encoder):
    name = "native"

    def __init__(self, model: bytes, bos: int | None, eos: int | None, dtype: np.dtype[Any]) -> None:
        super().__init__(bos, eos, dtype)
        self._bpe = _native.BpeEncoder(model)

    def encode(self, block: _native.Block) -> Encoded:
        bos = _NONE if self.bos is None else self.bos
        eos = _NONE if self.eos is None else self.eos
        return Encoded(*self._bpe.encode(block, bos, eos, wide=self._dtype == np.int32))


class _LibraryEncoder(Encoder):
    def __init__(
        self, tokenizer: Tokenizer, bos: int | None, eos: int | None, dtype: np.dtype[Any], name: str, reason: str
    ) -> None:
        super().__init__(bos, eos, dtype)
        self.name, self.reason, self._tokenizer = name, reason, tokenizer
        self._is_byte = np.array([_is_byte(tokenizer.piece(id)) for id in range(tokenizer.vocab_size)])

    def encode(self, block: _native.Block) -> Encoded:
        head, tail = ([] if id is None else [id] for id in (self.bos, self.eos))
        rows: list[npt.NDArray[Any]] = []
        byte_tokens = unknown_tokens = 0
        for batch in _batches(block.texts()):
            for ids in self._tokenizer.encode_batch(batch):
                plain = np.array(ids, self._dtype)
                byte_tokens += int(np.count_nonzero(self._is_byte[plain]))
                if self._tokenizer.unk_id is not None:
                    unknown_tokens += int(np.count_nonzero(plain == self._tokenizer.unk_id))
                rows.append(np.concatenate([head, plain, tail], dtype=self._dtype, casting="unsafe") if ids else plain)
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.concatenate(rows) if rows else np.zeros(0, self._dtype)
        return Encoded(tokens, lengths, byte_tokens, unknown_tokens)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, at most 65,536 characters at a time or one text: the libraries take 100 bytes for each."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def open_encoder(tokenizer: Tokenizer, append_bos: bool, append_eos: bool, dtype: np.dtype[Any]) -> Encoder:
    """The fastest exact encoder there is for a tokenizer.

    Args:
        tokenizer: as `load_tokenizer` gives it.
        append_bos: begin each document that has tokens with the tokenizer's bos.
        append_eos: end it with its eos.
        dtype: of the tokens: uint16 or int32.

    Raises:
        DataError: the tokenizer has no bos or eos to append, its ids do not fit `dtype`, or its file was changed.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.uint16, np.int32):
        raise DataError(f"tokens of type {dtype}: expected uint16 or int32")
    if tokenizer.vocab_size > np.iinfo(dtype).max + 1:
        raise DataError(f"{tokenizer.vocab_size} ids of {tokenizer.path} do not fit {dtype}: use int32")
    bos = _border(tokenizer, "bos", tokenizer.bos_id) if append_bos else None
    eos = _border(tokenizer, "eos", tokenizer.eos_id) if append_eos else None
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return _LibraryEncoder(tokenizer, bos, eos, dtype, "tokenizers", "not a SentencePiece model")
    try:
        model = tokenizer.path.read_bytes()
        if hashlib.sha256(model).hexdigest() != tokenizer.sha256:
            raise DataError(f"{tokenizer.path} was changed while it was in use: load it again")
        return _NativeEncoder(model, bos, eos, dtype)
    except ValueError as caught:
        return _LibraryEncoder(tokenizer, bos, eos, dtype, "sentencepiece", str(caught))


def check_encoder(encoder: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Compare an encoder's ids with those of the tokenizer's own library.

    Args:
        encoder: opened for `tokenizer`, with or without bos and eos.
        texts: what to compare; numbered from 0 in the error.

    Raises:
        VerificationError: the ids of a text differ; the message names it and shows the ids around the first difference.
    """
    found = encoder.encode(_native.Block.from_texts(list(texts)))
    ends = np.cumsum(found.lengths, dtype=np.int64)
    for number, expected in enumerate(tokenizer.encode_batch(list(texts))):
        ids = found.tokens[ends[number] - found.lengths[number] : ends[number]].tolist()
        ids = ids[encoder.bos is not None : len(ids) - (encoder.eos is not None)] if ids else ids
        if ids != expected:
            at = next((k for k, pair in enumerate(zip(ids, expected, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(ids), len(expected)) if at is None else at
            around = slice(max(0, at - _SHOWN), at + _SHOWN)
            raise VerificationError(
                f"text {number} ({texts[number][:40]!r}): around token {at} the {encoder.name} encoder gives"
                f" {ids[around]} and {tokenizer.path} {expected[around]}; this is a defect: report it with the text"
            )


def check_block(encoder: Encoder, tokenizer: Tokenizer, block: _native.Block, source: str, number: int) -> int:
    """Compare a sample of a block's documents, drawn by a fixed seed; most blocks are passed over.

    Blocks 0, 1, 2, 4, 8, ... and every 64th give up to 4 documents of together at most 16 KiB of text, at least
    one; of one that is longer, a stretch of 16 KiB.

    Args:
        encoder: opened for `tokenizer`.
        tokenizer: the reference.
        block: the documents.
        source: what the block is of; with `number` it decides the draw.
        number: the block's place in its source, from 0.

    Returns:
        How many documents were compared; none where the encoder is the reference library itself.

    Raises:
        VerificationError: the ids of a text differ.
    """
    if encoder.name != "native" or not len(block) or (number & (number - 1) and number % _CHECKED_EVERY):
        return 0
    draw = random.Random(f"{source}:{number}")
    drawn = draw.sample(range(len(block)), min(_CHECKED_DOCUMENTS, len(block)))
    sizes = block.document_bytes[drawn]
    keep = np.zeros(len(block), bool)
    keep[[k for k, end in zip(drawn, np.cumsum(sizes), strict=True) if end <= _CHECKED_BYTES] or drawn[:1]] = True
    texts = block.select(keep).texts()
    if len(texts) == 1 and sizes[0] > _CHECKED_BYTES:
        start = draw.randrange(int(sizes[0]) - _CHECKED_BYTES)
        texts = [texts[0].encode()[start : start + _CHECKED_BYTES].decode(errors="ignore")]
    check_encoder(encoder, tokenizer, texts)
    return len(texts)


def _border(tokenizer: Tokenizer, name: str, id: int | None) -> int:
    if id is None:
        raise DataError(
            f"tokenizer {tokenizer.path} has no {name} piece: build without {name} or use another tokenizer"
        )
    return id


def _is_byte(piece: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None
