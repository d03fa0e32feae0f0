"""One face for every tokenizer: text to ids and back, without torch or transformers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_cpt.config.manifest import read_json, sha256_file
from megatron_cpt.errors import TokenizerError

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"


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


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` (byte-level BPE and the like), read with the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = sha256_file(path)
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as caught:  # the library raises bare Exception for a broken file
            raise TokenizerError(
                f"{path} is not a tokenizer.json ({caught}): it is damaged or another kind of file; fetch it again"
            ) from None
        # The spelling of a special token inside a text is text, as it is for SentencePiece.
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = _named_specials(path)
        self.bos_id = self._find(named.get("bos_token"), "<s>", "<|begin_of_text|>", "<|endoftext|>")
        self.eos_id = self._find(named.get("eos_token"), "</s>", "<|end_of_text|>", "<|endoftext|>")
        self.unk_id = self._find(named.get("unk_token"), "<unk>")

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order; the library takes the threads it likes, whatever `num_threads` says."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        except (UnicodeEncodeError, TypeError) as caught:
            raise _not_unicode(caught) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return str(self._backend.decode([_checked(id, self) for id in ids], skip_special_tokens=True))

    def piece(self, id: int) -> str:
        """The vocabulary entry of one id; empty for a hole in the vocabulary."""
        piece = self._backend.id_to_token(_checked(id, self))
        return "" if piece is None else str(piece)

    def _find(self, named: str | None, *usual: str) -> int | None:
        for token in (named,) if named is not None else usual:
            id = self._backend.token_to_id(token)
            if id is not None:
                return int(id)
        return None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from its file, or from the folder that holds it.

    Args:
        path: a `tokenizer.model` (under any name ending in .model), a `tokenizer.json`, or a folder with
            one of them; `tokenizer.model` goes first where a folder has both.

    Raises:
        TokenizerError: nothing is there, or the file cannot be read as a tokenizer.
    """
    file = tokenizer_file(path)
    return JsonTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


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
