"""Best-fit packing: as full as the plain rule makes it, nothing lost, nothing cut that fits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.cli.main import main
from megatron_cpt.data import (
    Document,
    IndexedDataset,
    SamplePlan,
    _native,
    build_dataset,
    open_windows,
    pack_dataset,
    packing,
    verify_dataset,
)
from megatron_cpt.data.sampler import Source
from megatron_cpt.errors import DataError, VerificationError
from tests.data.conftest import largest_file
from tests.data.test_windows import laid_out, same, write_dataset

ROOT = Path(__file__).resolve().parents[2]


def pieces_of(lengths: list[int], capacity: int) -> list[int]:
    """Predictions of each piece: full ones as long as there are, then the rest."""
    pieces = []
    for length in lengths:
        full, rest = divmod(length - 1, capacity)
        pieces += [capacity] * full + [rest] * (rest > 0)
    return pieces


def best_fit_decreasing(pieces: list[int], capacity: int) -> list[list[int]]:
    """The rule, bin by bin: each piece, the longest first, into the fullest bin that still holds it."""
    bins: list[list[int]] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [each for each in bins if sum(each) + piece <= capacity]
        if not fitting:
            bins.append([piece])
        else:
            max(fitting, key=sum).append(piece)
    return bins


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


@given(lengths=st.lists(st.integers(0, 200), max_size=60), capacity=st.integers(1, 130))
@settings(max_examples=300, deadline=None)
def test_bins_are_those_of_the_plain_rule(lengths: list[int], capacity: int) -> None:
    firsts, counts, borders = _native.pack(starts_of(lengths), capacity)
    bins = [counts[low:high].tolist() for low, high in zip(borders, borders[1:], strict=False)]
    expected = best_fit_decreasing(pieces_of([length for length in lengths if length], capacity), capacity)
    assert sorted(map(sum, bins)) == sorted(map(sum, expected)), "bins of one room are alike, all else is given"
    assert sorted(counts.tolist()) == sorted(pieces_of([length for length in lengths if length], capacity))
    for low, high in zip(borders, borders[1:], strict=False):
        assert (np.diff(firsts[low:high]) > 0).all(), "a bin is read in the order of the stream"
    assert (firsts.dtype, counts.dtype, borders.dtype) == (np.int64, np.int32, np.int64)


def test_whole_documents_and_full_pieces(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "x", [1, 30, 2, 8, 9, 5, 1, 10, 17])
    manifest = pack_dataset(dataset, 8)
    windows = open_windows(dataset, 8, "best_fit")
    starts = dataset.document_starts
    pieces = [tuple(piece) for n in range(len(windows)) for piece in zip(*windows.pieces(n), strict=True)]
    expected = [
        (start + at, min(8, length - 1 - at))
        for start, length in zip(starts, np.diff(starts), strict=False)
        for at in range(0, length - 1, 8)
    ]
    assert sorted(pieces) == expected
    assert manifest["predictions"] == sum(count for _, count in pieces) == dataset.num_tokens - 9
    assert manifest["bins"] == len(windows) and manifest["pieces"] == len(pieces)
    assert manifest["fill"] == manifest["predictions"] / (8 * len(windows))
    for number in range(len(windows)):
        own = [(int(first), int(count)) for first, count in zip(*windows.pieces(number), strict=True)]
        assert same(windows.window(number), laid_out(dataset, own, 8))


def test_real_lengths_fill_the_bins() -> None:
    lengths = np.maximum(1, np.random.default_rng(7).lognormal(5.8, 1.2, 50_000)).astype(np.int64)
    _, counts, borders = _native.pack(starts_of(list(lengths)), 4096)
    predictions = int((lengths - 1).sum())
    assert counts.sum(dtype=np.int64) == predictions
    assert predictions / (4096 * (len(borders) - 1)) >= 0.995
    sums = np.add.reduceat(counts, borders[:-1], dtype=np.int64)
    assert sums.max() <= 4096 and (sums < 2048).sum() <= 1, "two half empty bins would be one"


def test_a_pack_is_made_once_and_again_for_another_dataset(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "x", [50, 3, 20])
    made = pack_dataset(dataset, 16)
    path = tmp_path / "x.pack-16.bin"
    before = path.stat().st_mtime_ns
    assert pack_dataset(dataset, 16) == made and path.stat().st_mtime_ns == before
    facts = tmp_path / "x.pack-16.manifest.json"
    held = facts.read_text()
    write_dataset(tmp_path / "x", [50, 3, 21])
    facts.write_text(held)
    with pytest.raises(DataError, match="is of another dataset than .*data pack .* --seq-length 16"):
        open_windows(IndexedDataset(tmp_path / "x"), 16, "best_fit")
    changed = IndexedDataset(tmp_path / "x")
    assert pack_dataset(changed, 16)["predictions"] == 71 == made["predictions"] + 1
    assert len(open_windows(changed, 16, "best_fit")) == 5
    assert sorted(p.name for p in tmp_path.glob("*pack*")) == ["x.pack-16.bin", "x.pack-16.manifest.json"]


def test_documents_cut_elsewhere_are_another_dataset(tmp_path: Path) -> None:
    """The same tokens with other borders: .bin alone would not tell."""
    pack_dataset(write_dataset(tmp_path / "x", [40]), 16)
    facts = tmp_path / "x.pack-16.manifest.json"
    held = facts.read_text()
    changed = write_dataset(tmp_path / "x", [20, 20])
    facts.write_text(held)
    with pytest.raises(DataError, match="another dataset"):
        open_windows(changed, 16, "best_fit")


def test_another_pack_of_the_same_dataset_is_another_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another rule, or with its bins in another order: a run must not go on over it as if nothing had changed."""
    dataset = write_dataset(tmp_path / "x", [17, 17, 17])

    def hashes() -> tuple[str, str]:
        plan = SamplePlan([Source(dataset, "xx", packing="best_fit")], 16, 1)
        return plan.windows[0].content_hash, plan.order_hash(2)

    pack_dataset(dataset, 16)
    found = [hashes()]
    assert hashes() == found[0]
    path, manifest = tmp_path / "x.pack-16.bin", tmp_path / "x.pack-16.manifest.json"
    first, second, *rest = np.frombuffer(path.read_bytes(), "<i8", 3)
    path.write_bytes(np.array([second, first, *rest], "<i8").tobytes() + path.read_bytes()[24:])
    value = json.loads(manifest.read_text())
    value["outputs"]["bin"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(value))
    found.append(hashes())
    monkeypatch.setattr(packing, "_RULE", 2)
    pack_dataset(dataset, 16)
    found.append(hashes())
    for each in zip(*found, strict=True):
        assert len(set(each)) == 3


def test_missing_and_damaged_packs_are_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "x", [50, 3, 20])
    with pytest.raises(
        DataError, match=r"is not packed for seq_length 16; make it with `data pack .*x --seq-length 16`"
    ):
        open_windows(dataset, 16, "best_fit")
    pack_dataset(dataset, 16)
    path = tmp_path / "x.pack-16.bin"
    shutil.copy(path, tmp_path / "whole")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="missing or not of"):
        open_windows(dataset, 16, "best_fit")
    shutil.copy(tmp_path / "whole", path)
    changed_pack(tmp_path / "x", lambda firsts, borders, counts: firsts.put(0, 0x7F << 56))  # with its manifest
    windows = open_windows(dataset, 16, "best_fit")
    with pytest.raises(DataError, match="the pack is damaged, make it again"):
        for number in range(len(windows)):
            windows.window(number)


def test_a_pack_changed_under_its_manifest_is_never_read(tmp_path: Path) -> None:
    """Bins in another order are another order of the data, with the hash of the old one; `data pack` mends it."""
    dataset = write_dataset(tmp_path / "x", [17, 17, 17])
    pack_dataset(dataset, 16)
    path = tmp_path / "x.pack-16.bin"
    whole, facts = path.read_bytes(), path.stat()
    first, second, *rest = np.frombuffer(whole, "<i8", 3)
    path.write_bytes(np.array([second, first, *rest], "<i8").tobytes() + whole[24:])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size
    source = Source(dataset, "xx", packing="best_fit")
    with pytest.raises(DataError, match=r"pack-16.bin was changed after it was made .*`data pack .* --seq-length 16`"):
        SamplePlan([source], 16, 1)
    pack_dataset(dataset, 16)
    assert path.read_bytes() == whole and len(SamplePlan([source], 16, 1).windows[0]) == 3
    path.unlink()
    assert not packing.is_packed(dataset, 16)
    pack_dataset(dataset, 16)
    assert path.read_bytes() == whole


@pytest.fixture
def packed(documents: list[Document], tokenizer: Path, tmp_path: Path) -> Path:
    """Prefix of a dataset with packs for 16 and 300."""
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    for seq_length in (16, 300):
        pack_dataset(IndexedDataset(tmp_path / "x"), seq_length)
    (tmp_path / "xx.pack-8.manifest.json").write_text("of another prefix")
    return tmp_path / "x"


def changed_pack(prefix: Path, change: Callable[[np.ndarray, np.ndarray, np.ndarray], object]) -> None:
    """Change firsts, borders or counts of the pack for 16, with a manifest that agrees."""
    path, facts = Path(f"{prefix}.pack-16.bin"), Path(f"{prefix}.pack-16.manifest.json")
    manifest, data = json.loads(facts.read_text()), bytearray(path.read_bytes())
    pieces, bins = manifest["pieces"], manifest["bins"]
    firsts, borders = np.frombuffer(data, "<i8", pieces), np.frombuffer(data, "<i8", bins + 1, 8 * pieces)
    change(firsts, borders, np.frombuffer(data, "<i4", pieces, 8 * (pieces + bins + 1)))
    path.write_bytes(data)
    manifest["outputs"]["bin"]["sha256"] = hashlib.sha256(data).hexdigest()
    facts.write_text(json.dumps(manifest))


def first_shared(borders: np.ndarray) -> int:
    """The first bin of several pieces; full ones come before it."""
    return int(np.flatnonzero(np.diff(borders) > 1)[0])


def test_verifying_a_dataset_proves_its_packs(packed: Path) -> None:
    assert verify_dataset(packed)["packs_checked"] == [16, 300]
    path = Path(f"{packed}.pack-300.bin")
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(VerificationError, match=r"pack-300.bin was changed after it was made"):
        verify_dataset(packed)
    path.write_bytes(whole[:-4])
    with pytest.raises(DataError, match="missing or not of"):
        verify_dataset(packed)
    path.write_bytes(whole)
    facts = Path(f"{packed}.pack-300.manifest.json")
    facts.write_text(facts.read_text().replace('"predictions": ', '"predictions": 1'))
    with pytest.raises(VerificationError, match="predictions, its manifest says 1"):
        verify_dataset(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda firsts, borders, counts: firsts.put(3, 10**9), "begins outside of the dataset"),
        (lambda firsts, borders, counts: firsts.put(3, -1), "begins outside of the dataset"),
        (lambda firsts, borders, counts: firsts.put(3, firsts[4]), "is in two pieces|goes beyond its document"),
        (lambda firsts, borders, counts: counts.put(counts.argmin(), counts.min() + 1), "beyond its document|holds 17"),
        (lambda firsts, borders, counts: counts.put(0, 0), "a piece holds none"),
        (lambda firsts, borders, counts: counts.put(counts.argmax(), 15), "it holds [0-9]+ predictions of"),
        (lambda firsts, borders, counts: borders.put(1, 0), "not borders among its pieces"),
        (lambda firsts, borders, counts: borders.put(-1, borders[-1] + 1), "not borders among its pieces"),
        (
            lambda firsts, borders, counts: borders.put(first_shared(borders), borders[first_shared(borders)] + 1),
            "holds [0-9]+ predictions, or",
        ),
    ],
)
def test_a_pack_that_is_none_is_found(packed: Path, change: Callable[..., object], message: str) -> None:
    changed_pack(packed, lambda *arrays: None)
    verify_dataset(packed)
    changed_pack(packed, change)
    with pytest.raises(VerificationError, match=rf"pack-16.bin is no pack of .*({message})"):
        verify_dataset(packed)


def test_a_pack_of_what_the_dataset_held_before_is_found(packed: Path, tokenizer: Path) -> None:
    facts = Path(f"{packed}.pack-16.manifest.json")
    held = facts.read_text()
    build_dataset([Document("another text", "xx", "memory")], tokenizer, packed, "xx", overwrite=True)
    facts.write_text(held)
    with pytest.raises(DataError, match="is of another dataset"):
        verify_dataset(packed)


def test_a_dataset_that_is_replaced_takes_its_packs_along(packed: Path, tokenizer: Path) -> None:
    named = [Path(f"{packed}.pack-512"), Path(f"{packed}-more")]  # a dataset, and one beside with a pack
    for prefix in named:
        build_dataset([Document("some text", "xx", "memory")], tokenizer, prefix, "xx")
    pack_dataset(IndexedDataset(named[1]), 16)
    build_dataset([Document("another text", "xx", "memory")], tokenizer, packed, "xx", overwrite=True)
    left = sorted(path.name for path in packed.parent.glob(f"{packed.name}[.-]*pack-*") if path.suffix != ".idx")
    of_the_dataset = [f"{packed.name}.pack-512.{ending}" for ending in ("bin", "manifest.json")]
    assert left == sorted([f"{packed.name}-more.pack-16.{e}" for e in ("bin", "manifest.json")] + of_the_dataset)
    Path(f"{named[0]}.manifest.json").unlink()
    assert verify_dataset(packed)["packs_checked"] == []


def test_nothing_to_predict_and_impossible_lengths(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "x", [1, 1, 1])
    with pytest.raises(DataError, match="no document of two tokens"):
        pack_dataset(dataset, 16)
    for seq_length in (0, -1, 2**31):
        with pytest.raises(DataError, match="seq_length"):
            pack_dataset(dataset, seq_length)
    with pytest.raises(ValueError, match="starts fall"):
        _native.pack(np.array([0, 5, 3]), 8)


def test_memory_does_not_grow_with_room_that_nothing_fills(tmp_path: Path) -> None:
    """A sample of 2^30 tokens: one bin of all documents, without an array of that size."""
    lengths = [50, 3, 20, 0, 1]
    program = (
        "import numpy as np, resource; from megatron_cpt.data import _native\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        f"firsts, counts, borders = _native.pack(np.array({starts_of(lengths).tolist()}), 1 << 30)\n"
        "print(firsts.tolist(), counts.tolist(), borders.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[0, 50, 53] [49, 2, 19] [0, 3]\n", done.stderr


def test_too_little_memory_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pack(starts: np.ndarray, seq_length: int) -> None:
        raise MemoryError

    write_dataset(tmp_path / "x", [50, 3, 20])
    monkeypatch.setattr(packing._native, "pack", pack)
    assert main(["data", "pack", str(tmp_path / "x"), "--seq-length", "1000000000"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'x'}: not enough memory to pack 73 tokens for seq_length 1000000000" in said


def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "x", [5] * 2000)
    before = sorted(tmp_path.iterdir())
    with largest_file(4096):
        code = main(["data", "pack", str(tmp_path / "x"), "--seq-length", "16"])
    said = capsys.readouterr().err
    assert code == 1 and said.startswith(f"error: {tmp_path / 'x.pack-16.bin'}: File too large; "), said
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "x", [50, 3, 20])
    assert main(["data", "pack", str(tmp_path / "x"), "--seq-length", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bins"] == len(open_windows(dataset, 16, "best_fit")) == 5
    assert main(["data", "pack", str(tmp_path / "x"), "--seq-length", "17"]) == 0
    words = capsys.readouterr().out.split()
    pack = open_windows(dataset, 17, "best_fit")
    assert words[words.index("bins") + 1] == str(len(pack)) and words[words.index("pieces") + 1] == "6"
    assert main(["data", "pack", str(tmp_path / "y"), "--seq-length", "16"]) == 2
    assert "y.manifest.json is missing" in capsys.readouterr().err
