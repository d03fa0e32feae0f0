"""The index files of megatron-core's own GPTDataset, so that Megatron trains on a dataset without building them.

For each split Megatron looks in its cache folder for four files under one name, the MD5 of a description:
`description.txt`, `document_index.npy` (documents of all epochs, shuffled), `sample_index.npy` (document and
token at which each sample begins) and `shuffle_index.npy` (the order of the samples). These are they, byte
for byte, of megatron-core 0.16.1 with its default settings. This project's own order needs none of them.

Source: megatron/core/datasets/gpt_dataset.py and helpers.cpp, read for what they do.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import write_atomic, write_text_atomic
from megatron_cpt.data import _native
from megatron_cpt.data.indexed import HEADER, IndexedDataset, idx_path
from megatron_cpt.errors import DataError

Int32s = npt.NDArray[np.int32]

SPLITS = ("train", "valid", "test")
_NAME = "GPTDataset"
_SEPARATE_BELOW = 0.80  # of an epoch: a last one that is shorter is shuffled by itself
_TOKENIZER = "megatron.core.tokenizers.text.models.default_tokenizer.DefaultTokenizerText"


@dataclass(frozen=True)
class McoreSettings:
    """What Megatron is started with, as far as it decides the indices.

    Args:
        seq_length: `--seq-length`.
        num_samples: samples of train, valid and test; None: one epoch. Splits not named are not written.
        seed: `--seed`.
        split: `--split`, shares of train, valid and test.
        tokenizer: what Megatron's tokenizer has as `unique_identifiers`; None: those of the
            `MegatronTokenizer` at the path that the dataset's manifest names.
        dataset_path: `--data-path`; None: the prefix with which the dataset was opened.
    """

    seq_length: int
    num_samples: Sequence[int | None]
    seed: int = 1234
    split: str = "969,30,1"
    tokenizer: Mapping[str, Any] | None = None
    dataset_path: str | None = None


def write_mcore_indices(dataset: IndexedDataset, output: str | Path, settings: McoreSettings) -> dict[str, Any]:
    """Write the index files of each split into Megatron's cache folder (`--data-cache-path`).

    One dataset, not a blend; the drawing is NumPy's MT19937. Takes time O(documents * epochs + samples) and
    4 bytes a document and epoch, 12 bytes a sample of memory.

    Args:
        dataset: what Megatron is to read.
        output: the cache folder; it is made.
        settings: how Megatron is started.

    Returns:
        split -> `name` (path without an ending), `documents`, `epochs`, `samples`.

    Raises:
        DataError: settings that cannot be, or a split without a sample.
        OSError: the system takes no file; its file name is the path of the index.
    """
    if settings.seq_length < 1 or not 0 <= settings.seed < 2**32 or not 0 < len(settings.num_samples) <= len(SPLITS):
        raise DataError(
            f"seq_length {settings.seq_length}, seed {settings.seed}, {len(settings.num_samples)} numbers of samples; "
            "expected at least 1, 0 to 2^32 - 1, and 1 to 3 of them"
        )
    matrix = split_matrix(settings.split)
    lengths = _sequence_lengths(dataset)
    chosen = []
    for split, bounds, num_samples in zip(SPLITS, matrix, settings.num_samples, strict=False):
        if bounds is None:
            continue
        first, stop = (int(round(bound * float(len(lengths)))) for bound in bounds)
        tokens = int(lengths[first:stop].sum(dtype=np.int64))
        if num_samples is not None and num_samples < 1:
            raise DataError(f"{num_samples} samples of {split}; expected at least 1")
        if not tokens or (num_samples is None and tokens <= settings.seq_length):
            raise DataError(
                f"the {split} split of {dataset.prefix}, {tokens} tokens, has no sample of {settings.seq_length} "
                f"tokens; change the split {settings.split!r} or give more text"
            )
        description = _description(dataset, split, num_samples, matrix, settings)
        chosen.append((split, np.arange(first, stop, dtype=np.int32), tokens, num_samples, description))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {}
    for split, documents, tokens, num_samples, description in chosen:
        name = f"{hashlib.md5(description.encode(), usedforsecurity=False).hexdigest()}-{_NAME}-{split}"
        epochs, indices = _indices(lengths, documents, tokens, num_samples, settings)
        for index, array in indices.items():
            write_atomic(folder / f"{name}-{index}.npy", partial(_save, array=array))
        # Megatron takes the files only where this one is there too.
        write_text_atomic(folder / f"{name}-description.txt", description)
        written[split] = {
            "name": str(folder / name),
            "documents": len(documents),
            "epochs": epochs,
            "samples": len(indices["shuffle_index"]),
        }
    return written


def split_matrix(split: str) -> list[tuple[float, float] | None]:
    """Where train, valid and test begin and end, as shares of the documents; None where a split is empty.

    Raises:
        DataError: anything but one to three numbers from 0 on, one of them above.
    """
    numbers = re.findall(r"[.0-9]+", split)
    weights = [float(number) for number in numbers if re.fullmatch(r"\d+\.?\d*|\.\d+", number)]
    if len(weights) != len(numbers) or len(weights) > len(SPLITS) or not sum(weights) > 0:
        raise DataError(f"split {split!r}; expected one to three shares, such as 969,30,1")
    shares = np.array(weights + [0.0] * (len(SPLITS) - len(weights)))
    bounds: list[float] = [0]  # an integer, as the description has it
    for share in (shares / shares.sum()).tolist():
        bounds.append(bounds[-1] + share)
    return [(low, high) if low < high else None for low, high in zip(bounds, bounds[1:], strict=False)]


def _description(
    dataset: IndexedDataset,
    split: str,
    num_samples: int | None,
    matrix: list[tuple[float, float] | None],
    settings: McoreSettings,
) -> str:
    tokenizer = settings.tokenizer
    if tokenizer is None:
        if "tokenizer" not in dataset.manifest:
            raise DataError(
                f"{dataset.prefix} does not say which tokenizer made it; give Megatron's unique_identifiers"
            )
        tokenizer = {"class": _TOKENIZER, "tokenizer_path": dataset.manifest["tokenizer"]}
    return json.dumps(
        {
            "class": _NAME,
            "dataset_path": settings.dataset_path or dataset.prefix,
            "num_samples": num_samples,
            "index_split": split,
            "random_seed": settings.seed,
            "sequence_length": settings.seq_length,
            "split": settings.split,
            "split_matrix": matrix,
            "tokenizer": tokenizer,
        },
        indent=4,
    )


def _indices(
    lengths: Int32s, documents: Int32s, tokens: int, num_samples: int | None, settings: McoreSettings
) -> tuple[int, dict[str, npt.NDArray[Any]]]:
    """Epochs, and the three arrays of a split."""
    length = settings.seq_length
    epochs = 1 if num_samples is None else max(1, -(-(num_samples * length + 1) // tokens))
    total = (epochs * tokens - 1) // length
    alone = False  # whether the last epoch is shuffled by itself
    if epochs > 1:
        assert num_samples is not None
        before_last = ((epochs - 1) * tokens - 1) // length
        alone = num_samples - before_last < int(_SEPARATE_BELOW * ((tokens - 1) // length))
    draw = np.random.RandomState(settings.seed)
    document_index = _shuffled([documents] * (epochs - alone), draw)
    if alone:
        document_index = np.concatenate([document_index, _shuffled([documents], draw)])
    sample_index = _native.sample_index(lengths, document_index, length, total)
    number = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    first = before_last if alone else total
    shuffle_index = _shuffled([np.arange(first, dtype=number)], draw)
    if first < total:
        shuffle_index = np.concatenate([shuffle_index, _shuffled([np.arange(first, total, dtype=number)], draw)])
    return epochs, {"document_index": document_index, "sample_index": sample_index, "shuffle_index": shuffle_index}


def _shuffled(parts: Sequence[npt.NDArray[Any]], draw: np.random.RandomState) -> npt.NDArray[Any]:
    together = np.concatenate(parts)
    draw.shuffle(together)
    return together


def _sequence_lengths(dataset: IndexedDataset) -> Int32s:
    """Tokens of each sequence of the index, in memory: empty documents have none."""
    with open(idx_path(dataset.prefix), "rb") as file:
        _, _, _, count, _ = HEADER.unpack(file.read(HEADER.size))
        return np.fromfile(file, "<i4", count).astype(np.int32, copy=False)


def _save(file: IO[bytes], array: npt.NDArray[Any]) -> None:
    """`np.save`, kept from the file's descriptor: what it writes there by itself fails without the system's words."""
    np.save(SimpleNamespace(write=file.write), array)  # type: ignore[call-overload]
