"""Scorers of KenLM and fastText, on models written here byte by byte; figures worked out by hand.

The libraries are optional. Every test runs with a stand-in that reads the same model files, and once more with the
library where it is installed.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import sentencepiece

from megatron_cpt.data import read_documents
from megatron_cpt.data.cleaning.fasttext_file import check_fasttext_file
from megatron_cpt.data.cleaning.plugins import FasttextLanguage, KenlmPerplexity, open_scorers
from megatron_cpt.data.cleaning.profiles import ScorerConfig, load_profile
from megatron_cpt.data.cleaning.run import clean_files
from megatron_cpt.errors import DataError

ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-2.0\t<unk>\t0
0\t<s>\t-0.3
-1.0\t</s>\t0
-0.7\t猫\t-0.2
-0.9\tdog\t-0.1

\\2-grams:
-0.5\t<s> 猫
-0.4\t猫 dog
-0.6\tdog </s>

\\end\\
"""
VECTORS = {"</s>": (0.0, 0.0), "der": (2.0, 0.0), "the": (0.0, 2.0)}
LABELS = {"__label__de": (1.0, -1.0), "__label__en": (-1.0, 1.0)}
SURE = 1 / (1 + math.exp(-2))  # one known word and </s>: the mean vector is (1, 0) or (0, 1)


class NgramModel:
    """What kenlm.Model does with a file of two orders: Katz back-off."""

    def __init__(self, path: str, config: Any) -> None:
        assert config.show_progress is False
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        if lines[0] != "\\data\\":
            raise OSError(f"Cannot read model {path!r}")
        rows = [line.split("\t") for line in lines if "\t" in line]
        self._log10 = {tuple(row[1].split(" ")): float(row[0]) for row in rows}
        self._back_off = {row[1]: float(row[2]) for row in rows if len(row) > 2}

    def score(self, sentence: str, bos: bool, eos: bool) -> float:
        assert bos and eos
        words = ["<s>", *(word.decode() for word in sentence.encode().split()), "</s>"]
        words = [word if (word,) in self._log10 else "<unk>" for word in words]
        pairs = zip(words, words[1:], strict=False)
        return sum(
            self._log10[a, b] if (a, b) in self._log10 else self._back_off[a] + self._log10[b,] for a, b in pairs
        )


class LineClassifier:
    """What fasttext's models do with a file of words and a softmax."""

    def __init__(self, path: str) -> None:
        data = Path(path).read_bytes()
        if len(data) < 8 or struct.unpack_from("<i", data)[0] != 793712314:
            raise ValueError(f"{path} has wrong file format!")
        self._vectors, self._labels = VECTORS, LABELS

    def predict(self, line: str, k: int) -> tuple[Sequence[str], Sequence[float]]:
        assert "\n" not in line
        known = [self._vectors[word] for word in [*line.replace("\0", " ").split(), "</s>"] if word in self._vectors]
        x, y = (sum(one[axis] for one in known) / len(known) for axis in (0, 1))
        weights = {name: math.exp(a * x + b * y) for name, (a, b) in self._labels.items()}
        best = sorted(weights, key=lambda name: -weights[name])[: k if k > 0 else None]
        return tuple(best), [weights[name] / sum(weights.values()) + 1e-5 for name in best]


def stand_in(name: str, **holds: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(holds)
    return module


@pytest.fixture(params=["stand-in", *(["installed"] if find_spec("kenlm") and find_spec("fasttext") else [])])
def libraries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-in":
        kenlm = stand_in(
            "kenlm", Model=NgramModel, Config=SimpleNamespace, ARPALoadComplain=SimpleNamespace(NONE="none")
        )
        monkeypatch.setitem(sys.modules, "kenlm", kenlm)
        monkeypatch.setitem(sys.modules, "fasttext", stand_in("fasttext", load_model=LineClassifier))
    return str(request.param)


@pytest.fixture
def arpa(tmp_path: Path) -> str:
    (tmp_path / "model.arpa").write_text(ARPA, encoding="utf-8")
    return str(tmp_path / "model.arpa")


def model_bytes(quantised: bool = False) -> bytes:
    """A fastText model, version 12 of its format: supervised, softmax, two dimensions."""
    settings = (2, 5, 1, 1, 5, 1, 3, 3, 0, 0, 0, 100)
    data = struct.pack("<2i12id", 793712314, 12, *settings, 1e-4)
    data += struct.pack("<3i2q", len(VECTORS) + len(LABELS), len(VECTORS), len(LABELS), 100, -1)
    for kind, names in enumerate((VECTORS, LABELS)):
        data += b"".join(name.encode() + struct.pack("<bqb", 0, 9 - kind, kind) for name in names)
    for rows in (VECTORS, LABELS):
        values = b"".join(struct.pack("<2f", *row) for row in rows.values())
        if quantised:  # a row is a length and a direction: the codes of each are places among 256
            centroids = values + bytes(2048 - len(values))
            data += struct.pack("<2?2qi", True, True, len(rows), 2, len(rows)) + bytes(range(len(rows)))
            data += struct.pack("<4i", 2, 1, 2, 2) + centroids
            data += bytes(len(rows)) + struct.pack("<4i256f", 1, 1, 1, 1, *[1.0] * 256)
        else:
            data += struct.pack("<?2q", False, len(rows), 2) + values
    return data


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    (tmp_path / "model.bin").write_bytes(model_bytes())
    return str(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("text", "log10", "tokens"),
    [
        ("猫 dog", -0.5 - 0.4 - 0.6, 3),
        ("dog", -0.3 - 0.9 - 0.6, 2),
        ("\n猫 dog\r\n\n \u3000\n猫\u3000dog\n", 2 * (-0.5 - 0.4 - 0.6), 6),  # blank lines are no sentences
        ("zebra", -0.3 - 2.0 - 1.0, 2),
        ("猫 <s> dog", -0.5 - 0.2 - 2.0 - 0.9 - 0.6, 4),  # from a text these are words like others
        ("</s>", -0.3 - 2.0 - 1.0, 2),
        ("zebra " * 2, -0.3 - 2.0 - 2.0 - 1.0, 3),
    ],
)
def test_perplexity_is_per_word_and_end_of_line(
    libraries: str, arpa: str, text: str, log10: float, tokens: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert KenlmPerplexity(arpa).score([text]) == [pytest.approx(10 ** (-log10 / tokens), rel=1e-6)]
    assert capfd.readouterr() == ("", ""), "loading is quiet"


def test_perplexity_is_per_piece_where_pieces_are_asked_for(libraries: str, arpa: str, tokenizer: Path) -> None:
    line = "the old 猫"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).encode(line, out_type=str)
    assert not {"猫", "dog"} & set(pieces), "every piece is unknown to the n-grams"
    log10 = -0.3 - 2.0 * len(pieces) - 1.0
    found = KenlmPerplexity(arpa, pieces=str(tokenizer)).score([line, ""])
    assert found[0] == pytest.approx(10 ** (-log10 / (len(pieces) + 1)), rel=1e-6)
    assert math.isnan(found[1])


def test_language_is_the_probability_of_its_label(libraries: str, classifier: str) -> None:
    german = FasttextLanguage(classifier, "de", characters=7)
    texts = ["der", "the", "der\nthe", "zebra", "", "der zzz the the the", "der\x00"]
    expected = [SURE, 1 - SURE, 0.5, 0.5, 0.5, SURE, SURE]
    assert german.score(texts) == pytest.approx(expected, abs=2e-5)
    assert FasttextLanguage(classifier, "en").score(["the " * 500]) <= [1.0]


def test_a_language_the_model_does_not_know_is_refused(libraries: str, classifier: str) -> None:
    with pytest.raises(DataError, match="has no language 'deu'; it has de"):
        FasttextLanguage(classifier, "deu")


@pytest.mark.parametrize(
    ("use", "option"), [("kenlm", "model"), ("kenlm", "pieces"), ("fasttext", "model")], ids=lambda value: str(value)
)
def test_files_that_are_no_models_are_refused_with_their_name(
    libraries: str, arpa: str, tmp_path: Path, use: str, option: str
) -> None:
    (tmp_path / "broken").write_text("nonsense" * 9)
    options: dict[str, str | float | bool] = {"model": arpa} if option == "pieces" else {}
    options |= {option: str(tmp_path / "broken")} | ({"language": "de"} if use == "fasttext" else {})
    with pytest.raises(DataError, match=r"the model .*broken of a scorer cannot be loaded"):
        open_scorers({"x": ScorerConfig(use=use, options=options)})
    with pytest.raises(DataError, match="does not exist"):
        open_scorers({"x": ScorerConfig(use=use, options={**options, option: "none"})})


@pytest.mark.parametrize("quantised", [False, True])
def test_a_classifier_that_is_not_whole_is_refused_before_the_library_sees_it(quantised: bool, tmp_path: Path) -> None:
    data, path = model_bytes(quantised), tmp_path / "model"
    path.write_bytes(data)
    check_fasttext_file(str(path))
    for end in [*range(min(len(data), 400)), *range(400, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="it was cut short" if end else "it is empty"):
            check_fasttext_file(str(path))
    places = {
        0: "does not begin as",
        8: "its vectors of words are 3 of 2 numbers, expected 3 of",  # dim
        28: "n-grams and 0 places for them",  # longest n-grams
        32: "it is no classifier",  # loss
        36: "it is no classifier",  # model
        68: "its dictionary of",
        72: "its dictionary of",  # words
        109: "neither a word nor a label",
    }
    for place, message in places.items():
        changed = bytearray(data)
        changed[place] += 2
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            check_fasttext_file(str(path))


def test_a_classifier_cut_short_is_told_by_its_name(libraries: str, classifier: str) -> None:
    os.truncate(classifier, 100)
    with pytest.raises(DataError, match="the model .*model.bin of a scorer cannot be loaded: its dictionary would end"):
        FasttextLanguage(classifier, "de")


@pytest.mark.parametrize(("module", "package"), [("kenlm", "kenlm"), ("fasttext", "fasttext-predict")])
def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    options: dict[str, str | float | bool] = {"model": "x", **({"language": "de"} if module == "fasttext" else {})}
    with pytest.raises(DataError, match=f"pip install {package}, or the extra"):
        open_scorers({"x": ScorerConfig(use=module, options=options)})


def test_both_in_a_profile(libraries: str, arpa: str, classifier: str, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        f"""
about: two models
scorers:
  perplexity: {{use: kenlm, options: {{model: '{arpa}'}}}}
  german: {{use: fasttext, options: {{model: '{classifier}', language: de, characters: 100}}}}
rules:
  perplexity: {{metric: perplexity, at_most: 20, reason: strange words}}
  german: {{metric: german, at_least: 0.4, reason: not German}}
"""
    )
    (tmp_path / "texts.txt").write_text("猫 dog\n\nzebra\n\n猫 dog the the 猫 dog 猫 dog 猫 dog 猫 dog\n\n", "utf-8")
    report = clean_files([tmp_path / "texts.txt"], tmp_path / "out", load_profile(profile).config, workers=2)
    assert [document.text for document in read_documents([tmp_path / "out" / "texts.jsonl.zst"])] == ["猫 dog"]
    assert {name: rule["documents"] for name, rule in report["rules"].items()} == {"perplexity": 1, "german": 1}
