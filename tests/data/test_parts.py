"""The journal and the threads: a job that is stopped anywhere ends with the bytes it would have had."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.data import ordered
from megatron_cpt.data.ordered import run_parts
from megatron_cpt.data.part import Part
from megatron_cpt.data.parts import Parts, check_shard
from megatron_cpt.errors import DataError


@dataclass
class Line:
    text: str
    position: dict[str, Any]
    held_bytes: int = 1 << 20


class Lines:
    """A reader whose blocks are lines."""

    before_long: Callable[[], None] | None = None

    def __init__(self, path: Path, start: dict[str, Any] | None) -> None:
        self.path, self.file = path, path.open("rb")
        self.file.seek(start["at"] if start else 0)

    @property
    def bytes_read(self) -> int:
        return self.file.tell()

    def read(self) -> Line | None:
        line = self.file.readline()
        if line == b"unreadable\n":
            raise DataError(f"{self.path}: unreadable")
        return Line(line.decode().strip(), {"at": self.file.tell()}) if line else None

    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def close(self) -> None:
        self.file.close()


class Upper:
    """Writes each line in capitals and counts; stops at the line `stop`, waits at lines that say how long."""

    def __init__(self, part: Part, stop: str = "") -> None:
        self.part, self.stop = part, stop
        self.count = part.state.get("count", 0)

    def process(self, raw: Line, number: int) -> str:
        if raw.text == self.stop or raw.text == "bad":
            raise DataError(f"{self.part.input}:{number + 1}: {raw.text}")
        if raw.text.startswith("slow"):
            time.sleep(0.01)
        return f"{number} {raw.text.upper()}\n"

    def write(self, result: str) -> None:
        self.count += 1
        self.part.write("out", result.encode())

    def state(self) -> dict[str, Any]:
        return {"count": self.count}


def corpus(folder: Path, files: int = 3, lines: int = 40) -> tuple[Path, ...]:
    paths = []
    for k in range(files):
        paths.append(folder / f"in{k}.txt")
        paths[-1].write_text("".join(f"{'slow ' if n % 7 == k else ''}line {n} of {k}\n" for n in range(lines)))
    return tuple(paths)


def make(folder: Path, inputs: tuple[Path, ...], stop: str = "", workers: int = 1, **options: Any) -> Parts:
    parts = Parts(folder, "capitals", {"a": 1, **options}, inputs)
    parts.claim()
    run_parts(parts, parts.pending(), Lines, lambda part: Upper(part, stop), workers)
    return parts


def content(parts: Parts) -> list[bytes]:
    return [parts.read(k).path("out").read_bytes() for k in range(len(parts.inputs))]


def expected(inputs: tuple[Path, ...]) -> list[bytes]:
    return [
        "".join(f"{n} {line.upper()}\n" for n, line in enumerate(path.read_text().splitlines())).encode()
        for path in inputs
    ]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_are_in_order_whatever_the_threads(workers: int, tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    parts = make(tmp_path / "job", inputs, workers=workers)
    assert content(parts) == expected(inputs)
    for number, path in enumerate(inputs):
        part = parts.read(number)
        assert part.is_done() and part.state == {"count": 40} and part.blocks == 40
        assert part.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert part.size("out") == len(content(parts)[number])
    assert parts.pending() == []


@pytest.mark.parametrize("workers", [1, 3])
def test_a_job_stopped_at_any_line_is_continued_to_the_same_bytes(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "COMMIT_BYTES", 5 << 20)
    inputs = corpus(tmp_path)
    for stop in (0, 4, 5, 17, 39):
        folder = tmp_path / f"job{stop}"
        with pytest.raises(DataError, match=f":{stop + 1}: "):
            make(folder, inputs, stop=inputs[1].read_text().splitlines()[stop], workers=workers)
        half = Parts(folder, "capitals", {"a": 1}, inputs)
        assert half.read(1).blocks == stop // 5 * 5
        if half.read(1).begun:  # a killed process leaves what it wrote after the journal
            with half.read(1).path("out").open("ab") as file:
                file.write(b"behind the journal")
        assert content(make(folder, inputs, workers=workers)) == expected(inputs)


def test_the_first_failure_in_the_order_of_the_blocks_is_the_one_that_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    for text, message in (
        ("a\nslow bad\nb\nbad\nbad\nunreadable\n", ":4: bad"),
        ("a\nslow\nslow\nunreadable\nc\n", "unreadable"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            make(tmp_path / "job", (path,), workers=4)


def test_memory_is_bounded_where_one_block_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "_LEAST_IN_FLIGHT", 6 << 20)
    path, most, held = tmp_path / "in.txt", [0], [0]
    path.write_text("wait\n" + "line\n" * 60)
    lock, seen = threading.Lock(), threading.Event()

    class Counting(Upper):
        def process(self, raw: Line, number: int) -> str:
            with lock:
                held[0] += 1
                most[0] = max(most[0], held[0])
                if held[0] == 6:
                    seen.set()
            if raw.text == "wait":
                assert seen.wait(5) and not time.sleep(0.1)
            return super().process(raw, number)

        def write(self, result: str) -> None:
            super().write(result)
            with lock:
                held[0] -= 1

    parts = Parts(tmp_path / "job", "capitals", {}, (path,))
    parts.claim()
    run_parts(parts, [0], Lines, Counting, workers=3)
    assert most[0] == 6 and content(parts) == expected((path,))


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    parts = Parts(tmp_path / "job", "capitals", {}, inputs)
    parts.claim()
    seen: list[tuple[int, int]] = []
    run_parts(parts, [0, 2], Lines, Upper, 2, on_progress=lambda *at: seen.append(at))
    total = sum(inputs[k].stat().st_size for k in (0, 2))
    assert seen[-1] == (total, total) and seen[0][0] < total and len(seen) == 82


def test_shards_take_every_part_once(tmp_path: Path) -> None:
    inputs = corpus(tmp_path, files=5, lines=3)
    parts = Parts(tmp_path / "job", "capitals", {}, inputs)
    parts.claim()
    assert [parts.pending((i, 2)) for i in range(2)] == [[0, 2, 4], [1, 3]]
    run_parts(parts, parts.pending((1, 2)), Lines, Upper)
    assert parts.pending() == [0, 2, 4] and parts.pending((1, 2)) == []
    assert parts.pending((6, 9)) == []
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match="i from 0 to n - 1"):
            check_shard(shard)


def test_a_part_that_became_done_after_it_was_asked_for_stays_as_it_is(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    parts = Parts(tmp_path / "job", "capitals", {}, inputs)
    parts.claim()
    numbers = parts.pending()
    run_parts(parts, [1], Lines, Upper)  # another process
    journal = parts.read(1).journal_path.read_bytes()
    seen: list[tuple[int, int]] = []
    run_parts(parts, numbers, Lines, Upper, 2, on_progress=lambda *at: seen.append(at))
    assert content(parts) == expected(inputs)
    assert parts.read(1).journal_path.read_bytes() == journal and parts.read(1).state == {"count": 40}
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in inputs)


def test_a_changed_input_is_done_again_and_this_is_said(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    parts = make(tmp_path / "job", inputs)
    os.utime(inputs[0], (1, 1))  # another date, the same content
    assert parts.pending() == []
    inputs[2].write_text("other\n")
    assert parts.pending() == [2]
    said: list[str] = []
    run_parts(parts, [2], Lines, Upper, notice=said.append)
    assert len(said) == 1 and str(inputs[2]) in said[0] and "changed" in said[0]
    assert content(parts) == expected(inputs)


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (path,) = corpus(tmp_path, files=1)

    class Growing(Upper):
        def write(self, result: str) -> None:
            super().write(result)
            with path.open("a") as file:
                file.write("more\n" if self.count == 1 else "")

    parts = Parts(tmp_path / "job", "capitals", {}, (path,))
    parts.claim()
    with pytest.raises(DataError, match="was changed while it was read"):
        run_parts(parts, [0], Lines, Growing)


def test_a_folder_of_another_job_is_refused_with_what_differs(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    make(tmp_path / "job", inputs, tokenizer="x")
    for kind, options, files, message in (
        ("capitals", {"a": 1, "tokenizer": "y"}, inputs, "tokenizer was 'x', is 'y'"),
        ("dataset", {"a": 1, "tokenizer": "x"}, inputs, "makes a capitals, this makes a dataset"),
        ("capitals", {"a": 1, "tokenizer": "x"}, inputs[:2], "3 inputs, now 2"),
    ):
        other = Parts(tmp_path / "job", kind, options, files)
        assert not other.is_begun()
        with pytest.raises(DataError, match=message):
            other.claim()
    assert Parts(tmp_path / "job", "capitals", {"a": 1, "tokenizer": "x"}, inputs).is_begun()
    other.claim(replace=True)
    assert other.pending() == [0, 1]


def test_bad_inputs_and_folders_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    (tmp_path / "link.txt").symlink_to(inputs[0])
    for files, message in (
        ((inputs[0], inputs[1], tmp_path / "link.txt"), "given twice"),
        ((tmp_path / "none.txt",), "does not exist"),
        ((tmp_path,), "is a folder"),
        ((), "no input files"),
    ):
        with pytest.raises(DataError, match=message):
            Parts(tmp_path / "job", "x", {}, files).claim()
    assert not (tmp_path / "job").exists()
    with pytest.raises(DataError, match="holds no job"):
        Parts(tmp_path, "x", {}, inputs).claim()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text(json.dumps({"kind": "x"}))
    with pytest.raises(DataError, match="damaged"):
        Parts(tmp_path / "job", "x", {}, inputs).claim()


def test_a_part_in_other_hands_is_refused_and_its_folder_kept(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    parts = Parts(tmp_path / "job", "x", {}, inputs)
    parts.claim()
    with open(tmp_path / "job" / "00001.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process works on .*in1.txt"):
            run_parts(parts, [1], Lines, Upper)
        parts.discard()
        assert parts.is_begun()
    parts.discard()
    assert not (tmp_path / "job").exists()


def test_data_files_that_lost_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "COMMIT_BYTES", 5 << 20)
    inputs = corpus(tmp_path)
    with pytest.raises(DataError, match=":18:"):
        make(tmp_path / "job", inputs, stop=inputs[1].read_text().splitlines()[17])
    os.truncate(tmp_path / "job" / "00001.out", 3)
    with pytest.raises(DataError, match="00001.out has 3 bytes, its journal counts"):
        make(tmp_path / "job", inputs)


def test_a_file_that_cannot_grow_is_named_and_the_work_goes_on_later(tmp_path: Path) -> None:
    inputs = corpus(tmp_path)
    parts = Parts(tmp_path / "job", "capitals", {"a": 1}, inputs)
    parts.claim()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
        with pytest.raises(OSError, match=r"File too large: .*0000\d\.out"):
            run_parts(parts, parts.pending(), Lines, Upper, workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert content(make(tmp_path / "job", inputs)) == expected(inputs)


def test_only_committed_bytes_count(tmp_path: Path) -> None:
    inputs = corpus(tmp_path, files=1)
    parts = Parts(tmp_path / "job", "capitals", {}, inputs)
    parts.claim()
    with parts.open(0) as part:
        part.write("out", b"abcd")
        part.commit({"at": 1}, 1, {})
        part.write("out", b"efghij")
    with parts.open(0) as part:
        assert part.array("out", "S1").tolist() == [b"a", b"b", b"c", b"d"]
        assert part.array("none", "<i8").tolist() == []
        part.write("out", b"")  # opens the file, cuts it, and writes nothing
        part.commit(None, 1, {}, done=True)
        assert part.size("out") == part.path("out").stat().st_size == 4
    with parts.read(0).path("out").open("ab") as file:
        file.write(b"behind")
    assert parts.read(0).array("out", np.uint16).nbytes == 4
    assert parts.read(0).cut("out").read_bytes() == b"abcd"
    os.truncate(parts.read(0).path("out"), 3)
    with pytest.raises(DataError, match="00000.out has 3 bytes, its journal counts 4"):
        parts.read(0).array("out", np.uint8)


@pytest.mark.parametrize("begun", [True, False])
def test_nothing_is_left_of_a_part_that_begins_anew(begun: bool, tmp_path: Path) -> None:
    inputs = corpus(tmp_path, files=1)
    parts = Parts(tmp_path / "job", "capitals", {}, inputs)
    parts.claim()
    with parts.open(0) as part:
        part.write("out", b"abcd")
        if begun:
            part.commit({"at": 1}, 1, {})
    assert parts.read(0).path("out").exists()
    inputs[0].write_text("")
    run_parts(parts, parts.pending(), Lines, Upper)
    assert parts.read(0).is_done() and not parts.read(0).path("out").exists()


def test_there_is_one_long_block_at_a_time(tmp_path: Path) -> None:
    held, most = 0, 0
    lock = threading.Lock()

    class LongLines(Lines):
        def read(self) -> Line | None:
            nonlocal held, most
            if self.before_long is not None:
                self.before_long()
            line = super().read()
            if line is None:
                return None
            line.held_bytes = 3 << 20
            with lock:
                held += 1
                most = max(most, held)
            return line

    class Counted(Upper):
        def write(self, result: str) -> None:
            nonlocal held
            super().write(result)
            with lock:
                held -= 1

    inputs = tuple(tmp_path / f"in{k}.txt" for k in range(4))
    for path in inputs:
        path.write_text("slow\n" * 10)
    parts = Parts(tmp_path / "job", "upper", {}, inputs)
    parts.claim()
    run_parts(parts, parts.pending(), LongLines, Counted, workers=4)
    assert most == 1 and not parts.pending()
