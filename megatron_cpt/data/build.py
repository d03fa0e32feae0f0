"""Documents to an indexed dataset: [bos] + the text's tokens + [eos], one sequence a document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data.documents import Document
from megatron_cpt.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path, manifest_path
from megatron_cpt.errors import DataError, VerificationError
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[int, int], None]
_BATCH_CHARACTERS = 1 << 20  # texts encoded in one call; bounds the memory, does not change the result
_TOKENS_AT_ONCE = 1 << 22


def build_dataset(
    documents: Iterable[Document],
    tokenizer_path: str | Path,
    prefix: str | Path,
    language: str,
    num_threads: int = 1,
    append_bos: bool = True,
    append_eos: bool = True,
    inputs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `<prefix>.bin`, `.idx` and `.manifest.json` from documents, in their order.

    The result does not depend on `num_threads`. Documents with an empty text are left out and counted.

    Args:
        documents: the texts; a generator is read once and never held.
        tokenizer_path: folder or model file, as `load_tokenizer` takes it.
        prefix: where to write, without an ending.
        language: short name of the language, kept in the manifest.
        num_threads: threads of the tokenizer.
        append_bos: begin each document with the tokenizer's bos (as Llama was trained).
        append_eos: end each document with its eos.
        inputs: name -> SHA-256 of the files the documents came from, for the manifest.
        overwrite: replace a dataset that is already there.
        on_progress: called with (documents done, documents in all or 0 when unknown).

    Returns:
        The manifest: `documents`, `empty_documents`, `tokens`, `text_bytes` (UTF-8), `bytes_per_token`
        (text_bytes / tokens, bos and eos counted), `vocab_size`, `tokenizer_sha256`, `append_bos`,
        `append_eos`, `language`, `outputs` (bytes and SHA-256 of each file).

    Raises:
        DataError: nothing to write, a dataset is there already, or the tokenizer lacks bos or eos.
    """
    if not overwrite:
        check_no_dataset(prefix)
    tokenizer = load_tokenizer(tokenizer_path)
    head = _border_ids(tokenizer.bos_id, append_bos, "bos", tokenizer)
    tail = _border_ids(tokenizer.eos_id, append_eos, "eos", tokenizer)
    total = len(documents) if isinstance(documents, Sized) else 0
    digest, text_bytes, empty, done = hashlib.sha256(), 0, 0, 0
    with IndexedDatasetWriter(prefix, tokenizer.vocab_size) as writer:
        for texts in _batches(documents):
            full = [text for text in texts if text]
            for text, ids in zip(full, tokenizer.encode_batch(full, num_threads), strict=True):
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
                text_bytes += len(encoded)
                writer.add(head + ids + tail)
            empty += len(texts) - len(full)
            done += len(texts)
            if on_progress is not None:
                on_progress(done, total)
        return writer.finish(
            {**(inputs or {}), "text": digest.hexdigest(), "tokenizer": tokenizer.sha256},
            empty_documents=empty,
            text_bytes=text_bytes,
            bytes_per_token=text_bytes / max(1, writer.num_tokens),
            language=language,
            tokenizer=str(Path(tokenizer_path).resolve()),
            tokenizer_sha256=tokenizer.sha256,
            append_bos=append_bos,
            append_eos=append_eos,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        )


def check_no_dataset(prefix: str | Path) -> None:
    """Raise DataError when there is a dataset at `prefix` already."""
    if manifest_path(prefix).exists():
        raise DataError(f"{prefix} already holds a dataset; choose another prefix or ask to overwrite it")


def _border_ids(token: int | None, wanted: bool, name: str, tokenizer: Tokenizer) -> list[int]:
    if not wanted:
        return []
    if token is None:
        raise DataError(
            f"tokenizer {tokenizer.path} has no {name} piece; build without {name} or use another tokenizer"
        )
    return [token]


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text) + 1
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def verify_dataset(prefix: str | Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Prove that a dataset is what its manifest says: hashes, every token id, bos and eos of every document.

    Args:
        prefix: path of the dataset without an ending.
        on_progress: called with (tokens checked, tokens in all).

    Returns:
        `prefix`, `documents`, `tokens`, `largest_id`, `distinct_ids` and the two hashes.

    Raises:
        DataError: the files do not fit each other in size or form.
        VerificationError: they do, and their content is not what was written.
    """
    dataset = IndexedDataset(prefix)
    hashes = {}
    for ending, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        hashes[ending] = sha256_file(path)
        if hashes[ending] != dataset.manifest["outputs"][ending]["sha256"]:
            raise VerificationError(f"{path} was changed after it was built (its SHA-256 differs); build it again")
    seen = np.zeros(dataset.vocab_size, bool)
    for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, dataset.num_tokens)
        seen[dataset.tokens(start, stop)[0]] = True
        if on_progress is not None:
            on_progress(stop, dataset.num_tokens)
    _check_borders(dataset)
    used = np.flatnonzero(seen)
    return {
        "prefix": str(prefix),
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "largest_id": int(used[-1]),
        "distinct_ids": len(used),
        **{f"{ending}_sha256": value for ending, value in hashes.items()},
    }


def _check_borders(dataset: IndexedDataset) -> None:
    starts = dataset.document_starts
    for name, positions in (("bos", starts[:-1]), ("eos", starts[1:] - 1)):
        if not dataset.manifest[f"append_{name}"]:
            continue
        expected = dataset.manifest[f"{name}_id"]
        wrong = np.flatnonzero(dataset.stream[positions] != expected)
        if len(wrong):
            raise VerificationError(f"document {wrong[0]} of {dataset.prefix} lacks its {name} ({expected})")
