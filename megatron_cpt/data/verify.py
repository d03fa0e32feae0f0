"""Proving a dataset, and finding where one of its documents came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data.blocks import open_blocks
from megatron_cpt.data.encoder import open_encoder
from megatron_cpt.data.indexed import IndexedDataset, dtype_for
from megatron_cpt.data.ordered import Progress
from megatron_cpt.data.packing import packed_lengths, verify_pack
from megatron_cpt.errors import DataError, VerificationError
from megatron_cpt.tokenizer import load_tokenizer

_TOKENS_AT_ONCE = 1 << 22


def verify_dataset(prefix: str | Path, inputs: bool = False, on_progress: Progress | None = None) -> dict[str, Any]:
    """Prove that a dataset is what its manifest says: hashes, counts, every token id, bos and eos of every document.

    So are the packs beside it (`packing.verify_pack`).

    Args:
        prefix: path of the dataset without an ending.
        inputs: also hash the corpus files and the tokenizer that the manifest names, where they were.
        on_progress: called with (tokens checked, tokens in all).

    Returns:
        `prefix`, `documents`, `tokens`, `largest_id`, `distinct_ids`, the hashes of the files,
        `packs_checked`, the sequence lengths of its packs, and `inputs_checked`, how many inputs were hashed.

    Raises:
        DataError: the files do not fit each other in size or form, or an input is missing.
        VerificationError: they do, and their content is not what was written or read.
    """
    dataset = IndexedDataset(prefix)
    hashes = {}
    for ending, expected in dataset.manifest["outputs"].items():
        path = Path(f"{prefix}.{ending}")
        if not path.is_file():
            raise DataError(f"{path} is missing; build the dataset again")
        hashes[ending] = sha256_file(path)
        if hashes[ending] != expected["sha256"]:
            raise VerificationError(f"{path} was changed after it was built (its SHA-256 differs); build it again")
    seen = np.zeros(dataset.vocab_size, bool)
    for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, dataset.num_tokens)
        seen[dataset.tokens(start, stop)[0]] = True
        if on_progress is not None:
            on_progress(stop, dataset.num_tokens)
    _check_borders(dataset)
    _check_counts(dataset)
    used = np.flatnonzero(seen)
    packed = packed_lengths(prefix)
    for seq_length in packed:
        verify_pack(dataset, seq_length)
    return {
        "prefix": str(prefix),
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "largest_id": int(used[-1]),
        "distinct_ids": len(used),
        **{f"{ending}_sha256": value for ending, value in hashes.items()},
        "packs_checked": packed,
        "inputs_checked": _check_inputs(dataset) if inputs else 0,
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


def _check_counts(dataset: IndexedDataset) -> None:
    """The manifest's counts of tokens and documents, by input where it was built from files."""
    manifest, starts = dataset.manifest, dataset.document_starts
    longest = int(np.diff(starts).max())
    if manifest.get("longest_document", longest) != longest:
        raise VerificationError(
            f"{dataset.prefix}: the longest document has {longest} tokens, the manifest says "
            f"{manifest['longest_document']}; build the dataset again"
        )
    for source in manifest.get("sources", ()):
        first = source["first_document"]
        last = first + source["documents"]
        tokens = int(starts[last] - starts[first]) if 0 <= first <= last < len(starts) else -1
        if tokens != source["tokens"]:
            raise VerificationError(
                f"{dataset.prefix}: the documents of {source['path']} do not have the {source['tokens']} tokens "
                "that the manifest counts; build the dataset again"
            )


def _check_inputs(dataset: IndexedDataset) -> int:
    manifest = dataset.manifest
    named = [(source["path"], source["sha256"]) for source in manifest.get("sources", ())]
    named.append((manifest["tokenizer"], manifest["tokenizer_sha256"]))
    for path, expected in named:
        _check_input(dataset, path, expected)
    return len(named)


def _check_input(dataset: IndexedDataset, path: str, sha256: str, size: int | None = None) -> None:
    """Refuse a file that is not the one the dataset was built from; the size, where known, spares the hashing."""
    if not Path(path).is_file():
        raise DataError(f"{path}, from which {dataset.prefix} was built, is missing; bring it back")
    found = Path(path).stat().st_size
    what = "its SHA-256 differs"
    if size is not None and found != size:
        what = f"it has {found:,} bytes and had {size:,}"
    elif sha256_file(Path(path)) == sha256:
        return
    raise VerificationError(
        f"{path} is not the file from which {dataset.prefix} was built: {what}; bring it back, or build it again"
    )


def trace_document(dataset: IndexedDataset, number: int) -> dict[str, Any]:
    """The file and line that a document was read from, found by reading the file again.

    The file is hashed first, and the tokens of the text that is found are compared with the document's.

    Args:
        dataset: built from files.
        number: the document.

    Returns:
        `path`, `line` (row of a parquet file), and `id`, as the corpus gives it.

    Raises:
        DataError: no such document, a dataset that was not built from files, or a file that is missing.
        VerificationError: the file or the tokenizer is no longer the one of the build, or the text there gives
            other tokens.
    """
    stored = dataset.document(number)
    manifest = dataset.manifest
    sources = [s for s in manifest.get("sources", ()) if s["first_document"] <= number and s["documents"]]
    if not sources:
        raise DataError(f"{dataset.prefix} does not say which files it was built from; the document has no line")
    source = sources[-1]
    _check_input(dataset, manifest["tokenizer"], manifest["tokenizer_sha256"])
    _check_input(dataset, source["path"], source["sha256"], source["bytes"])
    left, held_out = number - source["first_document"], manifest.get("held_out")
    loaded = load_tokenizer(manifest["tokenizer"])
    encoder = open_encoder(loaded, manifest["append_bos"], manifest["append_eos"], dtype_for(loaded.vocab_size))
    with open_blocks(source["path"], manifest["text_field"]) as reader:
        while (raw := reader.read()) is not None:
            block = raw.parse()
            if held_out is not None:
                block = block.select(block.held_out(held_out[0]) == (held_out[1] == "held_out"))
            encoded = encoder.encode(block)
            full = np.flatnonzero(encoded.lengths)  # texts without a token are not in the dataset
            if left < len(full):
                found, line = full[left], int(block.lines[full[left]])
                end = int(encoded.lengths[: found + 1].sum(dtype=np.int64))
                if not np.array_equal(encoded.tokens[end - encoded.lengths[found] : end], stored):
                    raise VerificationError(
                        f"{source['path']}:{line} gives other tokens than document {number} of {dataset.prefix} "
                        "holds; verify the dataset, or build it again"
                    )
                return {"path": source["path"], "line": line, "id": block.ids()[found]}
            left -= len(full)
    raise VerificationError(
        f"{source['path']} holds fewer documents than {dataset.prefix} has of it; build the dataset again"
    )
