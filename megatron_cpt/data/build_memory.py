"""Documents in memory to an indexed dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from megatron_cpt.data import _native
from megatron_cpt.data.build import check_borders, check_prefix, tokenizer_fields
from megatron_cpt.data.counting import Counts, manifest_counts
from megatron_cpt.data.documents import Document
from megatron_cpt.data.encoder import check_block, open_encoder
from megatron_cpt.data.indexed import dtype_for
from megatron_cpt.data.ordered import Progress
from megatron_cpt.data.writing import IndexedDatasetWriter, check_no_dataset
from megatron_cpt.tokenizer import load_tokenizer

_BATCH_CHARACTERS = 1 << 20  # texts encoded in one call; bounds the memory, does not change the result


def build_dataset(
    documents: Iterable[Document],
    tokenizer_path: str | Path,
    prefix: str | Path,
    language: str,
    append_bos: bool = True,
    append_eos: bool = True,
    inputs: Mapping[str, str] | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a dataset from documents in memory, in their order; what `build_files` does for files.

    Args:
        documents: the texts; a generator is read once and never held.
        tokenizer_path: folder or model file, as `load_tokenizer` takes it.
        prefix: where to write, without an ending.
        language: short name of the language, kept in the manifest.
        append_bos: begin each document with the tokenizer's bos (as Llama was trained).
        append_eos: end each document with its eos.
        inputs: name -> SHA-256 of what the documents were made from, for the manifest.
        overwrite: replace a dataset that is already there.
        on_progress: called with (documents done, documents in all or 0 when unknown).

    Returns:
        The manifest.

    Raises:
        DataError: nothing to write, a dataset is there already, or the tokenizer lacks bos or eos.
        VerificationError: the encoder and the reference library differ on a document.
    """
    check_prefix(prefix)
    if not overwrite:
        check_no_dataset(prefix)
    loaded = load_tokenizer(tokenizer_path)
    check_borders(loaded, append_bos, append_eos)
    encoder = open_encoder(loaded, append_bos, append_eos, dtype_for(loaded.vocab_size))
    total = len(documents) if isinstance(documents, Sized) else 0
    digest, counts, done = hashlib.sha256(), Counts(), 0
    with IndexedDatasetWriter(prefix, loaded.vocab_size) as writer:
        for number, texts in enumerate(_batches(documents)):
            for text in texts:
                encoded = text.encode()
                if encoded:
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
            block = _native.Block.from_texts(texts)
            result = encoder.encode(block)
            counts.add(result, block.text_bytes)
            counts.checked_documents += check_block(encoder, loaded, block, "memory", number)
            writer.add_documents(result.tokens, result.lengths[result.lengths > 0])
            done += len(texts)
            if on_progress is not None:
                on_progress(done, total)
        return writer.finish(
            {**(inputs or {}), "text": digest.hexdigest(), "tokenizer": loaded.sha256},
            **{name: value for name, value in manifest_counts(counts).items() if name not in ("documents", "tokens")},
            encoder={"name": encoder.name, "reason": encoder.reason},
            **tokenizer_fields(loaded, language, append_bos, append_eos),
        )


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
