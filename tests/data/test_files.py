"""Building from files: what every file gives, on any number of threads, in shards, and with broken records."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data import (
    DatasetBuild,
    Document,
    IndexedDataset,
    build_dataset,
    build_files,
    is_held_out,
    read_documents,
    trace_document,
    verify_dataset,
)
from megatron_cpt.errors import ConfigError, DataError, InputError, VerificationError
from megatron_cpt.runtime.lock import lock_folder


def jsonl(path: Path, documents: list[Document]) -> Path:
    lines = "".join(json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) + "\n" for d in documents)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.fixture(scope="session")
def corpus(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files of four kinds; the second holds several blocks, an empty and a blank text."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(3)
    many = [draw.choice(documents) for _ in range(16000)]
    many[100:100] = [Document("", "xx", ""), Document(" \n", "xx", ""), Document("강물이 흐른다" * 9, "xx", "")]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [d.text for d in documents[60:90]]}), folder / "c.parquet", row_group_size=7
    )
    (folder / "d.txt").write_text("\n\n".join(d.text.replace("\n\n", "\n") for d in documents[90:]), encoding="utf-8")
    return [
        jsonl(folder / "a.jsonl.gz", documents[:60]),
        jsonl(folder / "b.jsonl", many),
        folder / "c.parquet",
        folder / "d.txt",
    ]


def same_files(one: Path, other: Path) -> bool:
    return all(
        Path(f"{one}.{ending}").read_bytes() == Path(f"{other}.{ending}").read_bytes()
        for ending in ("bin", "idx", "manifest.json")
    )


def test_the_dataset_is_what_sentencepiece_gives_for_every_document(
    corpus: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    manifest = build_files(
        DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), workers=2, on_progress=lambda *at: seen.append(at)
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = [document.text for document in read_documents(corpus)]
    full = [text for text in texts if text]
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.num_documents == len(full) == len(texts) - 1
    expected = [[1, *ids, 2] for ids in reference.encode(full)]
    assert dataset.stream.tolist() == [id for ids in expected for id in ids]
    assert np.diff(dataset.document_starts).tolist() == [len(ids) for ids in expected]
    assert manifest == json.loads((tmp_path / "x.manifest.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.manifest.json"]
    assert seen[-1] == (sum(path.stat().st_size for path in corpus),) * 2 and seen == sorted(seen)
    _counts_are_exact(manifest, corpus, expected, full)


def _counts_are_exact(manifest: dict[str, Any], corpus: list[Path], expected: list[list[int]], full: list[str]) -> None:
    byte_ids = set(range(3, 259))  # <0x00> to <0xFF> follow unk, bos and eos
    assert manifest["documents"] == len(full) and manifest["empty_documents"] == 1
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in full)
    assert manifest["tokens"] == sum(map(len, expected))
    assert manifest["bytes_per_token"] == manifest["text_bytes"] / manifest["tokens"]
    assert manifest["byte_tokens"] == sum(id in byte_ids for ids in expected for id in ids) > 100
    assert manifest["longest_document"] == max(map(len, expected))
    assert manifest["checked_documents"] >= 4 * len(corpus) and manifest["faults"] == {}
    assert [source["path"] for source in manifest["sources"]] == [str(path) for path in corpus]
    for source, path in zip(manifest["sources"], corpus, strict=True):
        assert source["sha256"] == sha256_file(path) == manifest["inputs"][str(path)]
        assert source["bytes"] == path.stat().st_size
        mine = [document for document in read_documents(path) if document.text]
        first = source["first_document"]
        assert source["documents"] == len(mine)
        assert source["tokens"] == sum(map(len, expected[first : first + len(mine)]))
    for name in ("documents", "empty_documents", "text_bytes", "tokens", "byte_tokens", "checked_documents"):
        assert sum(source[name] for source in manifest["sources"]) == manifest[name], name


def test_neither_threads_nor_shards_nor_memory_change_a_byte(
    corpus: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    build_files(DatasetBuild(corpus, tokenizer, tmp_path / "one", "xx"))
    build_files(DatasetBuild(corpus, tokenizer, tmp_path / "three", "xx"), workers=3)
    assert same_files(tmp_path / "one", tmp_path / "three")
    for i in (2, 0, 1):
        done = build_files(DatasetBuild(corpus, tokenizer, tmp_path / "shards", "xx"), workers=2, shard=(i, 3))
        assert done == {"shard": f"{i}/3", "files": [str(path) for path in corpus[i::3]]}
        assert not (tmp_path / "shards.bin").exists()
    build_files(DatasetBuild(corpus, tokenizer, tmp_path / "shards", "xx"))
    assert same_files(tmp_path / "one", tmp_path / "shards")
    build_dataset(read_documents(corpus), tokenizer, tmp_path / "memory", "xx")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"memory.{ending}").read_bytes()


def test_a_build_travels_to_another_process(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    build = DatasetBuild(tuple(corpus), tokenizer, tmp_path / "x", "xx")
    build.parts().claim()
    for number in build.parts().pending():
        pickle.loads(pickle.dumps(build)).work([number])
    assert (
        build.assemble()["documents"] == build_files(DatasetBuild(corpus, tokenizer, tmp_path / "y", "xx"))["documents"]
    )
    assert same_files(tmp_path / "x", tmp_path / "y")


def test_the_sides_of_a_held_out_split(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    for side in ("train", "held_out"):
        manifest = build_files(DatasetBuild(corpus[:2], tokenizer, tmp_path / side, "xx", held_out=(0.3, side)))
        mine = [d for d in read_documents(corpus[:2]) if d.text and is_held_out(d, 0.3) == (side == "held_out")]
        assert manifest["documents"] == len(mine) > 100 and manifest["held_out"] == [0.3, side]
        build_dataset(mine, tokenizer, tmp_path / "memory", "xx", overwrite=True)
        assert (tmp_path / f"{side}.bin").read_bytes() == (tmp_path / "memory.bin").read_bytes()
        dataset = IndexedDataset(tmp_path / side)
        for number in (0, 77, len(mine) - 1):
            traced = trace_document(dataset, number)
            assert (f"{traced['path']}:{traced['line']}", traced["id"]) == (mine[number].source, mine[number].id)


def test_broken_records_stop_the_build_or_are_skipped_and_logged(
    corpus: list[Path], tokenizer: Path, documents: list[Document], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    good = corpus[1].read_bytes().splitlines(keepends=True)
    lines = [b'{"text": 5}\n', *good[:5000], b'{"text": "\\ud800"}\n', b"{\n", *good[5000:9000], b'{"text": "\xff"}\n']
    bad.write_bytes(b"".join(lines))
    places = [1, 5002, 5003, 9004]
    with pytest.raises(DataError, match=r"bad\.jsonl:1: "):
        build_files(DatasetBuild([bad], tokenizer, tmp_path / "x", "xx"), workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]
    manifest = build_files(DatasetBuild([corpus[0], bad], tokenizer, tmp_path / "x", "xx", on_error="skip"), workers=2)
    assert sum(manifest["faults"].values()) == 4 and len(manifest["faults"]) == 4
    logged = (tmp_path / "x.faults.txt").read_text().splitlines()
    assert [line.split(": ", 1)[0] for line in logged] == [f"{bad}:{place}" for place in places]
    assert verify_dataset(tmp_path / "x", inputs=True)["inputs_checked"] == 3
    bad.write_bytes(b"".join(line for k, line in enumerate(lines, 1) if k not in places))
    build_files(DatasetBuild([corpus[0], bad], tokenizer, tmp_path / "y", "xx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"y.{ending}").read_bytes()
    build_files(DatasetBuild([bad], tokenizer, tmp_path / "x", "xx"), overwrite=True)
    assert not (tmp_path / "x.faults.txt").exists()


def test_where_all_records_are_left_out_their_reasons_are_told(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"{}\n" * 7)
    with pytest.raises(DataError, match=r"no document to write to .*: 7 records were left out: no field 'text'"):
        build_files(DatasetBuild([tmp_path / "bad.jsonl"], tokenizer, tmp_path / "x", "xx", on_error="skip"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_parts_with_skipped_records_are_not_taken_where_faults_are_to_stop(
    corpus: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 5}\n{"text": "a"}\n')
    build_files(DatasetBuild([bad, corpus[0]], tokenizer, tmp_path / "x", "xx", on_error="skip"), shard=(0, 2))
    with pytest.raises(DataError, match=r"bad\.jsonl: 1 records were skipped"):
        build_files(DatasetBuild([bad, corpus[0]], tokenizer, tmp_path / "x", "xx"))
    assert build_files(DatasetBuild([bad, corpus[0]], tokenizer, tmp_path / "x", "xx", on_error="skip"))["faults"]


def test_an_encoder_that_is_wrong_stops_the_build(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some other words stand here", "and here as well"] * 20),
        model_prefix=str(other),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    from megatron_cpt.data import build
    from megatron_cpt.tokenizer import load_tokenizer

    wrong = build.open_encoder(load_tokenizer(f"{other}.model"), True, True, np.dtype("<u2"))
    monkeypatch.setattr("megatron_cpt.data.build.open_encoder", lambda *_: wrong)
    monkeypatch.setattr("megatron_cpt.data.build_memory.open_encoder", lambda *_: wrong)
    with pytest.raises(VerificationError, match="encoder gives"):
        build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), workers=2)
    with pytest.raises(VerificationError, match="encoder gives"):
        build_dataset(read_documents(corpus), tokenizer, tmp_path / "x", "xx")
    assert not list(tmp_path.glob("x*"))


def test_requests_that_cannot_be_met_are_refused(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"files": [corpus[0], corpus[0]]}, DataError, "is given twice"),
        ({"files": []}, DataError, "no input files"),
        ({"files": [tmp_path / "none.jsonl"]}, DataError, "does not exist"),
        ({"shard": (3, 3)}, DataError, "i from 0 to n - 1"),
        ({"on_error": "ignore"}, InputError, "expected 'stop' or 'skip'"),
        ({"held_out": (0.1, "left")}, InputError, "expected one of train, held_out"),
        ({"files": [corpus[0]], "held_out": (1e-9, "held_out")}, DataError, "no document to write to"),
        ({"files": [corpus[1]], "text_field": "body"}, DataError, "b.jsonl:1: .*'body'"),
    ]
    for change, error, message in cases:
        arguments = {"files": corpus, "tokenizer": tokenizer, "prefix": tmp_path / "x", "language": "xx", **change}
        shard = arguments.pop("shard", None)
        with pytest.raises(error, match=message):
            build_files(DatasetBuild(**arguments), shard=shard)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "sets/", "sets/.", "x.jsonl", "x.bin", "x.IDX", "x.txt.gz"])
def test_what_is_no_prefix_is_refused(
    name: str, corpus: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is no prefix of a dataset: expected the path of its files without"):
        build_files(DatasetBuild(corpus, tokenizer, name, "xx"))
    with pytest.raises(InputError, match="is no prefix of a dataset"):
        build_dataset([Document("a text", "xx", "")], tokenizer, name, "xx")
    assert not list(tmp_path.iterdir())


def test_a_dataset_is_not_written_over_its_input(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "x.faults.txt").write_bytes(corpus[3].read_bytes())
    (tmp_path / "link").symlink_to(corpus[3])
    for files, prefix in ((["x.faults.txt"], "x"), ([corpus[0], corpus[3]], "link")):
        with pytest.raises(InputError, match="would write over its input"):
            DatasetBuild([tmp_path / file for file in files], tokenizer, tmp_path / prefix, "xx")


def test_a_command_repeated_after_its_end_finds_its_dataset(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(corpus[1].read_bytes() + b"{broken\n")
    build = DatasetBuild([corpus[0], mine], tokenizer, tmp_path / "x", "xx", on_error="skip")
    made = build_files(build)
    os.utime(mine, (1, 1))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "x.parts.removed").mkdir()  # of a process killed in its last step
    (tmp_path / "x.parts.lock").touch()
    build.parts().claim()
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(DatasetBuild, "work", None)
        patch.setattr(DatasetBuild, "assemble", None)
        assert build_files(build, notice=said.append) == made
        done = build_files(build, shard=(1, 2), notice=said.append)
    assert done == {"shard": "1/2", "files": [str(mine)]}
    assert len(said) == 2 and all("is already built of these files with these options" in text for text in said)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    for changed, difference in (
        ({"language": "yy"}, "language was 'xx', is 'yy'"),
        ({"append_eos": False}, "append_eos was True, is False"),
        ({"held_out": (0.1, "train")}, r"held_out was None, is \[0.1, 'train'\]"),
        ({"on_error": "stop"}, "it leaves out 1 broken records"),
        ({"files": [mine, corpus[0]]}, "it is of 2 files, now 2 or others"),
    ):
        with pytest.raises(DataError, match=f"already holds a dataset that differs .*{difference}"):
            build_files(replace(build, **changed))
    mine.write_bytes(corpus[1].read_bytes() + b"[broken\n")
    with pytest.raises(DataError, match="mine.jsonl has changed"):
        build_files(build)
    os.truncate(tmp_path / "x.bin", 8)
    with pytest.raises(DataError, match="x.bin is missing or of another size"):
        build_files(build)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)


def test_a_dataset_that_another_process_ends_meanwhile_is_not_built_again(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = DatasetBuild(corpus[:1], tokenizer, tmp_path / "x", "xx")
    check = DatasetBuild.check_tokenizer

    def end_it(self: DatasetBuild) -> None:  # between the first look and the claim
        monkeypatch.setattr(DatasetBuild, "check_tokenizer", check)
        build_files(build)

    monkeypatch.setattr(DatasetBuild, "check_tokenizer", end_it)
    said: list[str] = []
    assert build_files(build, shard=(0, 1), notice=said.append)["files"] == [str(corpus[0])] and len(said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.manifest.json"]


def test_a_disk_without_room_is_refused_early(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        free = os.statvfs(tmp_path)
        patch.setattr(
            "megatron_cpt.data.build.os.statvfs",
            lambda _: os.statvfs_result((free.f_bsize, 1, 1000, 200, 200, *free[5:])),
        )
        with pytest.raises(DataError, match="more are needed there, 0.0 GB are free"):
            build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), workers=2)
    assert build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"))["documents"]


def test_another_job_in_the_same_place_is_refused_until_it_is_dropped(
    corpus: list[Path], tokenizer: Path, tmp_path: Path
) -> None:
    build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), shard=(0, 2))
    with pytest.raises(DataError, match="unfinished job that differs .append_bos was True, is False"):
        build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx", append_bos=False))
    with lock_folder(tmp_path / "x.parts", ".building"), pytest.raises(ConfigError, match="another job is running"):
        build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"))
    manifest = build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx", append_bos=False), overwrite=True)
    assert manifest["append_bos"] is False
    with pytest.raises(DataError, match="already holds a dataset that differs .append_bos was False, is True"):
        build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"))


def test_verify_finds_changed_inputs_and_counts(corpus: list[Path], tokenizer: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(corpus[1].read_bytes())
    build_files(DatasetBuild([corpus[0], mine], tokenizer, tmp_path / "x", "xx"))
    path = tmp_path / "x.manifest.json"
    sound = json.loads(path.read_text())
    for change in ({"longest_document": 3}, {"sources": [{**sound["sources"][0], "tokens": 5}]}):
        path.write_text(json.dumps({**sound, **change}))
        with pytest.raises(VerificationError, match="the manifest"):
            verify_dataset(tmp_path / "x")
    path.write_text(json.dumps(sound))
    with mine.open("ab") as file:
        file.write(b"\n")
    assert verify_dataset(tmp_path / "x")["inputs_checked"] == 0
    with pytest.raises(VerificationError, match="mine.jsonl is not the file"):
        verify_dataset(tmp_path / "x", inputs=True)
    mine.unlink()
    with pytest.raises(DataError, match="mine.jsonl, from which .* is missing"):
        verify_dataset(tmp_path / "x", inputs=True)


def test_inputs_are_found_from_another_folder(
    corpus: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus[0].parent)
    build_files(DatasetBuild([path.name for path in corpus], tokenizer, tmp_path / "x", "xx"))
    monkeypatch.chdir(tmp_path)
    assert verify_dataset(tmp_path / "x", inputs=True)["inputs_checked"] == len(corpus) + 1
    assert trace_document(IndexedDataset(tmp_path / "x"), 3)["path"] == str(corpus[0])


def test_records_without_a_cut_take_little_memory_and_one_at_a_time(tokenizer: Path, tmp_path: Path) -> None:
    """Four threads over four files, by the operating system's account of a process of its own."""
    draw = random.Random(5)
    texts = ["a" * 6_000_000, "".join(draw.choices("acgt", k=6_000_000)), "river" * 1_200_000, "\u6d41" * 2_000_000]
    files = [jsonl(tmp_path / f"{k}.jsonl", [Document(text, "xx", "")] * 2) for k, text in enumerate(texts)]
    code = (
        "import sys; from pathlib import Path; from megatron_cpt.data import DatasetBuild, build_files\n"
        "build_files(DatasetBuild(map(Path, sys.argv[3:]), sys.argv[1], sys.argv[2], 'xx'), workers=4)\n"
        # not ru_maxrss: a process that was started by a large one inherits that one's
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    command = [sys.executable, "-c", code, str(tokenizer), str(tmp_path / "x"), *map(str, files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 400 << 10
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.document(4).tolist() == dataset.document(5).tolist() == [1, *reference.encode(texts[2]), 2]
