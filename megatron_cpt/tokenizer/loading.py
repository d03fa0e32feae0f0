"""One face for every tokenizer: text to ids and back, without torch or transformers."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from megatron_cpt.config.manifest import read_json, sha256_file
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_alphabet import unwritten, written
from megatron_cpt.tokenizer.model_file import SPACE, without_prefix

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"

# "byte": one of the 256 pieces that spell what no other piece holds; "unused": an id that no text ever gives.
PieceKind = Literal["text", "byte", "special", "unused"]
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer(ABC):
    """A tokenizer read from one file.

    Ids of plain text only: no BOS or EOS is added, and the spelling of a special token inside a
    text ("</s>") is text like any other.

    Attributes:
        path: the file that was read.
        sha256: hex SHA-256 of that file, the tokenizer's identity in every manifest.
        vocab_size: true number of ids.
        bos_id: id that begins a document, None where the tokenizer has none; `eos_id`, `unk_id` alike.
    """

    path: Path
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order; `num_threads` never changes the result.

        Raises:
            TokenizerError: a text is not valid Unicode (it holds a lone surrogate).
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Control ids (BOS, EOS) give nothing; broken UTF-8 gives U+FFFD."""

    @abstractmethod
    def piece(self, id: int) -> str:
        """The vocabulary entry of one id, as it is written in the model file."""

    @abstractmethod
    def kind(self, id: int) -> PieceKind:
        """What one id is: a piece of text, a byte piece, a special token, or unused."""

    @abstractmethod
    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes as they are cut inside a text, without a space put before them.

        Bytes that are not valid UTF-8 (parts of a character) get byte pieces, or whatever pieces of a
        byte-level vocabulary hold them.
        """

    def piece_bytes(self, id: int) -> bytes | None:
        """The exact bytes of text that one id stands for; None for special tokens and unused ids.

        This is what pieces of different families have in common: SentencePiece writes a space as U+2581 and
        a byte as `<0x0A>`, a byte-level vocabulary has a character for every byte.
        """
        return None if self.kind(id) in ("special", "unused") else self._bytes(id)

    @abstractmethod
    def _bytes(self, id: int) -> bytes:
        """`piece_bytes` of an id that is text or a byte."""


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`; `processor` is the SentencePiece processor that reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = sha256_file(path)
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as caught:
            raise TokenizerError(
                f"{path} is not a SentencePiece model ({caught}): it is damaged or another kind of file; fetch it again"
            ) from None
        self.vocab_size = self.processor.vocab_size()
        self.bos_id = _present(self.processor.bos_id())
        self.eos_id = _present(self.processor.eos_id())
        self.unk_id = _present(self.processor.unk_id())

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order, encoded by `num_threads` threads."""
        try:
            ids: list[list[int]] = self.processor.encode(list(texts), num_threads=num_threads)
        except (UnicodeEncodeError, TypeError) as caught:
            raise _not_unicode(caught) from None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return str(self.processor.decode([_checked(id, self) for id in ids]))

    def piece(self, id: int) -> str:
        """The piece of one id; a space is written U+2581."""
        return str(self.processor.id_to_piece(_checked(id, self)))

    def kind(self, id: int) -> PieceKind:
        """What one id is, by the type its piece has in the model."""
        id = _checked(id, self)
        if self.processor.is_byte(id):
            return "byte"
        if self.processor.is_unused(id):
            return "unused"
        return "special" if self.processor.is_control(id) or self.processor.is_unknown(id) else "text"

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes as they are cut inside a text; of bytes that are not UTF-8, one byte piece each."""
        ids: list[int | None] = []
        for part, is_text in _parts(data):
            if is_text:
                ids += self._inside.encode(part.decode())
            else:
                ids += [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in part]
        return _complete(ids, data, self)

    @cached_property
    def _inside(self) -> sentencepiece.SentencePieceProcessor:
        data = without_prefix(self.processor.serialized_model_proto())
        return sentencepiece.SentencePieceProcessor(model_proto=data)

    def _bytes(self, id: int) -> bytes:
        return _sentencepiece_bytes(self.piece(id), self.processor.is_byte(id))


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, read with the `tokenizers` library; this class knows those in SentencePiece's manner."""

    def __init__(self, path: Path, backend: tokenizers.Tokenizer) -> None:
        self.path = path
        self.sha256 = sha256_file(path)
        self.backend = backend
        # The spelling of a special token inside a text is text, as it is for SentencePiece.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = _named_specials(path)
        self.bos_id = self._find(named.get("bos_token"), "<s>", "<|begin_of_text|>", "<|endoftext|>")
        self.eos_id = self._find(named.get("eos_token"), "</s>", "<|end_of_text|>", "<|endoftext|>")
        self.unk_id = self._find(named.get("unk_token"), "<unk>")

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as caught:
            raise _not_unicode(caught) from None
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order; the library takes the threads it likes, whatever `num_threads` says."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        except (UnicodeEncodeError, TypeError) as caught:
            raise _not_unicode(caught) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return str(self.backend.decode([_checked(id, self) for id in ids], skip_special_tokens=True))

    def piece(self, id: int) -> str:
        """The vocabulary entry of one id; empty for a hole in the vocabulary."""
        piece = self.backend.id_to_token(_checked(id, self))
        return "" if piece is None else str(piece)

    def kind(self, id: int) -> PieceKind:
        """What one id is; of the added tokens, those marked as special are special and the others text."""
        piece = self.piece(id)
        if id in self._specials:
            return "special"
        if id in self._added:
            return "text"
        return self._kind_of_piece(piece) if piece else "unused"

    def _kind_of_piece(self, piece: str) -> PieceKind:
        return "byte" if self._byte_fallback and _BYTE_PIECE.fullmatch(piece) else "text"

    def _bytes(self, id: int) -> bytes:
        return _sentencepiece_bytes(self.piece(id), self.kind(id) == "byte")

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes as they are cut inside a text; of bytes that are not UTF-8, one byte piece each."""
        ids: list[int | None] = []
        for part, is_text in _parts(data):
            if is_text:
                ids += self._merged(part.decode().replace(" ", SPACE))
            else:
                ids += [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in part]
        return _complete(ids, data, self)

    def _merged(self, written: str) -> list[int | None]:
        """Ids that the model gives to one word, as it is written in the vocabulary."""
        return [token.id for token in self.backend.model.tokenize(written)]

    @property
    def _byte_fallback(self) -> bool:
        return bool(getattr(self.backend.model, "byte_fallback", False))

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _specials(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        named = (self.bos_id, self.eos_id, self.unk_id)
        return frozenset(id for id, token in added.items() if token.special).union(id for id in named if id is not None)

    def _find(self, named: str | None, *usual: str) -> int | None:
        for token in (named,) if named is not None else usual:
            id = self.backend.token_to_id(token)
            if id is not None:
                return int(id)
        return None


class ByteLevelTokenizer(JsonTokenizer):
    """A `tokenizer.json` whose pieces are written in the 256 characters of `byte_alphabet`, as Llama 3's."""

    def _kind_of_piece(self, piece: str) -> PieceKind:
        data = unwritten(piece)
        return "unused" if data is None else "byte" if len(data) == 1 else "text"

    def _bytes(self, id: int) -> bytes:
        piece = self.piece(id)
        data = None if id in self._added else unwritten(piece)
        return piece.encode() if data is None else data

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes as they are cut inside a text.

        Bytes that are not UTF-8 cannot be cut into words first: the merges run over all of them.
        """
        if all(is_text for _, is_text in _parts(data)):
            ids: list[int | None] = list(self.encode(data.decode()))
        else:
            ids = self._merged(written(data))
        return _complete(ids, data, self)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from its file, or from the folder that holds it.

    Args:
        path: a `tokenizer.model` (under any name ending in .model), a `tokenizer.json`, or a folder with
            one of them; `tokenizer.model` goes first where a folder has both.

    Raises:
        TokenizerError: nothing is there, or the file cannot be read as a tokenizer.
    """
    file = tokenizer_file(path)
    if file.suffix != ".json":
        return SentencePieceTokenizer(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as caught:  # the library raises bare Exception for a broken file
        raise TokenizerError(
            f"{file} is not a tokenizer.json ({caught}): it is damaged or another kind of file; fetch it again"
        ) from None
    # The state of a part is its JSON; the part may be a sequence.
    byte_level = backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()
    return (ByteLevelTokenizer if byte_level else JsonTokenizer)(file, backend)


def tokenizer_file(path: str | Path) -> Path:
    """The file that `load_tokenizer(path)` reads.

    Raises:
        TokenizerError: there is none.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix in (".model", ".json"):
            return path
        raise TokenizerError(
            f"{path} is neither a {SENTENCEPIECE_FILE} nor a {JSON_FILE}: name such a file or the folder that holds it"
        )
    if not path.is_dir():
        raise TokenizerError(f"{path} does not exist: expected a folder with {SENTENCEPIECE_FILE} or {JSON_FILE}")
    for name in (SENTENCEPIECE_FILE, JSON_FILE):
        if (path / name).is_file():
            return path / name
    raise TokenizerError(f"{path} holds neither {SENTENCEPIECE_FILE} nor {JSON_FILE}: point to a model's folder")


def _parts(data: bytes) -> list[tuple[bytes, bool]]:
    """Bytes cut into stretches, each with whether it is UTF-8 text."""
    parts: list[tuple[bytes, bool]] = []
    while data:
        try:
            data.decode()
            return [*parts, (data, True)]
        except UnicodeDecodeError as caught:
            if caught.start:
                parts.append((data[: caught.start], True))
            parts.append((data[caught.start : caught.end], False))
            data = data[caught.end :]
    return parts


def _sentencepiece_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


def _complete(ids: Sequence[int | None], data: bytes, tokenizer: Tokenizer) -> list[int]:
    """The ids, with the unknown token's for what has none."""
    known = [tokenizer.unk_id if id is None else id for id in ids]
    found = [id for id in known if id is not None]
    if len(found) < len(ids) or (data and not ids):
        raise TokenizerError(
            f"{tokenizer.path} has no pieces for the bytes {data!r}: expected a vocabulary that holds all 256 bytes, "
            "byte-level or with byte fallback"
        )
    return found


def _present(id: int) -> int | None:
    return id if id >= 0 else None


def _checked(id: int, tokenizer: Tokenizer) -> int:
    if not 0 <= id < tokenizer.vocab_size:
        raise TokenizerError(f"id {id} is not in {tokenizer.path}: expected 0 to {tokenizer.vocab_size - 1}")
    return int(id)


def _not_unicode(caught: Exception) -> TokenizerError:
    return TokenizerError(f"a text is not valid Unicode ({caught}): remove lone surrogates before tokenizing")


def _named_specials(path: Path) -> dict[str, str]:
    """Special tokens that the tokenizer_config.json beside a tokenizer.json names."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return {}
    values: Any = read_json(config, TokenizerError)
    if not isinstance(values, dict):
        raise TokenizerError(f"{config} holds {json.dumps(values)[:40]}, expected a JSON object")
    named = {}
    for key in ("bos_token", "eos_token", "unk_token"):
        value = values.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[key] = content
    return named
