"""Archives that are alike are parsed once, and read as if each had been parsed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import archive, convert, open_torch_dist
from megatron_cpt.checkpoint.archive import ArchiveReader, read_archive
from megatron_cpt.errors import CheckpointError


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def outcome(read: Callable[[], Any]) -> Any:
    """A tensor, or else the name of what was made, or the message."""
    try:
        return value if isinstance(value := read(), archive.Array) else type(value).__name__
    except CheckpointError as caught:
        return str(caught)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all pickles that are read."""
    sizes: list[int] = []

    class Noted(archive.Unpickler):
        def __init__(self, data: bytes, find: Any) -> None:
            sizes.append(len(data))
            super().__init__(data, find)

    monkeypatch.setattr(archive, "Unpickler", Noted)
    return sizes


@pytest.mark.parametrize(("shape", "step"), [((1, 3), 3), ((700, 3), 7)])  # the ends of the first overlap
def test_a_byte_changed_anywhere_is_seen_or_does_not_matter(shape: tuple[int, ...], step: int, tmp_path: Path) -> None:
    first, second = (saved(torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in range(2))
    assert len(first) == len(second) and first != second
    path, good, length = tmp_path / "file", len(first), len(second)
    for place in [None, *range(0, min(length, 1200), step), *range(max(1200, length - 1200), length, step)]:
        changed = bytearray(second)
        if place is not None:
            changed[place] ^= 0x11
        path.write_bytes(first + changed)
        reader = ArchiveReader()
        assert reader.read(path, 0, good, "kind") == read_archive(path, 0, good)
        expected = outcome(lambda: read_archive(path, good, length))
        assert outcome(lambda: reader.read(path, good, length, "kind")) == expected, place  # noqa: B023


def test_archives_that_differ_in_their_data_are_parsed_once(parsed: list[int], tmp_path: Path) -> None:
    parts = [saved(torch.full((40, 30), float(number))) for number in range(20)]  # by torch, with checksums
    parts += [saved(torch.zeros(30, 40)), saved(torch.zeros(40, 30)[:, :20].t()), saved({"it": torch.zeros(40, 30)})]
    path = tmp_path / "file"
    path.write_bytes(b"".join(parts))
    reader, start = ArchiveReader(), 0
    for number, part in enumerate(parts):
        found = reader.read(path, start, len(part), None)
        if number < 20:
            data = path.read_bytes()[found.offset : found.offset + 4800]
            assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), torch.full((1200,), number))
        start, mine = start + len(part), len(parsed)
        assert found == read_archive(path, start - len(part), len(part))
        assert len(parsed) == mine + 1
    assert len(parsed) == len(parts) + 4  # of each form one


def test_opening_takes_one_parse_for_each_form(parsed: list[int], make_model, tmp_path: Path) -> None:
    counts = []
    for layers in (2, 12):
        source = make_model(tmp_path / f"hf{layers}", num_layers=layers)
        convert(source, tmp_path / f"stored{layers}", "torch_dist")
        before = len(parsed)
        open_torch_dist(tmp_path / f"stored{layers}")
        counts.append(len(parsed) - before)
    assert 0 < counts[0] == counts[1]


def test_a_reader_that_has_read_a_form_notices_a_file_cut_short(tmp_path: Path) -> None:
    part, path, reader = saved(torch.zeros(40, 30)), tmp_path / "file", ArchiveReader()
    path.write_bytes(part + part[:-1])
    reader.read(path, 0, len(part), None)
    with pytest.raises(CheckpointError, match="were expected, and the file has"):
        reader.read(path, len(part), len(part), None)
