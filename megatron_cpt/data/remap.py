"""A dataset for a changed tokenizer without its texts: every id is replaced by the id that its piece has now.

That is right where the new tokenizer cuts the same texts into the same pieces, as after an extension by pieces of
a script that the texts do not hold. Nobody can know that of a map alone: it is tried on the documents themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.describe import tokenizer_of
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.ordered import Progress
from megatron_cpt.data.writing import IndexedDatasetWriter, check_no_dataset
from megatron_cpt.errors import DataError, TokenizerError
from megatron_cpt.tokenizer import Tokenizer, VocabMap, load_tokenizer

CHECKED_DOCUMENTS = 1000
_TOKENS_AT_ONCE = 1 << 22
_OF_THE_TOKENS = ("documents", "tokens", "vocab_size", "tokenizer", "tokenizer_sha256", "bos_id", "eos_id")
_NOT_CARRIED = {"kind", "megatron_cpt", "inputs", "outputs", "encoder", "checked_documents", *_OF_THE_TOKENS}


def remap_dataset(
    prefix: str | Path,
    tokenizer_folder: str | Path,
    output: str | Path,
    old_tokenizer: str | Path | None = None,
    checked_documents: int = CHECKED_DOCUMENTS,
    seed: int = 1,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a dataset whose ids are those of a new tokenizer.

    Documents drawn from the whole dataset are decoded by the old tokenizer and encoded by the new one; each must
    give the mapped ids, every one of them.

    Args:
        prefix: the dataset, without an ending.
        tokenizer_folder: the new tokenizer with its vocab_map.json.
        output: prefix of the dataset to write.
        old_tokenizer: where the dataset's tokenizer is; None: where it was when the dataset was built.
        checked_documents: how many documents are tried; all where there are fewer.
        seed: of the draw.
        on_progress: called with (tokens done, tokens in all).

    Returns:
        The manifest; `remapped` in it says what was tried: `checked_documents`, of which `exact_text` decode to a
        text that the old tokenizer cuts into the stored ids (others, such as those with broken UTF-8, prove nothing),
        and `same_cut`, those that the new one cuts into the mapped ids.

    Raises:
        DataError: an id in use is no kept piece, documents are cut in another way by the new tokenizer, nothing
            could be tried, or a dataset is at `output` already.
        TokenizerError: the map is not from the dataset's tokenizer to this one.
    """
    check_no_dataset(output)
    dataset, new = IndexedDataset(prefix), load_tokenizer(tokenizer_folder)
    old = tokenizer_of(dataset, old_tokenizer)
    new_ids = _new_ids(VocabMap.load(tokenizer_folder), old, new)
    _check_used(dataset, old, new, new_ids)
    proof = _try(dataset, old, new, new_ids, checked_documents, seed)
    manifest = dataset.manifest
    with IndexedDatasetWriter(output, new.vocab_size) as writer:
        for tokens, lengths in _blocks(dataset):
            writer.add_documents(new_ids[tokens], lengths)
            if on_progress is not None:
                on_progress(writer.num_tokens, dataset.num_tokens)
        return writer.finish(
            {"dataset": dataset.content_hash, "old_tokenizer": old.sha256, "tokenizer": new.sha256},
            **{name: value for name, value in manifest.items() if name not in _NOT_CARRIED},
            tokenizer=os.path.abspath(new.path),
            tokenizer_sha256=new.sha256,
            bos_id=new.bos_id,
            eos_id=new.eos_id,
            remapped=proof,
        )


def _new_ids(vocab_map: VocabMap, old: Tokenizer, new: Tokenizer) -> npt.NDArray[np.int64]:
    """Old id -> new id, -1 where the piece is no longer there."""
    if (vocab_map.old_sha256, vocab_map.new_sha256) != (old.sha256, new.sha256):
        raise TokenizerError(
            f"the vocab_map.json beside {new.path} leads from {vocab_map.old_sha256[:12]} to "
            f"{vocab_map.new_sha256[:12]}, the dataset's tokenizer is {old.sha256[:12]} and the new one "
            f"{new.sha256[:12]}: give the tokenizer that was made from the dataset's"
        )
    new_ids = np.full(old.vocab_size, -1, np.int64)
    for id in range(vocab_map.new_size - 1, -1, -1):
        entry = vocab_map.entries[id]
        if entry.origin != "new" and entry.old_id is not None:
            new_ids[entry.old_id] = id
    return new_ids


def _check_used(dataset: IndexedDataset, old: Tokenizer, new: Tokenizer, new_ids: npt.NDArray[np.int64]) -> None:
    for name, here, there in (("bos", old.bos_id, new.bos_id), ("eos", old.eos_id, new.eos_id)):
        if dataset.manifest[f"append_{name}"] and (here is None or new_ids[here] != there):
            raise DataError(
                f"the {name} that {dataset.prefix} holds is not the new tokenizer's ({there}): build the dataset again"
            )
    used = np.zeros(old.vocab_size, np.int64)
    for tokens, _ in _blocks(dataset):
        used += np.bincount(tokens, minlength=old.vocab_size)
    lost = np.flatnonzero((used > 0) & (new_ids < 0))
    if len(lost):
        first = int(lost[np.argmax(used[lost])])
        raise DataError(
            f"{dataset.prefix} uses {len(lost)} pieces that the new tokenizer lacks ({used[lost].sum():,} of "
            f"{dataset.num_tokens:,} tokens; most often {old.piece(first)!r}, id {first}): build the dataset "
            "again with `data build --tokenizer`"
        )


def _try(
    dataset: IndexedDataset,
    old: Tokenizer,
    new: Tokenizer,
    new_ids: npt.NDArray[np.int64],
    wanted: int,
    seed: int,
) -> dict[str, Any]:
    """Decode documents, encode them again, and compare."""
    count = min(wanted, dataset.num_documents)
    drawn = np.sort(np.random.default_rng(seed).choice(dataset.num_documents, count, replace=False)).tolist()
    bare = [_bare(dataset, number) for number in drawn]
    texts = [old.decode(ids.tolist()) for ids in bare]
    exact = [
        number for number, (text, ids) in enumerate(zip(texts, bare, strict=True)) if old.encode(text) == ids.tolist()
    ]
    again = new.encode_batch([texts[number] for number in exact])
    other = [
        number
        for number, ids in zip(exact, again, strict=True)
        if ids != new_ids[np.asarray(bare[number], np.int64)].tolist()
    ]
    if not exact:
        raise DataError(
            f"none of {count} documents of {dataset.prefix} decodes to a text that gives its ids again, so nothing can "
            "be shown of its cuts: build the dataset again with `data build --tokenizer`"
        )
    if other:
        raise DataError(
            f"the new tokenizer cuts {len(other)} of {len(exact)} documents of {dataset.prefix} "
            f"({len(other) / len(exact):.1%}) in another way, the first is document {drawn[other[0]]}: build the "
            "dataset again with `data build --tokenizer`"
        )
    return {"checked_documents": count, "exact_text": len(exact), "same_cut": len(exact), "seed": seed}


def _bare(dataset: IndexedDataset, number: int) -> npt.NDArray[np.integer[Any]]:
    """The ids of a document's text."""
    ids = dataset.document(number)
    last = len(ids) - bool(dataset.manifest["append_eos"])
    return ids[int(dataset.manifest["append_bos"]) : last]


def _blocks(dataset: IndexedDataset) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
    """Whole documents, some millions of tokens at a time: their ids, and the lengths."""
    starts, first = dataset.document_starts, 0
    while first < dataset.num_documents:
        limit = int(starts[first]) + _TOKENS_AT_ONCE
        last = max(first + 1, int(np.searchsorted(starts, limit, side="right")) - 1)
        tokens, _ = dataset.tokens(int(starts[first]), int(starts[last]))
        yield tokens, np.diff(starts[first : last + 1]).astype(np.int32)
        first = last
