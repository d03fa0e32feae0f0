"""The base that a new tokenizer grows out of: which family it is of, and the model of a SentencePiece base."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.config.manifest import read_json
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.hf_files import TOKENIZER_CONFIG, check_expressible
from megatron_cpt.tokenizer.loading import (
    JSON_FILE,
    SENTENCEPIECE_FILE,
    ByteLevelTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from megatron_cpt.tokenizer.model_file import ModelFile, read_model_file


def is_byte_level(path: str | Path, **given: bool) -> bool:
    """Whether a base is byte-level BPE, whose pieces come of merges that continue its own.

    Args:
        path: the base's folder or file.
        given: name of each option that has no meaning for such a base, and whether it was given.

    Raises:
        TokenizerError: it is, and one of them was.
    """
    if not isinstance(load_tokenizer(path), ByteLevelTokenizer):
        return False
    options = [name for name, is_given in given.items() if is_given]
    if options:
        raise TokenizerError(
            f"{path} is a byte-level BPE tokenizer, for which {' and '.join(options)} has no meaning: its pieces come "
            "of merges that continue its own; leave it out"
        )
    return True


def read_base(path: str | Path) -> tuple[SentencePieceTokenizer, ModelFile]:
    """The tokenizer of a base model and the content of its model file.

    Args:
        path: a folder with tokenizer.model, or that file.

    Raises:
        TokenizerError: it is not a Llama-like SentencePiece BPE model, or has tokens outside of it.
    """
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise TokenizerError(
            f"{path} has no {SENTENCEPIECE_FILE}, only a {tokenizer.path.name}: only SentencePiece tokenizers "
            "(Llama 1 and 2 and their kin) are read here"
        )
    model = read_model_file(tokenizer.path)
    if model.type != "bpe":
        raise TokenizerError(
            f"{tokenizer.path} is a SentencePiece model of type {model.type}, expected bpe, as Llama's: its pieces "
            "have no merges that others could join"
        )
    check_expressible(model, str(tokenizer.path))
    added = _added_tokens(tokenizer.path.parent, tokenizer.vocab_size)
    if added:
        raise TokenizerError(
            f"{tokenizer.path.parent} adds {len(added)} tokens to its {tokenizer.path.name} (such as {added[0]!r}), "
            "which are not in its model: use the base model without them"
        )
    return tokenizer, model


def _added_tokens(folder: Path, vocab_size: int) -> list[str]:
    """Tokens that a model's folder defines beyond its SentencePiece vocabulary."""
    found: dict[int, str] = {}
    for name in ("added_tokens.json", JSON_FILE, TOKENIZER_CONFIG):
        if not (folder / name).is_file():
            continue
        value = read_json(folder / name, TokenizerError)
        try:
            if name == JSON_FILE:
                found |= {int(token["id"]): token["content"] for token in value.get("added_tokens") or ()}
            elif name == TOKENIZER_CONFIG:
                found |= {int(id): token["content"] for id, token in value.get("added_tokens_decoder", {}).items()}
            else:
                found |= {int(id): token for token, id in value.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as caught:
            raise TokenizerError(f"{folder / name} lists added tokens in an unknown form ({caught!r})") from None
    return [found[id] for id in sorted(found) if id >= vocab_size]
