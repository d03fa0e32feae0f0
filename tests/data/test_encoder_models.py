"""The encoder against SentencePiece: models of every setting, and texts made to hurt."""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.encoder import check_encoder, open_encoder
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.tokenizer.model_file import Piece, PieceType, read_model_file

FUZZ = int(os.environ.get("FUZZ", "1"))  # `make fuzz` looks so many times longer, at other texts every time

WORDS = """the rather other there's one's cannot Tokyo 12,345 3.14 e.g. <s> </s> <unk> <0x41> hello_world
 --- ... aaaa aaaaaaaaa ababab \u6771\u4eac \u6771\u4eac\u90fd \u65e5\u672c \u65e5\u672c\u8a9e\u306e \u3067\u3059\u3002
 \u3044\u308b \u306a\u3044 \ud55c\uad6d\uc5b4 \ud55c\uad6d Stra\u00dfe \u00fcber caf\u00e9""".split()
SYMBOLS = ["<sep>", "<se", "ab", "\u65e5", "\u65e5\u672c\u8a9e", "\u2581\u2581", "a b", "\u2581the", "!!", "\u3000x"]
ODD = [
    *("\u2581", " ", "  ", "\n", "\t", "\r\n", "\u3000", "\u00a0", "\0", "\ufeff", "\u200b", "\u00ad", "\ufffd"),
    *("\uff21\uff42", "\u2460", "\u3394", "\ufb01", "\u00bd", "\uff76\uff9e", "e\u0301", "\u1100\u1161", "\u0130"),
    *("\U0001f99c", "\U00020bb7", "\U0010ffff", "\u00e9", "\ufdfa", "\u0378", "zq", "Qx", "xyz", "_", "<", "0x"),
]
TIES = {
    "ot",
    "tr",
    "rb",
    "ba",
    "trb",
    "aot",
    "aa",
    "aaa",
    "aaaaa",
    "\u2581\u2581",
    "\u2581\u2581\u2581",
    "Qx",
    "xQ",
    "zq",
}
LONG = ["a" * 60, "ab" * 40, "aaaaa" * 30, "the" * 30, "\u65e5\u672c" * 40, " " * 70, "Qx" * 50]
RULES = "0061 0062 0063\t0078\n0078\t\n0079\t0020 0020 007A\n3042\t0020\n0021\t2581\n65E5 672C\t004A 0050\n"
BASE = dict(model_type="bpe", vocab_size=420, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity")
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(byte_fallback=True, split_digits=True, remove_extra_whitespaces=False),
    "whitespace": dict(byte_fallback=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True),
    "plain": {},
    "unknown": dict(character_coverage=0.98, remove_extra_whitespaces=False),
    "nfkc": dict(normalization_rule_name="nmt_nfkc", byte_fallback=True),
    "folded": dict(normalization_rule_name="nfkc_cf", remove_extra_whitespaces=False),
    "suffix": dict(treat_whitespace_as_suffix=True, byte_fallback=True),
    "suffix nfkc": dict(treat_whitespace_as_suffix=True, normalization_rule_name="nmt_nfkc"),
    "no prefix": dict(add_dummy_prefix=False, byte_fallback=True, remove_extra_whitespaces=False),
    "symbols": dict(user_defined_symbols=SYMBOLS, byte_fallback=True, remove_extra_whitespaces=False),
    "symbols nfkc": dict(user_defined_symbols=SYMBOLS, normalization_rule_name="nmt_nfkc"),
    "controls": dict(control_symbols=["<ctl>", "hello"], user_defined_symbols=["<x>"], byte_fallback=True),
    "across words": dict(split_by_whitespace=False, split_by_unicode_script=False, byte_fallback=True),
    "rules": dict(rules=RULES, byte_fallback=True),
    "rules kept": dict(rules=RULES, user_defined_symbols=SYMBOLS, remove_extra_whitespaces=False),
    "unescaped": dict(byte_fallback=True, remove_extra_whitespaces=False),
    "unescaped symbols": dict(user_defined_symbols=SYMBOLS, normalization_rule_name="nfkc"),
    "unused": dict(byte_fallback=True, remove_extra_whitespaces=False),
    "ties": dict(byte_fallback=True, remove_extra_whitespaces=False),
}


def corpus() -> list[str]:
    draw = random.Random(1)
    return [draw.choice([" ", "", "  "]).join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(400)]


def changed(name: str, path: Path) -> bytes:
    """The model's bytes with what no trainer writes."""
    model = read_model_file(path)
    if name == "unused":
        texts = [piece.text for piece in model.pieces if piece.type is PieceType.NORMAL and len(piece.text) == 2]
        data = model.data
        for text in texts[::2]:  # the type of a piece that is left out is NORMAL: it is written behind the score
            old = text.encode()
            at = data.index(b"\x0a" + bytes([len(old) + 7, 0x0A, len(old)]) + old)
            end = at + 2 + len(old) + 7
            data = data[: at + 1] + bytes([len(old) + 9]) + data[at + 2 : end] + b"\x18\x05" + data[end:]
        return data
    if name.startswith("unescaped"):  # normalizer_spec: escape_whitespaces false
        added = [
            Piece(text, -float(k), PieceType.NORMAL) for k, text in enumerate((" ", " t", "e ", "  ", "   ", "e t"))
        ]
        return model.with_appended(added) + b"\x1a\x02\x28\x00"
    if name == "ties":
        return model.with_appended(
            [Piece(text, -5.0, PieceType.NORMAL) for text in sorted(TIES - {p.text for p in model.pieces})]
        )
    return model.data


@cache
def model(name: str) -> Tokenizer:
    options = BASE | MODELS[name]
    rules = options.pop("rules", None)
    with TemporaryDirectory() as folder:
        if rules:
            Path(folder, "rules.tsv").write_text(rules, encoding="utf-8")
            options.pop("normalization_rule_name")
            options["normalization_rule_tsv"] = str(Path(folder, "rules.tsv"))
        path = Path(folder, "tokenizer.model")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()), model_prefix=str(path.with_suffix("")), **options
        )
        path.write_bytes(changed(name, path))
        loaded = load_tokenizer(path)
        encoders[name] = open_encoder(loaded, False, False, np.dtype(np.uint16))
    return loaded


encoders: dict[str, Any] = {}
TEXTS = st.lists(
    st.one_of(st.sampled_from(WORDS), st.sampled_from(ODD + SYMBOLS + LONG), st.text(max_size=8), st.just(" ")),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name: str) -> None:
    tokenizer = model(name)
    encoder = encoders[name]
    assert (encoder.name, encoder.reason) == ("native", "")
    check_encoder(encoder, tokenizer, corpus()[:100])

    @settings(max_examples=40 * FUZZ, derandomize=FUZZ == 1, deadline=None, database=None)
    @given(st.lists(TEXTS, min_size=10, max_size=10))
    def check(texts: list[str]) -> None:
        check_encoder(encoder, tokenizer, texts)

    check()
