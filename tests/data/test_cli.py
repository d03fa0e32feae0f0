"""`megatron-cpt data` from the outside: what it prints, and what it refuses with exit code 2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.data import Document, IndexedDataset, is_held_out


@pytest.fixture
def corpus(documents: list[Document], tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Exit code, JSON of stdout (or None) and stderr."""
    code = main(["data", *map(str, words)])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


def test_build_inspect_and_verify(
    corpus: Path, tokenizer: Path, documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out" / "x", "--language", "xx"]
    code, planned, _ = run(capsys, *build, "--dry-run", "--json")
    assert code == 0 and planned["files"] == {str(corpus): corpus.stat().st_size}
    assert not (tmp_path / "out").exists()
    code, built, _ = run(capsys, *build, "--workers", 2, "--json")
    assert code == 0 and built["documents"] == len(documents) and built["inputs"][str(corpus)]
    code, again, said = run(capsys, *build, "--json")
    assert code == 0 and again == built and said.count("\n") == 1 and "is already built of these files" in said
    code, planned, _ = run(capsys, *build, "--dry-run", "--json")
    assert code == 0 and planned["already_built"]
    code, _, error = run(capsys, *build, "--no-bos", "--dry-run")
    assert code == 2 and "already holds a dataset that differs (append_bos was True, is False)" in error
    assert run(capsys, *build, "--dry-run", "--overwrite", "--json")[0] == 0
    prefix = tmp_path / "out" / "x"
    code, shown, _ = run(capsys, "inspect", prefix, "--document", 9, "--json")
    assert code == 0 and shown["document"]["text"] == documents[9].text and shown["tokens"] == built["tokens"]
    code, shown, _ = run(capsys, "inspect", prefix, "--sample", 2, "--seq-length", 32, "--json")
    assert code == 0 and sum(piece["tokens"] for piece in shown["sample"]["pieces"]) == 33
    code, verified, _ = run(capsys, "verify", prefix, "--json")
    assert code == 0 and verified["tokens"] == built["tokens"]
    assert main(["data", "inspect", str(prefix), "--document", "9"]) == 0
    assert documents[9].text.split()[0] in capsys.readouterr().out


def test_the_two_sides_of_a_held_out_split(
    corpus: Path, tokenizer: Path, documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", corpus, "--tokenizer", tokenizer, "--held-out", 0.2, "--json"]
    assert run(capsys, *build, "--output", tmp_path / "train")[0] == 0
    assert run(capsys, *build, "--output", tmp_path / "held", "--only-held-out")[0] == 0
    held_out = sum(is_held_out(document, 0.2) for document in documents)
    assert 0 < IndexedDataset(tmp_path / "held").num_documents == held_out
    assert IndexedDataset(tmp_path / "train").num_documents == len(documents) - held_out


def test_a_dry_run_refuses_an_empty_corpus(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    one_side = ["--held-out", 1e-9, "--only-held-out"]
    for words in ([empty], [corpus, *one_side]):
        for mode in (["--dry-run"], []):
            build = ["build", *words, "--tokenizer", tokenizer, "--output", tmp_path / "x", *mode]
            code, _, error = run(capsys, *build)
            assert code == 2 and f"no document to write to {tmp_path / 'x'}" in error


def test_wrong_input_ends_with_code_2_and_one_line(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "x"]
    with corpus.open("a") as file:
        file.write('{"text": "cut')
    cases: list[tuple[list[object], str]] = [
        (build, "corpus.jsonl:121: not a line of JSON"),
        ([*build, "--text-field", "body"], "corpus.jsonl:1: no field 'body' (fields here: id, text)"),
        ([*build, "--only-held-out"], "--only-held-out without --held-out"),
        ([*build, "--language", "../../esc"], "--language ../../esc: expected a name of letters, digits"),
        (["build", tmp_path / "none.jsonl", *build[2:]], "none.jsonl does not exist"),
        (["build", corpus, "--tokenizer", tmp_path / "none", *build[4:]], "none does not exist"),
        (["inspect", tmp_path / "x"], "x.manifest.json is missing"),
        (["verify", tmp_path / "x"], "x.manifest.json is missing"),
    ]
    for words, message in cases:
        code, printed, error = run(capsys, *words)
        assert (code, printed) == (2, None) and message in error and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_shards_and_skipped_records(
    corpus: Path, tokenizer: Path, documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 5}\n{"text": "b"}\n')
    build = ["build", corpus, bad, "--tokenizer", tokenizer, "--output", tmp_path / "x", "--json"]
    assert run(capsys, *build, "--shard", "0/2")[1]["files"] == [str(corpus)]
    for words, message in (
        (["--shard", "1/2"], "bad.jsonl:2: "),
        (["--shard", "2/2"], "shard 2/2: expected i/n"),
        (["--shard", "two"], "--shard two: expected I/N"),
        (["--on-error", "ignore"], "expected 'stop' or 'skip'"),
        ([bad], "given twice"),
        (["--no-bos"], "append_bos was True, is False"),
    ):
        code, printed, error = run(capsys, *build, *words)
        assert (code, printed) == (2, None) and message in error and error.count("\n") == 1, error
    assert run(capsys, *build, "--on-error", "skip", "--shard", "1/2")[0] == 0
    code, made, _ = run(capsys, *build, "--on-error", "skip")
    assert code == 0 and made["documents"] == len(documents) + 2 and sum(made["faults"].values()) == 1
    assert (tmp_path / "x.faults.txt").read_text().startswith(f"{bad}:2: ")
    code, verified, _ = run(capsys, "verify", tmp_path / "x", "--inputs", "--json")
    assert code == 0 and verified["inputs_checked"] == 3
    bad.write_text("")
    code, _, error = run(capsys, "verify", tmp_path / "x", "--inputs")
    assert code == 1 and "bad.jsonl is not the file" in error


def test_a_cleaning_says_what_it_left_out_and_that_it_is_done(
    documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.jsonl"
    good = json.dumps({"text": documents[9].text})
    path.write_text(f"{good}\n{{broken\n" + '{"title": 1}\n' * 11)
    clean = ["clean", path, "--profile", "short", "--output", tmp_path / "out", "--on-error", "skip"]
    assert main(["data", *map(str, clean)]) == 0
    assert re.search(r"no document: no field 'text' +11 ", capsys.readouterr().out)
    code, report, said = run(capsys, *clean, "--json")
    assert code == 0 and said.count("\n") == 1 and "is already cleaned of these files with this profile" in said
    assert report["totals"]["faults"] == sum(report["faults"].values()) == 12 and len(report["faults"]) == 2
    code, _, error = run(capsys, *clean, "--text-field", "body")
    assert code == 2 and "finished cleaning that differs (text_field was 'text', is 'body')" in error
