"""What is in a dataset, in words: one document or one sample, decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import SamplePlan
from megatron_cpt.data.windows import open_windows
from megatron_cpt.errors import DataError
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

_FACTS = ("language", "vocab_size", "text_bytes", "bytes_per_token", "empty_documents", "tokenizer_sha256", "inputs")


def tokenizer_of(dataset: IndexedDataset, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer a dataset was built with.

    Args:
        dataset: the dataset.
        path: where the tokenizer is; None: where it was when the dataset was built.

    Raises:
        DataError: the dataset names no tokenizer, or `path` holds another one.
        TokenizerError: there is no tokenizer at that place.
    """
    place = path or dataset.manifest.get("tokenizer")
    if place is None:
        raise DataError(f"{dataset.prefix} does not say which tokenizer made it; name it")
    tokenizer = load_tokenizer(place)
    if dataset.manifest:
        dataset.check_tokenizer(tokenizer.sha256)
    return tokenizer


def describe(dataset: IndexedDataset) -> dict[str, Any]:
    """The facts of a dataset: sizes, type on disk, and what its manifest says."""
    facts = {name: dataset.manifest[name] for name in _FACTS if name in dataset.manifest}
    return {
        "prefix": dataset.prefix,
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        **facts,
    }


def describe_document(dataset: IndexedDataset, tokenizer: Tokenizer, number: int) -> dict[str, Any]:
    """One document: its place in the token stream, ids and text.

    Raises:
        DataError: there is no such document.
    """
    ids = dataset.document(number)
    return {"number": number, "start": int(dataset.document_starts[number]), **_decoded(ids, tokenizer)}


def describe_sample(
    dataset: IndexedDataset, tokenizer: Tokenizer, number: int, seq_length: int, seed: int
) -> dict[str, Any]:
    """One sample of a plan with this dataset as its only source.

    Returns:
        `number`, `epoch`, `window`, `start` (its first token in the stream), `order_hash` of the samples up to it, and
        `pieces`: the ids and text between two document borders, the last label included.

    Raises:
        DataError: no such sample.
    """
    plan = SamplePlan([(dataset, dataset.language, 1.0)], seq_length, seed)
    place = plan.place(number)
    firsts, counts = open_windows(dataset, seq_length).pieces(place.window)
    tokens, borders = dataset.tokens(int(firsts[0]), int(firsts[0] + counts[0]) + 1)
    return {
        "number": number,
        "epoch": place.epoch,
        "window": place.window,
        "start": place.window * seq_length,
        "order_hash": plan.order_hash(number + 1),
        "pieces": [_decoded(piece, tokenizer) for piece in np.split(tokens, borders[borders > 0])],
    }


def _decoded(ids: npt.NDArray[np.integer[Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"tokens": len(ids), "ids": ids.tolist(), "text": tokenizer.decode(ids.tolist())}
