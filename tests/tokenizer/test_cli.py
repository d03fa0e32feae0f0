"""The verb `tokenizer` from end to end, as a user types it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.tokenizer import load_tokenizer


@pytest.fixture
def files(tmp_path: Path, english: list[str], japanese: list[str]) -> dict[str, Path]:
    """English as two texts, Japanese as compressed jsonl."""
    written = {name: tmp_path / name for name in ("en1.txt", "en2.txt", "ja.jsonl.gz")}
    written["en1.txt"].write_text("\n\n".join(english[:200]), encoding="utf-8")
    written["en2.txt"].write_text("\n\n".join(english[200:]), encoding="utf-8")
    with gzip.open(written["ja.jsonl.gz"], "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(number), "body": line}) + "\n" for number, line in enumerate(japanese))
    return written


def run(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """Output of a command that has to end well, from its JSON."""
    capsys.readouterr()
    assert main(["tokenizer", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_text_to_report(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, new = tmp_path / "base", tmp_path / "new"
    english = [files["en1.txt"], files["en2.txt"]]
    made = run(capsys, "train", "--corpus", *english, "--vocab-size", 420, "--output", base, "--language", "en")
    assert made["vocab_size"] == load_tokenizer(base).vocab_size == 420 and made["lines"] == 400

    words = [base, "--corpus", files["ja.jsonl.gz"], "--text-field", "body", "--num-pieces", 150, "--output", new]
    assert run(capsys, "extend", *words, "--dry-run")["old_size"] == 420
    assert not new.exists()
    made = run(capsys, "extend", *words, "--script", "ja", "--divisor", 16)
    assert made["new_size"] == load_tokenizer(new).vocab_size and made["new_size"] % 16 == 0

    proof = run(capsys, "verify", new, "--text", *english)
    assert proof["mismatches"] == 0 and proof["total"] > 400

    text = [f"en={english[0]}", f"en={english[1]}"]
    languages = run(capsys, "report", new, "--base", base, "--text", *text)["languages"]
    assert languages["en"]["lines_changed"] == {"changed": 0, "total": 400, "examples": []}
    ja = ("--text", f"ja={files['ja.jsonl.gz']}", "--text-field", "body")
    languages = run(capsys, "report", new, "--base", base, *ja)["languages"]
    assert languages["ja"]["lines_changed"]["changed"] == 400
    assert languages["ja"]["adapted"]["bytes_per_token"] > languages["ja"]["base"]["bytes_per_token"]

    assert main(["tokenizer", "report", str(new), "--base", str(base), *ja]) == 0
    assert "400 of 400" in capsys.readouterr().out


def test_exit_codes(
    files: dict[str, Path], base: Path, extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = ["--corpus", str(files["en1.txt"])]
    wrong = [
        ["extend", str(base), *corpus, "--num-pieces", "50", "--output", str(tmp_path / "new")],
        ["extend", str(base), *corpus, "--num-pieces", "50", "--output", str(extended)],
        ["train", "--corpus", str(tmp_path / "no.txt"), "--vocab-size", "400", "--output", str(tmp_path / "new")],
        ["report", str(extended), "--base", str(base), "--text", str(files["en1.txt"])],
        ["verify", str(tmp_path)],
    ]
    for words in wrong:
        assert main(["tokenizer", *words]) == 2
        assert capsys.readouterr().err.startswith("error:")
    assert not (tmp_path / "new").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in extended.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert main(["tokenizer", "verify", str(broken)]) == 1


def test_two_languages(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, replace and sweep, with corpora named by language."""
    base, new = tmp_path / "base", tmp_path / "new"
    ja = tmp_path / "ja.txt"
    with gzip.open(files["ja.jsonl.gz"], "rt", encoding="utf-8") as file:
        ja.write_text("\n".join(json.loads(line)["body"] for line in file), encoding="utf-8")
    corpus = ["--corpus", f"en={files['en1.txt']}", f"en={files['en2.txt']}", f"ja={ja}"]
    words = [*corpus, "--balance", "en=1,ja=3", "--vocab-size", 450, "--model-type", "unigram"]
    made = run(capsys, "train", *words, "--output", tmp_path / "unigram", "--presegment", "builtins:str")
    assert (
        made["languages"]["ja"]["share"] == 0.75
        and made["languages"]["en"]["taken"] < made["languages"]["en"]["available"]
    )
    assert json.loads((tmp_path / "unigram" / "manifest.json").read_text())["language"] == "en,ja"

    run(capsys, "train", "--corpus", files["en1.txt"], "--vocab-size", 420, "--output", base, "--language", "en")
    words = [base, *corpus, "--vocab-size", 480, "--balance", "ja=2", "--balance", "en=1"]
    assert run(capsys, "replace", *words, "--output", new, "--dry-run")["old_size"] == 420
    assert not new.exists()
    made = run(capsys, "replace", *words, "--output", new)
    assert made["new_size"] == load_tokenizer(new).vocab_size == 480 and made["num_moved"] == 0 < made["num_shared"]
    assert run(capsys, "verify", new, "--text", ja)["mismatches"] == 0

    words = [base, "--corpus", ja, "--sizes", "90,150,200", "--text", f"ja={ja}", f"en={files['en1.txt']}"]
    swept = run(capsys, "sweep", *words)
    assert [row["num_pieces"] for row in swept["rows"]] == [0, 90, 150, 200] and swept["knee"] in (90, 150)
    lengths = [row["bytes_per_token"] for row in swept["rows"]]
    assert lengths[0]["en"] == lengths[3]["en"] and lengths[0]["ja"] < lengths[1]["ja"] < lengths[3]["ja"]
    assert main(["tokenizer", "sweep", *map(str, words)]) == 0
    assert "suggested: " in capsys.readouterr().out


def test_pieces_of_a_person(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pieces.txt").write_text("日\n本\n日本\n日本語\n", encoding="utf-8")
    words = ["--pieces", tmp_path / "pieces.txt", "--divisor", 1]
    made = run(capsys, "extend", base, *words, "--output", tmp_path / "new")
    assert made["num_new"] == 3 and made["examples"] == {"unreachable": ["日本語"]}
    (tmp_path / "pieces.txt").write_text("日\n本\n日\n", encoding="utf-8")
    wrong: list[list[object]] = [
        [*words, "--num-pieces", 3],
        [*words, "--min-count", 3],
        ["--num-pieces", 3],
        ["--corpus", tmp_path / "pieces.txt"],
        words,
    ]
    for more in wrong:
        assert main(["tokenizer", "extend", str(base), *map(str, more), "--output", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.startswith("error:")
    assert not (tmp_path / "none").exists()
    text = ["--corpus", f"ja={tmp_path / 'pieces.txt'}", "--vocab-size", "400", "--output", str(tmp_path / "none")]
    for more in (["--balance", "ja=much"], ["--balance", "en=1"], ["--normalization", "nfkc"]):
        assert main(["tokenizer", "train", *text, *more]) == 2
        assert capsys.readouterr().err.startswith("error:")


def test_a_byte_level_base(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The family of the base decides how it is extended and replaced."""
    english, base = files["en1.txt"], tmp_path / "base"
    words = ["--corpus", f"en={english}", "--vocab-size", 400, "--output", base]
    run(capsys, "train", *words, "--model-type", "byte-level")
    ja = ["--corpus", f"ja={files['ja.jsonl.gz']}", "--text-field", "body"]
    made = run(capsys, "extend", base, *ja, "--num-pieces", 100, "--output", tmp_path / "new")
    assert made["new_size"] == load_tokenizer(tmp_path / "new").vocab_size > made["old_size"] == 400
    made = run(capsys, "replace", base, *words[:2], "--vocab-size", 408, "--output", tmp_path / "same")
    assert made["new_size"] == 408 and made["num_shared"] > 100
    for option in (["--scores", "own-rank"], ["--presegment", "cat"]):
        more = [*map(str, ja), "--num-pieces", "50", "--output", str(tmp_path / "none"), *option]
        assert main(["tokenizer", "extend", str(base), *more]) == 2
        assert "has no meaning" in capsys.readouterr().err
    more = ["--model-type", "byte-level", "--presegment", "cat", "--output", str(tmp_path / "none")]
    assert main(["tokenizer", "train", *map(str, words[:4]), *more]) == 2
    assert "for SentencePiece models" in capsys.readouterr().err


def test_facts_for_people(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pieces.txt").write_text("日\n本\n日本\n", encoding="utf-8")
    words = ["extend", str(base), "--pieces", str(tmp_path / "pieces.txt"), "--divisor", "1"]
    assert main(["tokenizer", *words, "--output", str(tmp_path / "new")]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert facts["num_new"].strip() == "3" and facts["fast_file"].strip() == "yes"
