"""Parallel corpora: what is read, how it is written, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pyarrow
import pyarrow.parquet
import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data import pairs as module
from megatron_cpt.data.pairs import (
    Direction,
    Pair,
    PairSettings,
    Tally,
    Template,
    pair_documents,
    read_pairs,
    write_pairs,
)
from megatron_cpt.errors import DataError

TEXTS = [("A cat.", "猫です。"), ("Two\ndogs.", "犬が二匹。"), ("", "空です。"), ("Rain {falls}.", "雨が降る。")]
PAIRS = [Pair(texts, f"memory:{k}", f"book#{k}") for k, texts in enumerate(TEXTS)]


def documents(direction: Direction = "forward", template: str = "plain", seed: int = 1) -> list[dict[str, str]]:
    return list(pair_documents(PAIRS, PairSettings(("en", "ja"), Template(template), direction, seed), Tally()))


def test_every_kind_of_file_gives_the_same_pairs(tmp_path: Path) -> None:
    texts = [pair for pair in TEXTS if "\n" not in pair[0]]
    rows = [{"id": f"w#{k}", "en": en, "ja": ja} for k, (en, ja) in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.tsv").write_text("\ufeff" + "".join(f"{en}\tx\t{ja}\r\n" for en, ja in texts))
    (tmp_path / "e.tsv.gz").write_bytes(gzip.compress((tmp_path / "d.tsv").read_bytes()))
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.tsv", "e.tsv.gz"):
        fields = ("1", "3") if "tsv" in name else ("en", "ja")
        pairs = list(read_pairs([tmp_path / name], fields))
        assert [pair.texts for pair in pairs] == texts
        assert pairs[-1].place == f"{tmp_path / name}:{len(texts)}"
        assert [pair.id for pair in pairs] == (["", "", ""] if "tsv" in name else [row["id"] for row in rows])


def test_plain_documents_hold_both_texts_and_skip_half_pairs() -> None:
    forward, backward = documents("forward"), documents("backward")
    assert [d["text"] for d in forward] == ["A cat.\n猫です。", "Two\ndogs.\n犬が二匹。", "Rain {falls}.\n雨が降る。"]
    assert [d["text"].split("\n")[0] for d in backward] == ["猫です。", "犬が二匹。", "雨が降る。"]
    assert {d["direction"] for d in forward} == {"en-ja"} and {d["direction"] for d in backward} == {"ja-en"}
    assert [d["id"] for d in documents("both")] == ["book#0", "book#0", "book#1", "book#1", "book#3", "book#3"]
    assert documents("both")[::2] == forward and documents("both")[1::2] == backward


def test_instructions_are_in_the_language_of_the_sentence() -> None:
    forward, backward = documents("forward", "instruction")[0], documents("backward", "instruction")[0]
    assert forward["text"] == "Translate the following English text into Japanese.\n\nA cat.\n\n猫です。"
    assert backward["text"].startswith("次の日本語の文を英語に") and backward["text"].endswith("\n\n猫です。\n\nA cat.")
    for source in ("en", "ja", "ko", "de"):
        for target in ("en", "ja", "ko", "de"):
            text = Template("instruction").write("S", "T", source, target)
            assert text.endswith("\n\nS\n\nT") and "{" not in text
    with pytest.raises(DataError, match="'fr' has no name"):
        Template("instruction").write("S", "T", "en", "fr")


def test_own_templates() -> None:
    own = documents("forward", "{{{source_language}}} {source} = {target_language}: {target}")
    assert own[0]["text"] == "{English} A cat. = Japanese: 猫です。"
    assert own[2]["text"] == "{English} Rain {falls}. = Japanese: 雨が降る。"
    for wrong in ("{source}", "{source} {target} {other}", "{source} {target", "{target} {}", "nothing"):
        with pytest.raises(DataError, match="template"):
            Template(wrong)


def test_sampled_directions_depend_on_seed_and_texts_alone() -> None:
    pairs = [Pair((f"sentence {k}", f"文 {k}"), "") for k in range(2000)]

    def directions(chosen: list[Pair], seed: int) -> list[str]:
        settings = PairSettings(("en", "ja"), Template("plain"), "sampled", seed)
        return [d["direction"] for d in pair_documents(chosen, settings, Tally())]

    first = directions(pairs, 1)
    assert directions(pairs[::-1], 1) == first[::-1]
    assert 900 < first.count("en-ja") < 1100
    other = directions(pairs, 2)
    assert 900 < sum(a == b for a, b in zip(first, other, strict=True)) < 1100


BOTH = PairSettings(("en", "ja"), Template("plain"), "both")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The pairs as a file, with two more that have one side or none."""
    rows = [{"id": f"book#{k}", "en": en, "ja": ja} for k, (en, ja) in enumerate([*TEXTS, ("Half.", " \n"), ("", "")])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def test_the_file_is_whole_or_not_there(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst"):
        facts = write_pairs([corpus], ("en", "ja"), BOTH, out / name)
        assert facts["documents"] == 6 and facts["directions"] == {"en-ja": 3, "ja-en": 3}
        assert [p.texts[0] for p in read_pairs([out / name], ("text", "id"))] == [d["text"] for d in documents("both")]
    held = sorted(path.name for path in out.iterdir())
    assert held == sorted(f"x.jsonl{ending}{m}" for ending in ("", ".gz", ".zst") for m in ("", ".manifest.json"))
    (tmp_path / "broken.jsonl").write_text('{"en": "a", "ja": "b"}\n{"en": "c"\n')
    (tmp_path / "half.jsonl").write_text('{"en": "a", "ja": ""}\n')
    for name, message in (("broken", "broken.jsonl:2"), ("half", "hold 1, none with both sides"), ("no", "not exist")):
        with pytest.raises(DataError, match=message):
            write_pairs([tmp_path / f"{name}.jsonl"], ("en", "ja"), BOTH, out / "y.jsonl")
    with pytest.raises(DataError, match=r"ends in \.jsonl"):
        write_pairs([corpus], ("en", "ja"), BOTH, out / "out.txt")
    assert sorted(path.name for path in out.iterdir()) == held


def test_pairs_with_an_empty_side_are_counted(corpus: Path, tmp_path: Path) -> None:
    facts = write_pairs([corpus], ("en", "ja"), BOTH, tmp_path / "x.jsonl")
    manifest = json.loads((tmp_path / "x.jsonl.manifest.json").read_text())
    assert (facts["pairs"], facts["half_pairs"], facts["documents"]) == (6, 3, 6)
    assert {name: manifest[name] for name in facts if name != "output"} == {
        name: fact for name, fact in facts.items() if name != "output"
    }
    assert manifest["inputs"] == {str(corpus): sha256_file(corpus)}
    assert manifest["outputs"]["jsonl"]["sha256"] == sha256_file(tmp_path / "x.jsonl")
    assert facts["text_bytes"] == sum(len(d["text"].encode()) for d in documents("both"))


def test_the_same_command_again_ends_with_the_same_file(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.jsonl"
    facts = write_pairs([corpus], ("en", "ja"), BOTH, output)
    before, made = output.read_bytes(), output.stat().st_mtime_ns
    assert write_pairs([corpus], ("en", "ja"), BOTH, output) == facts and output.stat().st_mtime_ns == made
    output.unlink()  # as after a kill between the manifest and the file
    assert write_pairs([corpus], ("en", "ja"), BOTH, output) == facts and output.read_bytes() == before
    with pytest.raises(DataError, match=r"exists already and differs \(seed was 1, is 2\)"):
        write_pairs([corpus], ("en", "ja"), dataclasses.replace(BOTH, seed=2), output)
    output.write_bytes(before + b"{}\n")
    with pytest.raises(DataError, match="it was changed after it was made"):
        write_pairs([corpus], ("en", "ja"), BOTH, output)
    corpus.write_text(corpus.read_text() + "\n")
    with pytest.raises(DataError, match=f"input 1, {corpus}, has changed"):
        write_pairs([corpus], ("en", "ja"), BOTH, output)
    Path(f"{output}.manifest.json").unlink()
    with pytest.raises(DataError, match="exists already; choose another name"):
        write_pairs([corpus], ("en", "ja"), BOTH, output)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "pairs of two.tsv"
    corpus.write_text("".join(f"{en}\t{ja}\n" for en, ja in TEXTS if "\n" not in en))
    words = ["data", "pairs", str(corpus), "--languages", "en,ja", "--fields", "1,2"]
    assert main([*words, "--output", str(tmp_path / "x.jsonl"), "--direction", "both", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["directions"], facts["half_pairs"]) == ({"en-ja": 2, "ja-en": 2}, 1)
    for extra, message in (
        (["--direction", "up"], ", ".join(get_args(Direction))),
        (["--languages", "en"], "two different names"),
        (["--languages", "../x,ja"], "begins with a letter"),
        (["--fields", "1,9"], f"{corpus}:1: 2 columns, expected 9"),
        (["--fields", "en,ja"], "counted from 1"),
        (["--template", "{source}"], "placeholders source"),
    ):
        assert main([*words, *extra, "--output", str(tmp_path / "y.jsonl")]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert main(["data", "pairs", str(tmp_path / "no.tsv"), *words[3:], "--output", str(tmp_path / "y.jsonl")]) == 2
    assert not (tmp_path / "y.jsonl").exists()


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_an_error_of_the_system_is_told_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # a file whose first page cannot be read
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(read_pairs([tmp_path / name], ("1", "2")))
    assert str(tmp_path / name) == caught.value.filename


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_null_or_missing_side_is_an_empty_one(ending: str, tmp_path: Path) -> None:
    rows = [{"id": "w#1", "en": "a", "ja": None}, {"en": "b", "ja": "c", "id": "w#2"}, {"en": None, "ja": None}]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        expected = [("a", ""), ("b", "c"), ("", "")]
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in [*rows, {"ja": "d"}, {"en": "e"}, {"id": "x"}]))
        expected = [("a", ""), ("b", "c"), ("", ""), ("", "d"), ("e", ""), ("", "")]
    read = list(read_pairs([path], ("en", "ja")))
    assert [pair.texts for pair in read] == expected and [pair.id for pair in read[:2]] == ["w#1", "w#2"]
    step = 1 if ending == "parquet" else 2
    assert [pair.place for pair in read] == [f"{path}:{1 + step * k}" for k in range(len(read))]
    facts = write_pairs([path], ("en", "ja"), BOTH, tmp_path / "x.jsonl")
    assert (facts["pairs"], facts["half_pairs"], facts["documents"]) == (len(expected), len(expected) - 1, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"en": "a", "ja": 3}', "2: field 'ja' holds number"),
        ('{"en": "a", "ja": null, "id": []}', "2: field 'id' holds array"),
        ('{"en": "a", "ja": null', "2: not a line of JSON"),
        ('{"en": "\\ud800", "ja": null}', "2: 'en' holds a lone surrogate"),
    ],
)
def test_other_broken_records_stop(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"en": "a", "ja": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_pairs([tmp_path / "a.jsonl"], ("en", "ja")))


def test_a_field_that_no_record_has_and_files_without_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"en": "a", "ja": "b"}\n{"en": "c", "ja": null}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: no field 'jp' \(fields here: en, ja\)"):
        list(read_pairs([tmp_path / "a.jsonl"], ("en", "jp")))
    (tmp_path / "a.txt").write_text("one text\n")
    with pytest.raises(DataError, match="one text a document"):
        list(read_pairs([tmp_path / "a.txt"], ("en", "ja")))


def test_a_tsv_is_read_as_strictly_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbfa\tb\n\xef\xbb\xbfc\td\n")  # a mark behind the front is a character
    assert [pair.texts for pair in read_pairs([path], ("1", "2"))] == [("a", "b"), ("\ufeffc", "d")]
    path.write_bytes(b"a\tb\nc\x00\td\n")
    with pytest.raises(DataError, match=f"{path}:2: a NUL at byte 2 of the line"):
        list(read_pairs([path], ("1", "2")))
    longest = 32 << 20
    path.write_bytes(b"a\t" + b"b" * (longest - 2) + b"\n")
    assert [len(pair.texts[1]) for pair in read_pairs([path], ("1", "2"))] == [longest - 2]
    path.write_bytes(b"a\t" + b"b" * (longest - 1) + b"\n")
    with pytest.raises(DataError, match=f"{path}:1: a record of more than {longest} bytes"):
        list(read_pairs([path], ("1", "2")))


def test_a_line_that_is_too_long_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\tb\n")
    os.truncate(path, 300 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=f"{path}:2: a record of more than"):
            list(read_pairs([path], ("1", "2")))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_the_files_are_compared_in_their_order(corpus: Path, tmp_path: Path) -> None:
    other, output = tmp_path / "other.jsonl", tmp_path / "x.jsonl"
    other.write_text('{"en": "One.", "ja": "一。"}\n')
    facts = write_pairs([corpus, other], ("en", "ja"), BOTH, output)
    assert write_pairs([corpus, other], ("en", "ja"), BOTH, output) == facts
    sources = json.loads(Path(f"{output}.manifest.json").read_text())["sources"]
    assert sources == [{"path": str(p), "bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in (corpus, other)]
    more = tmp_path / "more.jsonl"
    more.write_bytes(other.read_bytes())
    for files, message in (
        ([other, corpus], f"input 1 was {corpus}, is {other}"),
        ([corpus, other, more], f"input 3 was none, is {more}"),
        ([corpus], f"input 2 was {other}, is none"),
    ):
        with pytest.raises(DataError, match=message):
            write_pairs(files, ("en", "ja"), BOTH, output)
    instruction = dataclasses.replace(BOTH, template=Template("instruction"))
    with pytest.raises(DataError, match="template was 'plain', is 'instruction'"):
        write_pairs([corpus, other], ("en", "ja"), instruction, output)


def test_a_file_given_twice_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for again in (corpus, f"./{corpus.name}"):
        with pytest.raises(DataError, match="is given twice"):
            write_pairs([corpus, again], ("en", "ja"), BOTH, tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="no input files"):
        write_pairs([], ("en", "ja"), BOTH, tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def other_command(corpus: Path, output: Path, seed: int) -> subprocess.Popen[bytes]:
    words = ["data", "pairs", str(corpus), "--languages", "en,ja", "--direction", "both", "--seed", str(seed)]
    command = [sys.executable, "-m", "megatron_cpt.cli.main", *words, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("seed", [1, 2])
def test_another_command_was_faster(seed: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "x.jsonl"

    def slow(*arguments: object) -> Iterator[Pair]:
        assert other_command(corpus, output, seed).wait() == 0
        yield from read_pairs([corpus], ("en", "ja"))

    monkeypatch.setattr(module, "read_pairs", slow)
    if seed == 1:
        assert write_pairs([corpus], ("en", "ja"), BOTH, output)["documents"] == 6
    else:
        with pytest.raises(DataError, match=r"differs \(seed was 2, is 1\)"):
            write_pairs([corpus], ("en", "ja"), BOTH, output)
    manifest = json.loads(Path(f"{output}.manifest.json").read_text())
    assert manifest["options"]["seed"] == seed and manifest["outputs"]["jsonl"]["sha256"] == sha256_file(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == [corpus.name, "x.jsonl", "x.jsonl.manifest.json"]


def test_nothing_comes_between_a_manifest_and_its_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, others = tmp_path / "x.jsonl", list[subprocess.Popen[bytes]]()
    write: Callable[..., None] = module.write_manifest

    def slow(*arguments: object, **fields: object) -> None:
        write(*arguments, **fields)
        others.append(other_command(corpus, output, 2))
        with pytest.raises(subprocess.TimeoutExpired):  # it waits
            others[0].wait(timeout=2)

    monkeypatch.setattr(module, "write_manifest", slow)
    write_pairs([corpus], ("en", "ja"), BOTH, output)
    _, error = others[0].communicate()
    assert others[0].returncode == 2 and b"seed was 1, is 2" in error.replace(b"\n", b" ")
    assert json.loads(Path(f"{output}.manifest.json").read_text())["options"]["seed"] == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system writes no file beyond a size, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "small.jsonl"])
def test_a_disk_without_room(name: str, tmp_path: Path) -> None:
    corpus, out = tmp_path / "a.tsv", tmp_path / "out"
    count = 1 if name == "small.jsonl" else 20_000  # of the small one, the manifest does not fit
    corpus.write_text("".join(f"{os.urandom(8).hex()}\t{os.urandom(8).hex()}\n" for _ in range(count)))
    with largest_file(300), pytest.raises(OSError, match="File too large") as caught:
        write_pairs([corpus], ("1", "2"), PairSettings(("en", "ja"), Template("plain"), "forward"), out / name)
    assert caught.value.filename == str(out / name) and caught.value.errno == 27
    assert list(out.iterdir()) == []
