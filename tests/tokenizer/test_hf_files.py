"""tokenizer.json gives SentencePiece's ids on every text; transformers, which users load it with, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import extend_tokenizer
from megatron_cpt.tokenizer.hf_files import check_expressible, merges, write_hf_files
from megatron_cpt.tokenizer.model_file import ModelFile, Normalizer, Piece, PieceType, TrainingRules, read_model_file
from megatron_cpt.tokenizer.training import LLAMA_NORMALIZER, train_model
from megatron_cpt.tokenizer.verify import HARD_TEXTS

MODELS = ("base", "extended", "with_runs", "replaced", "unigram")
TEXTS = (
    *HARD_TEXTS,
    "\n\n",
    "a\r\nb",
    " the  river ",
    "\u3000静かな\u3000川",
    "静かな river 流れて",
    "</s>",
    "<s><s>",
    "<s>鬱<0x0A></s><unk>\x80é",
    "é\u0301𝕏ﷺ",
    *(" " * length + "x" for length in range(1, 50)),
    *("x" + " " * length for length in range(1, 50)),
)

# Characters that meet in real texts and have pieces in the models, beside any character at all.
ALPHABET = " \u2581\t\n\r\u3000\u200d静かな川町流れて駅の「」。、ー👩🙂é０Ａthervnia0123<s>/"
texts = st.one_of(
    st.text(st.sampled_from(ALPHABET), max_size=60),
    st.text(st.sampled_from(" \u2581a"), max_size=80),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)


@cache
def pair(folder: Path) -> tuple[sentencepiece.SentencePieceProcessor, tokenizers.Tokenizer]:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return slow, tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_same(folder: Path, text: str) -> None:
    slow, fast = pair(folder)
    ids = slow.encode(text)
    assert fast.encode(text, add_special_tokens=False).ids == ids
    assert fast.decode(ids) == slow.decode(ids)


@pytest.mark.parametrize("model", MODELS)
def test_fixed_texts(model: str, request: pytest.FixtureRequest, english: list[str], japanese: list[str]) -> None:
    folder = request.getfixturevalue(model)
    for text in (*TEXTS, *english, *japanese, "\n".join(english[:50])):
        assert_same(folder, text)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=400, deadline=None)
@given(text=texts)
def test_any_text(model: str, request: pytest.FixtureRequest, text: str) -> None:
    assert_same(request.getfixturevalue(model), text)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ranking(data: st.DataObject, base: Path, rebuild: Callable[[ModelFile, Sequence[Piece]], bytes]) -> None:
    """Models whose pieces are ranked at random, not as training would: the order of merges has to hold."""
    model = read_model_file(base / "tokenizer.model")
    words = ["a", "b", "\u2581"]
    for _ in range(data.draw(st.integers(2, 14))):
        word = data.draw(st.sampled_from(words)) + data.draw(st.sampled_from(words))
        if len(word) <= 10 and word not in words:
            words.append(word)
    ranks = data.draw(st.permutations(range(len(words))))
    tied = data.draw(st.booleans())
    specials = [piece for piece in model.pieces if piece.type is not PieceType.NORMAL]
    pieces = list(specials)
    for word, rank in zip(words, ranks, strict=True):
        score = -1e9 if tied and set(word) == {"\u2581"} else -float(rank)
        pieces.append(Piece(word, score, PieceType.NORMAL))
    made = replace(model, pieces=tuple(pieces))
    slow = sentencepiece.SentencePieceProcessor(model_proto=rebuild(model, pieces))
    vocabulary = {piece.text: id for id, piece in enumerate(pieces)}
    bpe = tokenizers.models.BPE(vocabulary, merges(made), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    fast = tokenizers.Tokenizer(bpe)
    for text in data.draw(st.lists(st.text("ab\u2581", min_size=1, max_size=40), min_size=5, max_size=20)):
        assert fast.encode("\u2581" + text).ids == slow.encode(text), text


@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_agrees(extended: Path, tmp_path: Path, with_config: bool, japanese: list[str]) -> None:
    for file in extended.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    slow, _ = pair(extended)
    plain = [text for text in TEXTS if "<s>" not in text and "</s>" not in text and "<unk>" not in text]
    for text in (*plain, *japanese[:100]):
        assert loaded.encode(text, add_special_tokens=False) == slow.encode(text), text
    literal = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for text in TEXTS:
        assert literal.encode(text, add_special_tokens=False) == slow.encode(text), text
    assert loaded.encode("the river") == [1, *slow.encode("the river")]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    assert len(loaded) == slow.vocab_size()
    assert loaded.decode([1, *slow.encode(" the  river"), 2], skip_special_tokens=True) == " the  river"


def test_without_byte_fallback(base: Path, tmp_path: Path, english: list[str], japanese: list[str]) -> None:
    """Characters without a piece are unknown, neighbours together, in both files."""
    trained = train_model(english, 120, TrainingRules(split_digits=True), LLAMA_NORMALIZER, 0.9995)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "tokenizer.model").write_bytes(trained.model.data)
    write_hf_files(old)
    extend_tokenizer(old, japanese, 120, "ja", 8, new)
    for folder in (old, new):
        for text in (*TEXTS, *japanese[:50], "the 鬱鬱 river鬱"):
            slow, fast = pair(folder)
            assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text), text
    assert 0 in pair(new)[0].encode("鬱")


def test_settings_of_the_base_are_kept(base: Path, tmp_path: Path, japanese: list[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    settings_of_base = {"model_max_length": 4096, "pad_token": {"content": "</s>"}, "tokenizer_class": "LlamaTokenizer"}
    (old / "tokenizer_config.json").write_text(json.dumps(settings_of_base))
    (old / "chat_template.jinja").write_text("{{ messages }}")
    extend_tokenizer(old, japanese, 100, "ja", 8, new)
    config = json.loads((new / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["pad_token"]) == (4096, "</s>")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast", "LlamaTokenizer would rebuild the merges"
    assert json.loads((new / "special_tokens_map.json").read_text())["pad_token"] == "</s>"
    assert (new / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_cannot_be_expressed(base: Path) -> None:
    model = read_model_file(base / "tokenizer.model")
    check_expressible(model, "base")
    tied = [Piece(text, 0.5, PieceType.NORMAL) for text in ("ts", "st")]
    runs = [Piece("\u2581" * length, -1e9, PieceType.NORMAL) for length in (9, 10)]
    cases = {
        "equal scores": replace(model, pieces=(*model.pieces, *tied)),
        "pieces with equal scores": replace(model, pieces=(*model.pieces, *runs)),
        "a character that is no piece": replace(model, pieces=(*model.pieces, Piece("t鬱", 0.5, PieceType.NORMAL))),
        "user-defined": replace(model, pieces=(*model.pieces, Piece("<mask>", 0.0, PieceType.USER_DEFINED))),
        "replacements of 300,000 bytes": replace(
            model, normalizer=Normalizer(charsmap=b"x" * 300_000, remove_extra_whitespaces=False)
        ),
        "end of pieces": replace(model, rules=replace(model.rules, treat_whitespace_as_suffix=True)),
    }
    for message, case in cases.items():
        with pytest.raises(TokenizerError, match=message):
            check_expressible(case, "base")
