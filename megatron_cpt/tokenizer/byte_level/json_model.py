"""A byte-level `tokenizer.json` as a vocabulary and a list of merges, and the same file with others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_cpt.config.manifest import read_json, write_json_atomic, write_text_atomic
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_alphabet import CHARACTERS
from megatron_cpt.tokenizer.hf_files import CHAT_TEMPLATE, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from megatron_cpt.tokenizer.loading import JSON_FILE, ByteLevelTokenizer, load_tokenizer, tokenizer_file

Merge = tuple[str, str]
_PLAIN = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": False}


@dataclass(frozen=True)
class JsonModel:
    """A byte-level BPE tokenizer and what its file holds.

    Attributes:
        tokenizer: reads texts.
        value: the file's JSON.
        vocab: id of each piece, written in the byte alphabet, without added tokens.
        added: id of each added token (special or not). They lie anywhere, in Llama 3 behind all pieces.
        merges: pairs of pieces, the first ranks highest.
    """

    tokenizer: ByteLevelTokenizer
    value: dict[str, Any]
    vocab: dict[str, int]
    added: dict[str, int]
    merges: list[Merge]

    def with_pieces(self, vocab: Mapping[str, int], merges: Sequence[Merge]) -> dict[str, Any]:
        """The file's JSON with another vocabulary and other merges; added tokens keep their ids."""
        # The library counts added tokens from the size of the vocabulary unless they are in it.
        model = {
            **self.value["model"],
            "vocab": dict(sorted({**vocab, **self.added}.items(), key=lambda item: item[1])),
            "merges": [f"{left} {right}" for left, right in merges],  # the form that all versions read
        }
        return {**self.value, "model": model}

    def words_alone(self) -> tokenizers.Tokenizer:
        """The bare model: encodes a word that is already written in the byte alphabet."""
        return bare(self.value)


def read_json_model(path: str | Path) -> JsonModel:
    """Read a byte-level BPE tokenizer whose pieces can be changed.

    Args:
        path: a folder with tokenizer.json, or that file.

    Raises:
        TokenizerError: it is another kind of tokenizer, lacks a byte, or changes words in an unknown way.
    """
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, ByteLevelTokenizer):
        raise TokenizerError(
            f"{tokenizer.path} is not byte-level; expected a {JSON_FILE} with a ByteLevel decoder, as Llama 3's"
        )
    value = read_json(tokenizer.path, TokenizerError)
    model = value["model"]
    odd = [f"{key} {model[key]!r}" for key, usual in _PLAIN.items() if (model.get(key) or None) != (usual or None)]
    if model.get("type", "BPE") != "BPE" or odd:
        raise TokenizerError(
            f"the model of {tokenizer.path} is of type {model.get('type')} ({', '.join(odd) or 'no odd settings'}); "
            "expected BPE without dropout, prefixes, suffixes and byte fallback, as Llama 3's"
        )
    lost = [byte for byte, character in enumerate(CHARACTERS) if character not in model["vocab"]]
    if lost:
        raise TokenizerError(
            f"{tokenizer.path} has no piece for {len(lost)} of the 256 bytes (the first: 0x{lost[0]:02X}): it "
            "cannot spell every text, use a tokenizer that can"
        )
    added = {token.content: id for id, token in tokenizer.backend.get_added_tokens_decoder().items()}
    vocab = {piece: id for piece, id in model["vocab"].items() if piece not in added}
    merges = [_pair(merge) for merge in model["merges"]]
    return JsonModel(tokenizer, value, vocab, added, merges)


def is_byte_level(path: str | Path) -> bool:
    """Whether `path` (a file, or the folder that holds it) is a byte-level tokenizer."""
    return tokenizer_file(path).suffix == ".json" and isinstance(load_tokenizer(path), ByteLevelTokenizer)


def write_folder(folder: Path, value: dict[str, Any], base: Path | None, specials: Mapping[str, str]) -> None:
    """Write tokenizer.json and the configuration files beside it.

    Args:
        folder: where to.
        value: JSON of the tokenizer.
        base: a folder whose settings and chat template are carried over.
        specials: "bos_token" and the like, where the base states none.
    """
    write_text_atomic(folder / JSON_FILE, json.dumps(value, ensure_ascii=False, indent=1))
    settings: dict[str, Any] = {}
    for name in (CHAT_TEMPLATE, SPECIAL_TOKENS_MAP):
        if base is not None and (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if base is not None and (base / TOKENIZER_CONFIG).is_file():
        settings = read_json(base / TOKENIZER_CONFIG, TokenizerError)
        if not isinstance(settings, dict):
            raise TokenizerError(f"{base / TOKENIZER_CONFIG} is not a JSON object: repair it or remove it")
    # This class uses tokenizer.json as it stands; others rebuild it by rules of their own.
    defaults = {**specials, "clean_up_tokenization_spaces": False}
    write_json_atomic(folder / TOKENIZER_CONFIG, {**defaults, **settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def bare(value: dict[str, Any], ignore_merges: bool | None = None) -> tokenizers.Tokenizer:
    """The model of a tokenizer's JSON without all that stands around it; `ignore_merges` overrides its own."""
    around = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = value["model"] if ignore_merges is None else {**value["model"], "ignore_merges": ignore_merges}
    return tokenizers.Tokenizer.from_str(json.dumps({**value, **around, "added_tokens": [], "model": model}))


def _pair(merge: Any) -> Merge:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
