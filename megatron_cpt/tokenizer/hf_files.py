"""The Hugging Face files of a SentencePiece model, giving SentencePiece's ids on every text.

SentencePiece merges the adjacent pair whose concatenation has the highest score, the leftmost of equals.
A `tokenizer.json` ranks its merges by their place in a list. The two agree when the list is sorted by
the score of the merged piece. Equal scores have no place in such a list, with one exception that Llama 2
needs: its runs of spaces, which all have one score. There leftmost-first means "grow the run as far as it
goes", which is what the list does when longer runs stand first.

A Unigram model's scores are summed, in 32 bits there and in 64 here: `training` rounds them so that the
sums agree. A `tokenizer.json` also finds special and byte pieces in a text that spells them; here their
scores are so low that every other reading wins.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import read_json, write_json_atomic, write_text_atomic
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.loading import JSON_FILE, SENTENCEPIECE_FILE, SentencePieceTokenizer
from megatron_cpt.tokenizer.model_file import SPACE, ModelFile, Piece, PieceType, read_model_file

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"

_NEVER_CHOSEN = -1e6  # the score of special and byte pieces in a Unigram tokenizer.json

# Settings of a base model that stay true when its vocabulary grows.
_CARRIED = ("model_max_length", "chat_template", "padding_side")
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_expressible(model: ModelFile, name: str) -> None:
    """Refuse a model whose ids a `tokenizer.json` cannot reproduce.

    Raises:
        TokenizerError: the model normalizes text, has user-defined symbols, pieces with characters that are
            no pieces, or tied scores.
    """
    normalizer = model.normalizer
    if not normalizer.identity or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise TokenizerError(
            f"{name} changes texts before it cuts them ({normalizer}); expected Llama's: the identity, "
            "spaces kept. Train a model with that normalizer"
        )
    if model.rules.treat_whitespace_as_suffix:
        raise TokenizerError(f"{name} writes spaces at the end of pieces; expected at the beginning, as Llama's")
    symbols = [piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED]
    if symbols:
        raise TokenizerError(
            f"{name} has {len(symbols)} user-defined symbols (the first: {symbols[0]!r}); expected none, as in Llama's"
        )
    if model.type == "bpe":
        _check_merges(model, name)


def _check_merges(model: ModelFile, name: str) -> None:
    alphabet = model.alphabet()
    unspelled = [piece.text for piece in _mergeable(model) if not alphabet.issuperset(piece.text)]
    if unspelled:
        raise TokenizerError(
            f"{name} has {len(unspelled)} pieces (such as {unspelled[0]!r}) with a character that is no piece itself; "
            "SentencePiece reaches them, a tokenizer.json cannot: add the characters, or use the original model"
        )
    runs = [piece.score for piece in _mergeable(model) if _is_run(piece.text)]
    scores = Counter(piece.score for piece in _mergeable(model) if not _is_run(piece.text))
    scores.update(set(runs) if len(set(runs)) == 1 else runs)
    tied = sorted(piece.text for piece in _mergeable(model) if scores[piece.score] > 1)
    if tied:
        raise TokenizerError(
            f"{name} has {len(tied)} pieces with equal scores (such as {tied[0]!r} and {tied[-1]!r}), whose order "
            "no tokenizer.json can express; expected strictly falling scores: extend the original tokenizer again"
        )


def merges(model: ModelFile) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, in the order in which SentencePiece merges."""
    normal = {piece.text for piece in model.pieces if piece.type is PieceType.NORMAL}
    ordered = sorted(_mergeable(model), key=lambda piece: (-piece.score, -len(piece.text)))
    return [
        (piece.text[:at], piece.text[at:])
        for piece in ordered
        for at in range(len(piece.text) - 1, 0, -1)
        if piece.text[:at] in normal and piece.text[at:] in normal
    ]


def write_hf_files(folder: Path, base: Path | None = None) -> None:
    """Write tokenizer.json and the two configuration files beside a folder's tokenizer.model.

    Args:
        folder: holds tokenizer.model.
        base: a folder whose tokenizer_config.json may state a length or a chat template to keep.

    Raises:
        TokenizerError: the model cannot be expressed; see `check_expressible`.
    """
    tokenizer = SentencePieceTokenizer(folder / SENTENCEPIECE_FILE)
    model = read_model_file(tokenizer.path)
    check_expressible(model, str(tokenizer.path))
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    ids = {id for id in named.values() if id is not None}
    specials = {key: tokenizer.piece(id) for key, id in named.items() if id is not None}
    write_text_atomic(folder / JSON_FILE, json.dumps(_tokenizer_json(model, tokenizer), ensure_ascii=False, indent=1))
    config = {
        # This class uses tokenizer.json as it stands; LlamaTokenizer would rebuild it by rules of its own,
        # which are not SentencePiece's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **specials,
        "added_tokens_decoder": {str(id): _special_token(tokenizer.piece(id)) for id in sorted(ids)},
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **_carried(base, model),
    }
    write_json_atomic(folder / TOKENIZER_CONFIG, config)
    if base is not None and (base / CHAT_TEMPLATE).is_file():
        shutil.copyfile(base / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    write_json_atomic(folder / SPECIAL_TOKENS_MAP, {key: config[key] for key in _SPECIALS if key in config})


def _special_token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": True}


def _tokenizer_json(model: ModelFile, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    prefix = model.normalizer.add_dummy_prefix
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # Left empty on purpose: an added token is cut out of a text that merely spells it. Whoever wants that
        # (transformers, from tokenizer_config.json) adds the special tokens by name.
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(tokenizer),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _bpe(model, tokenizer) if model.type == "bpe" else _unigram(model, tokenizer),
    }


def _bpe(model: ModelFile, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if tokenizer.unk_id is None else tokenizer.piece(tokenizer.unk_id),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.rules.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: id for id, piece in enumerate(model.pieces)},
        "merges": [f"{left} {right}" for left, right in merges(model)],
    }


def _unigram(model: ModelFile, tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": tokenizer.unk_id,
        "byte_fallback": model.rules.byte_fallback,
        "vocab": [
            [piece.text, piece.score if piece.type is PieceType.NORMAL else _NEVER_CHOSEN] for piece in model.pieces
        ],
    }


def _post_processor(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """Puts BOS before a text when the caller asks for special tokens."""
    if tokenizer.bos_id is None:
        return None
    bos = tokenizer.piece(tokenizer.bos_id)
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, *second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


def _carried(base: Path | None, model: ModelFile) -> dict[str, Any]:
    if base is None or not (base / TOKENIZER_CONFIG).is_file():
        return {}
    settings = read_json(base / TOKENIZER_CONFIG, TokenizerError)
    if not isinstance(settings, dict):
        raise TokenizerError(f"{base / TOKENIZER_CONFIG} is not a JSON object: repair it or remove it")
    carried = {key: settings[key] for key in _CARRIED if key in settings}
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad in {piece.text for piece in model.pieces}:
        carried["pad_token"] = pad
    return carried


def _mergeable(model: ModelFile) -> Iterator[Piece]:
    return (piece for piece in model.pieces if piece.type is PieceType.NORMAL and len(piece.text) > 1)


def _is_run(text: str) -> bool:
    return set(text) == {SPACE}
