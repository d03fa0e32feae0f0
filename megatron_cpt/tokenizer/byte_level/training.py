"""Train a byte-level BPE tokenizer with Llama 3's rules."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_alphabet import CHARACTERS
from megatron_cpt.tokenizer.byte_level.json_model import write_folder
from megatron_cpt.tokenizer.byte_level.words import Texts
from megatron_cpt.tokenizer.training import TrainReport, languages_of, write_tokenizer_manifest

# How Llama 3 cuts a text into words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>")


def train_byte_level(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    specials: Sequence[str] = SPECIALS,
    language: str = "",
) -> TrainReport:
    """Train a byte-level BPE tokenizer as Llama 3's and write it as a Hugging Face tokenizer folder.

    No normalizer; Llama 3's words; no BOS inside `tokenizer.json`'s ids unless special tokens are asked for; a
    word that is a piece is that piece (`ignore_merges`); special tokens behind all pieces.

    Args:
        texts: documents, consumed once.
        vocab_size: ids to aim at, bytes and special tokens included; fewer where the text has no more pairs.
        output: a new or empty folder.
        specials: special tokens; the first is BOS, the second EOS.
        language: recorded in the manifest.

    Raises:
        TokenizerError: no text, too small a size, fewer than two specials, or an output that is taken.
    """
    output = Path(output)
    check_free(output, TokenizerError)
    if len(specials) < 2 or len(set(specials)) < len(specials):
        raise TokenizerError(f"the special tokens are {list(specials)}: expected at least BOS and EOS, each once")
    if vocab_size < len(CHARACTERS) + len(specials):
        raise TokenizerError(
            f"vocab_size is {vocab_size}, expected at least the {len(CHARACTERS) + len(specials)} byte and special ids"
        )
    read = Texts(texts)
    value = train_value(read, vocab_size - len(specials), _llama3())
    made = tokenizers.Tokenizer.from_str(json.dumps(value))
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in specials])
    bos = specials[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, made.token_to_id(bos))]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    report = TrainReport(made.get_vocab_size(), vocab_size, read.lines, read.bytes, languages_of(texts))
    with new_folder(output, TokenizerError) as folder:
        named = {"bos_token": bos, "eos_token": specials[1]}
        write_folder(folder, json.loads(made.to_str()), None, named)
        write_tokenizer_manifest(folder, {"texts": read.sha256}, vocab_size=report.vocab_size, language=language)
    return report


def train_value(texts: Iterable[str], num_pieces: int, value: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a tokenizer with newly trained pieces and without added tokens.

    Args:
        texts: documents.
        num_pieces: pieces to aim at, the 256 bytes included; the merged ones follow in the order of their merges.
        value: JSON of the tokenizer whose rules count: normalizer, words, how pieces are matched.
    """
    model = {**value["model"], "vocab": {}, "merges": []}
    untrained = {**value, "model": model, "added_tokens": [], "post_processor": None}
    made = tokenizers.Tokenizer.from_str(json.dumps(untrained))
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces, initial_alphabet=list(CHARACTERS), show_progress=False, special_tokens=[]
    )
    made.train_from_iterator(texts, trainer)
    return dict(json.loads(made.to_str()))


def _llama3() -> dict[str, Any]:
    """The JSON of a tokenizer with Llama 3's rules and no pieces."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return dict(json.loads(made.to_str()))
