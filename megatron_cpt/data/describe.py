"""What is in a dataset, in words: one document or one sample, decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.sampler import SamplePlan
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
    """One document: its place in the token stream, the file it was read from, ids and text.

    Raises:
        DataError: there is no such document.
    """
    ids = dataset.document(number)
    start, file = int(dataset.document_starts[number]), file_of(dataset, number)
    return {"number": number, "start": start, "file": file, **_decoded(ids, tokenizer)}


def describe_sample(plan: SamplePlan, tokenizer: Tokenizer, number: int) -> dict[str, Any]:
    """One sample of a plan and where it comes from.

    Returns:
        `number`, `stage` (its name), `source`, `prefix`, `language`, `epoch`, `window`, `order_hash` of the samples
        up to it, and `pieces`, one for each document in it: `document`, `start` (its first token in the stream),
        `file` that the document was read from where the manifest knows it, ids and text, the last label included.

    Raises:
        DataError: the plan has no such sample.
    """
    place = plan.place(number)
    windows = plan.windows[place.source]
    dataset = windows.dataset
    spans = [
        span
        for first, count in zip(*(row.tolist() for row in windows.pieces(place.window)), strict=True)
        for span in _by_document(dataset, first, first + count + 1)
    ]
    return {
        "number": number,
        "stage": plan.order.stages[place.stage].name,
        "source": plan.order.sources[place.source].name,
        "prefix": dataset.prefix,
        "language": plan.languages[place.source],
        "epoch": place.epoch,
        "window": place.window,
        "order_hash": plan.order_hash(number + 1),
        "pieces": [
            {
                "document": document,
                "start": first,
                "file": file_of(dataset, document),
                **_decoded(dataset.tokens(first, last)[0], tokenizer),
            }
            for document, first, last in spans
        ],
    }


def file_of(dataset: IndexedDataset, document: int) -> str | None:
    """The file that a document was read from; None where the manifest does not say."""
    found = [
        source
        for source in dataset.manifest.get("sources", ())
        if source["first_document"] <= document < source["first_document"] + source["documents"]
    ]
    return str(found[0]["path"]) if found else None


def _by_document(dataset: IndexedDataset, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Tokens first..last-1 cut at the borders of documents: number of the document, first and end of its span."""
    starts = dataset.document_starts
    while first < last:
        document = int(np.searchsorted(starts, first, side="right")) - 1
        end = min(last, int(starts[document + 1]))
        yield document, first, end
        first = end


def _decoded(ids: npt.NDArray[np.integer[Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"tokens": len(ids), "ids": ids.tolist(), "text": tokenizer.decode(ids.tolist())}
