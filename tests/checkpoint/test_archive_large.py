"""Archives beyond what 32 and 16 bits count: torch is the reference here too."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import archive
from megatron_cpt.checkpoint.archive import Array, lay_out_archive, read_archive
from megatron_cpt.checkpoint.archive_pickle import pickled
from tests.checkpoint.test_archive import new


def test_archives_of_more_than_4_gib(tmp_path: Path) -> None:
    value = {
        "small": new(3),
        "big": new(5 << 30, dtype=torch.uint8),
        "none": new(0),
        "edge": new(2**32 - 1, dtype=torch.int8),
    }
    value["last"] = new(2, 2, dtype=torch.int16)
    size, parts, offsets = lay_out_archive(value)
    assert offsets[-1] > 2**33 and sum(len(content) for _, content in parts) < 10_000
    path = tmp_path / "big.pt"
    marks = {"small": [1.0, 2.0, 3.0], "last": [[1, 2], [3, 4]]}
    places = dict(zip(value, offsets, strict=True))
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, content in [
            *parts,
            (places["small"], struct.pack("<3f", 1, 2, 3)),
            (places["big"] + (5 << 30) - 1, b"\x07"),
            (places["edge"] + 2**32 - 2, b"\xfe"),
            (places["last"], struct.pack("<4h", 1, 2, 3, 4)),
        ]:
            file.seek(offset)
            file.write(content)
    assert {name: array.offset for name, array in read_archive(path).items() if name != "none"} == {
        name: offset for name, offset in places.items() if name != "none"
    }
    from torch.utils.serialization import config

    for computed in (False, True):  # torch finds the storages by the directory, or by where its writer puts them
        with config.patch({"load.calculate_storage_offsets": computed}):
            loaded = torch.load(path, weights_only=True, mmap=True)
        assert {name: loaded[name].tolist() for name in marks} == marks
        assert (loaded["big"][-1].item(), loaded["edge"][-1].item(), loaded["none"].tolist()) == (7, -2, [])
        del loaded
    with torch.serialization.skip_data():  # torch writes the headers, and no data
        torch.save({"big": torch.empty(5 << 30, dtype=torch.uint8), "last": torch.empty(2)}, tmp_path / "torchs.pt")
    reader = torch._C.PyTorchFileReader(str(tmp_path / "torchs.pt"))
    found = read_archive(tmp_path / "torchs.pt")
    assert found["big"].shape == (5 << 30,)
    assert [array.offset for array in found.values()] == [reader.get_record_offset(f"data/{key}") for key in range(2)]


def test_more_records_than_16_bits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor, whose storage is the last of as many; to pickle the others would only take long."""
    count = 65_536

    def pickled_with_many(value: Any) -> tuple[bytes, list[Array]]:
        data, arrays = pickled(value)
        assert data.count(b"X\1\0\0\x000") == 1  # the key of its storage
        return data.replace(b"X\1\0\0\x000", b"X\5\0\0\x0065535"), arrays * count

    monkeypatch.setattr(archive, "pickled", pickled_with_many)
    size, parts, offsets = lay_out_archive(new(dtype=torch.int8))
    with open(tmp_path / "many.pt", "wb") as file:
        file.truncate(size)
        for offset, content in [*parts, (offsets[-1], b"\7")]:
            file.seek(offset)
            file.write(content)
    assert read_archive(tmp_path / "many.pt").offset == offsets[-1] and len(offsets) == count
    reader = torch._C.PyTorchFileReader(str(tmp_path / "many.pt"))
    assert len(reader.get_all_records()) == count + 5
    assert [reader.get_record_offset(f"data/{key}") for key in (0, 9, count - 1)] == [*offsets[:10:9], offsets[-1]]
    assert torch.load(tmp_path / "many.pt").view(-1)[0] == 7
