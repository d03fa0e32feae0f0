"""Best-fit packing: the predictions of whole documents in as few bins of S positions as can be had.

`<prefix>.pack-<S>.bin` holds, little endian and back to back, the first prediction of each piece (i64),
the border of each bin among the pieces (i64, bins + 1) and the predictions of each piece (i32), bin after
bin. `<prefix>.pack-<S>.manifest.json`, written last, says how many of them there are and of which dataset.

Source: best-fit decreasing (Johnson 1974); for language models Ding et al. 2024, "Fewer Truncations
Improve Language Modeling".
Deviates: a document longer than S is cut into pieces of S predictions and a rest, and the piece after a
cut begins with the token that was the last label: no prediction is lost at a cut.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import read_manifest, sha256_file, write_atomic, write_manifest
from megatron_cpt.data import _native
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.errors import DataError, VerificationError

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

_KIND = "pack"
_RULE = 1  # of the packing; another number makes every pack anew


class Pack:
    """The bins of a dataset, read through a memory map.

    Args:
        path: the pack's file.
        manifest: what was written of it.

    Attributes:
        path: the file.
        sha256: of the file, as the manifest says it.
        identity: the rule that made the bins and the file's content.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        num_pieces, num_bins = int(manifest["pieces"]), int(manifest["bins"])
        self.path, self.sha256 = path, str(manifest["outputs"]["bin"]["sha256"])
        expected = 12 * num_pieces + 8 * (num_bins + 1)
        if not _has_size(path, expected):
            raise DataError(
                f"{path} is missing or not of {expected} bytes, as its manifest says; make it again with `data pack`"
            )
        mapped = np.memmap(path, mode="r").view(np.ndarray)
        self.identity: list[int | str] = [int(manifest["rule"]), self.sha256]
        self._firsts = np.frombuffer(mapped, "<i8", num_pieces)
        self._borders = np.frombuffer(mapped, "<i8", num_bins + 1, 8 * num_pieces)
        self._counts = np.frombuffer(mapped, "<i4", num_pieces, 8 * (num_pieces + num_bins + 1))

    def __len__(self) -> int:
        """Bins."""
        return len(self._borders) - 1

    def pieces(self, number: int) -> tuple[Int64s, Int32s]:
        """First token and predictions of each piece of a bin, in the order of the stream."""
        pieces = slice(int(self._borders[number]), int(self._borders[number + 1]))
        return self._firsts[pieces], self._counts[pieces]

    @property
    def was_changed(self) -> bool:
        """Whether the file is no longer the one that was made; reads it once."""
        return sha256_file(self.path) != self.sha256

    @property
    def predictions(self) -> int:
        """Predictions of all bins."""
        return int(self._counts.sum(dtype=np.int64))

    def difference(self, starts: Int64s, capacity: int) -> str:
        """What keeps the bins from holding each prediction of a dataset once; "" where nothing does.

        Args:
            starts: first token of each document, and the number of tokens: [documents + 1].
            capacity: predictions that a bin may hold.
        """
        counts, borders = self._counts.astype(np.int64), self._borders
        if borders[0] != 0 or borders[-1] != len(counts) or (np.diff(borders) <= 0).any():
            return "its bins are not borders among its pieces"
        sums = np.add.reduceat(counts, borders[:-1])
        if (counts < 1).any() or sums.max() > capacity:
            return f"bin {int(sums.argmax())} holds {sums.max()} predictions, or a piece holds none"
        order = np.argsort(self._firsts)
        firsts, counts = self._firsts[order], counts[order]
        if firsts[0] < 0 or firsts[-1] >= starts[-1]:
            return "a piece begins outside of the dataset"
        ends = firsts + counts
        home = np.searchsorted(starts, firsts, "right")
        outside = np.flatnonzero(ends > starts[home] - 1)
        if len(outside):
            return f"the piece at token {firsts[outside[0]]} goes beyond its document"
        twice = np.flatnonzero(ends[:-1] > firsts[1:])
        if len(twice):
            return f"the prediction at token {firsts[twice[0] + 1]} is in two pieces"
        expected = int(starts[-1]) - int((np.diff(starts) > 0).sum())
        return "" if counts.sum() == expected else f"it holds {counts.sum()} predictions of {expected}"


def pack_dataset(dataset: IndexedDataset, seq_length: int) -> dict[str, Any]:
    """Pack a dataset for one sequence length, or find it packed already.

    Takes time O(documents * log S), 12 bytes a piece on disk, and in memory 16 a piece, 24 a bin, 16 a length up
    to that of the longest piece, and 4.2 for each of min(S, predictions of the dataset) positions.
    The result depends on the lengths of the documents and on S alone.

    Args:
        dataset: the dataset; the pack is written beside it.
        seq_length: S, predictions of a bin.

    Returns:
        the manifest: `bins`, `pieces`, `predictions`, `fill` (predictions / (bins * S)), ...

    Raises:
        DataError: no document has two tokens, seq_length is not 1 to 2^30, there are more than 2^32 - 2 pieces, or
            not enough memory.
        OSError: the system takes no file; its file name is the path of the pack.
    """
    path, manifest = _data_path(dataset.prefix, seq_length), _manifest_path(dataset.prefix, seq_length)
    if is_packed(dataset, seq_length):
        held = read_manifest(manifest, _KIND, DataError)
        if sha256_file(path) == held["outputs"]["bin"]["sha256"]:
            return held
    try:
        firsts, counts, borders = _native.pack(dataset.document_starts, seq_length)
    except ValueError as caught:
        raise DataError(f"{dataset.prefix}: {caught}") from None
    except MemoryError:
        raise DataError(
            f"{dataset.prefix}: not enough memory to pack {dataset.num_tokens:,} tokens for seq_length {seq_length}; "
            "use a shorter one, or a machine with more memory"
        ) from None
    if not len(counts):
        raise DataError(f"{dataset.prefix} has no document of two tokens, so there is nothing to predict")

    def fill(file: IO[bytes]) -> None:
        for array, dtype in ((firsts, "<i8"), (borders, "<i8"), (counts, "<i4")):
            file.write(np.ascontiguousarray(array, dtype).data)

    manifest.unlink(missing_ok=True)  # from here until the end there is no pack
    write_atomic(path, fill)
    bins, predictions = len(borders) - 1, int(counts.sum(dtype=np.int64))
    write_manifest(
        manifest,
        _KIND,
        _identity(dataset),
        rule=_RULE,
        seq_length=seq_length,
        bins=bins,
        pieces=len(counts),
        predictions=predictions,
        fill=predictions / (bins * seq_length),
        outputs={"bin": {"bytes": path.stat().st_size, "sha256": sha256_file(path)}},
    )
    return read_manifest(manifest, _KIND, DataError)


def is_packed(dataset: IndexedDataset, seq_length: int) -> bool:
    """Whether there is a pack of this dataset, as it is now, for this sequence length; its content is not looked at."""
    path = _manifest_path(dataset.prefix, seq_length)
    if not path.exists():
        return False
    manifest = read_manifest(path, _KIND, DataError)
    return _is_of(manifest, dataset) and _has_size(
        _data_path(dataset.prefix, seq_length), manifest["outputs"]["bin"]["bytes"]
    )


def open_pack(dataset: IndexedDataset, seq_length: int) -> Pack:
    """The pack of a dataset, proven to be what was made: a run that goes on reads the order it began with.

    Reads the file once for its SHA-256: about as many bytes as the dataset's index, which is read in whole too.

    Raises:
        DataError: there is none for this sequence length, it is of another dataset, or it was changed.
    """
    pack = _map_pack(dataset, seq_length)
    if pack.was_changed:
        raise DataError(
            f"{pack.path} was changed after it was made (its SHA-256 differs); {_advice(dataset, seq_length)}"
        )
    return pack


def _map_pack(dataset: IndexedDataset, seq_length: int) -> Pack:
    path = _manifest_path(dataset.prefix, seq_length)
    if not path.exists():
        raise DataError(f"{dataset.prefix} is not packed for seq_length {seq_length}; {_advice(dataset, seq_length)}")
    manifest = read_manifest(path, _KIND, DataError)
    if not _is_of(manifest, dataset):
        raise DataError(f"{path} is of another dataset than {dataset.prefix} holds now; {_advice(dataset, seq_length)}")
    return Pack(_data_path(dataset.prefix, seq_length), manifest)


def _advice(dataset: IndexedDataset, seq_length: int) -> str:
    return f"make it with `data pack {dataset.prefix} --seq-length {seq_length}`"


def packed_lengths(prefix: str | Path) -> list[int]:
    """The sequence lengths for which there is a pack beside the dataset at `prefix`, of whatever it then held."""
    prefix = Path(prefix)
    name = re.compile(re.escape(prefix.name) + r"\.pack-([1-9][0-9]*)\.manifest\.json")
    found = (name.fullmatch(path.name) for path in prefix.parent.iterdir())
    return sorted(int(match[1]) for match in found if match)


def remove_packs(prefix: str | Path) -> None:
    """Remove the packs beside `prefix`: of a dataset that is being replaced they say nothing any more."""
    for seq_length in packed_lengths(prefix):
        manifest = _manifest_path(prefix, seq_length)
        if _is_pack(manifest):
            manifest.unlink()
            _data_path(prefix, seq_length).unlink(missing_ok=True)


def _is_pack(manifest: Path) -> bool:
    """Whether the manifest is a pack's, and not that of a dataset with such a name."""
    try:
        read_manifest(manifest, _KIND, DataError)
    except DataError:
        return False
    return True


def verify_pack(dataset: IndexedDataset, seq_length: int) -> None:
    """Prove a pack: its hash, its counts, and that its bins hold every prediction of the dataset exactly once.

    Memory: 40 bytes a piece.

    Raises:
        DataError: the pack is of another dataset, or not of the size its manifest says.
        VerificationError: it was changed, or its content is not that of a pack of this dataset.
    """
    pack = _map_pack(dataset, seq_length)
    if pack.was_changed:
        raise VerificationError(f"{pack.path} was changed after it was made (its SHA-256 differs); pack again")
    manifest = read_manifest(_manifest_path(dataset.prefix, seq_length), _KIND, DataError)
    wrong = pack.difference(dataset.document_starts, seq_length)
    if not wrong and manifest["predictions"] != (predictions := pack.predictions):
        wrong = f"{predictions} predictions, its manifest says {manifest['predictions']}"
    if wrong:
        raise VerificationError(f"{pack.path} is no pack of {dataset.prefix}: {wrong}; remove it, pack again")


def _is_of(manifest: dict[str, Any], dataset: IndexedDataset) -> bool:
    return bool(manifest["inputs"] == _identity(dataset) and manifest["rule"] == _RULE)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _identity(dataset: IndexedDataset) -> dict[str, str]:
    """The dataset by content: its tokens, and where its documents begin."""
    outputs = dataset.manifest.get("outputs", {})
    files = {ending: str(outputs[ending]["sha256"]) for ending in ("bin", "idx") if ending in outputs}
    return files or {"idx": dataset.content_hash}


def _data_path(prefix: str | Path, seq_length: int) -> Path:
    return Path(f"{prefix}.pack-{seq_length}.bin")


def _manifest_path(prefix: str | Path, seq_length: int) -> Path:
    return Path(f"{prefix}.pack-{seq_length}.manifest.json")
