"""Training: the rules of Llama's tokenizer, the same bytes every time, clear words when it cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import TextMixture, fast_slow_mismatches, load_tokenizer, train_tokenizer
from megatron_cpt.tokenizer.model_file import read_model_file

FILES = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "manifest.json"}


def test_rules_of_llama(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert [tokenizer.piece(id) for id in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert tokenizer.piece(tokenizer.encode("river")[0])[0] == "\u2581"
    digits = [tokenizer.piece(id) for id in tokenizer.encode("12312030")]
    assert digits == ["\u2581", *"12312030"]
    for text in ("  two  spaces ", "ＡＢ①ﬁ", "鬱\t\n\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text, "no character may be normalized away"


def test_folder(base: Path, english: list[str]) -> None:
    assert {path.name for path in base.iterdir()} == FILES
    manifest = json.loads((base / "manifest.json").read_text())
    assert (manifest["kind"], manifest["vocab_size"], manifest["language"]) == ("tokenizer", 450, "en")
    assert manifest["outputs"]["tokenizer.model"] == load_tokenizer(base).sha256


def test_same_bytes_in_every_process(tmp_path: Path, english: list[str], base: Path) -> None:
    code = (
        "import sys, json, pathlib; from megatron_cpt.tokenizer import train_tokenizer;"
        "train_tokenizer(json.load(sys.stdin), 450, pathlib.Path(sys.argv[1]), language='en')"
    )
    for seed in ("1", "2"):
        folder = tmp_path / f"hash{seed}"
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            input=json.dumps(english),
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for name in FILES:
            assert (folder / name).read_bytes() == (base / name).read_bytes(), name


def test_documents_are_cut_into_lines(tmp_path: Path, english: list[str], base: Path) -> None:
    """One document of many lines, CRLF or not, trains as its lines do."""
    train_tokenizer(iter(["\r\n".join(english[:200]) + "\n\n", "\n".join(english[200:])]), 450, tmp_path / "made")
    assert load_tokenizer(tmp_path / "made").sha256 == load_tokenizer(base).sha256


def test_long_lines_are_used(tmp_path: Path) -> None:
    train_tokenizer(["zebra " * 20000], 300, tmp_path / "made")
    assert len(load_tokenizer(tmp_path / "made").encode("zebra zebra")) == 2


def test_more_asked_than_there_is(tmp_path: Path) -> None:
    report = train_tokenizer(["ab ab ab", "", "  "], 1000, tmp_path / "made")
    assert report.requested == 1000
    assert report.vocab_size == load_tokenizer(tmp_path / "made").vocab_size < 300
    assert (report.lines, report.text_bytes) == (1, 8)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "coverage", "message"),
    [
        ([], 400, 0.9995, "empty"),
        (["", " \n\t\n"], 400, 0.9995, "empty"),
        (["fine", "a\ud800b"], 400, 0.9995, "surrogate"),
        (["abcdefghijklmnopqrstuvwxyz"], 270, 1.0, "alphabet of 27 characters"),
        (["text"], 259, 0.9995, "more than the 259"),
        (["text"], 400, 2.0, "character_coverage"),
    ],
)
def test_what_cannot_be_trained(
    tmp_path: Path, texts: list[str], vocab_size: int, coverage: float, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "made", character_coverage=coverage)
    assert list(tmp_path.iterdir()) == [], "nothing may be left behind"


def test_an_error_of_the_source_comes_through(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "a line of text"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(texts(), 300, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(TokenizerError, match="already holds files"):
        train_tokenizer(["text"], 300, tmp_path)
    (tmp_path / "empty").mkdir()
    train_tokenizer(["some text"], 300, tmp_path / "empty")
    assert load_tokenizer(tmp_path / "empty").vocab_size


def test_unigram(unigram: Path, english: list[str], japanese: list[str]) -> None:
    """Sums of its scores are exact in 32 bits, so that long texts are cut alike by both files."""
    manifest = json.loads((unigram / "manifest.json").read_text())
    assert manifest["model_type"] == "unigram" and manifest["normalization"] == "identity"
    model = read_model_file(unigram / "tokenizer.model")
    assert model.type == "unigram" and all((piece.score * 64).is_integer() for piece in model.pieces)
    documents = ["\n".join(english), "\n".join(japanese), " ".join(english * 3)]
    assert fast_slow_mismatches(unigram, [*documents, *english, *japanese])["mismatches"] == 0


def test_a_normalization_is_stated_and_never_half_expressed(tmp_path: Path) -> None:
    texts = ["ﾊﾞｽに乗る ＡＢＣ①", "か\u3099っこう e\u0301te\u0301"] * 20
    for name in ("nfkc", "nmt_nfkc"):
        with pytest.raises(TokenizerError, match="cannot be written as a tokenizer.json"):
            train_tokenizer(texts, 320, tmp_path / name, normalization=name)
        train_tokenizer(texts, 320, tmp_path / name, normalization=name, model_only=True)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"tokenizer.model", "manifest.json"}
        assert json.loads((tmp_path / name / "manifest.json").read_text())["normalization"] == name
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode("ﾊﾞｽ Ａ① か\u3099 e\u0301")) == "バス A1 が é"
        # The reason: the fast normalizer does not do what this model does.
        charsmap = read_model_file(tmp_path / name / "tokenizer.model").normalizer.charsmap
        assert tokenizers.normalizers.Precompiled(charsmap).normalize_str("ﾊﾞ") != "バ"
    for wrong in ({"normalization": "NFC"}, {"model_type": "word"}):
        with pytest.raises(TokenizerError, match="expected one of"):
            train_tokenizer(texts, 320, tmp_path / "new", **wrong)  # type: ignore[arg-type]


def test_a_mixture_is_recorded(tmp_path: Path, english: list[str], japanese: list[str]) -> None:
    mixture = TextMixture({"en": english, "ja": japanese}, {"en": 1, "ja": 1})
    report = train_tokenizer(mixture, 450, tmp_path / "made", language="en,ja")
    assert report.languages == json.loads((tmp_path / "made" / "manifest.json").read_text())["languages"]
    assert report.languages["ja"]["share"] == 0.5
    assert report.text_bytes < sum(len(line.encode()) for line in english + japanese)
