"""Corpus files to an indexed dataset: [bos] + the text's tokens + [eos], one sequence a document.

    files --blocks--> parse, encode (any thread) --in order--> parts/NNNNN.* --assembled--> prefix.bin, .idx, manifest

The parts and their journal stand in `<prefix>.parts/` until the dataset is there. The same command after a
kill goes on from the journal; shards of one job on several machines fill the same folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.data import _native
from megatron_cpt.data.assembly import assemble
from megatron_cpt.data.blocks import open_blocks
from megatron_cpt.data.counting import Counts, manifest_counts
from megatron_cpt.data.documents import Document
from megatron_cpt.data.encoder import Encoder, check_block, open_encoder
from megatron_cpt.data.indexed import dtype_for
from megatron_cpt.data.machines import open_machines
from megatron_cpt.data.ordered import Progress, run_parts
from megatron_cpt.data.parts import Notice, Parts, check_shard
from megatron_cpt.data.tokens import TokenWork
from megatron_cpt.data.writing import IndexedDatasetWriter, check_no_dataset
from megatron_cpt.errors import DataError, InputError
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

SIDES = ("train", "held_out")
_BATCH_CHARACTERS = 1 << 20  # texts encoded in one call; bounds the memory, does not change the result
_SPACE_EVERY_BYTES = 64 << 20


@dataclass(frozen=True)
class DatasetBuild:
    """One dataset to build from files; a plain value that another process can take and work on.

    `parts()` names the work, `work(numbers)` does some of it wherever it is called, `assemble()` makes the
    dataset of the finished parts.

    Args:
        files: the corpus, in order; jsonl, txt or parquet, plain, gzip or zstd.
        tokenizer: folder or model file, as `load_tokenizer` takes it.
        prefix: where to write, without an ending.
        language: short name of the language, kept in the manifest.
        held_out: (share of the works, "train" or "held_out"): which side of the split is written. None: all.
        append_bos: begin each document with the tokenizer's bos (as Llama was trained).
        append_eos: end each document with its eos.
        text_field: field or column that holds the text.
        on_error: "stop" at a broken record, or "skip" it: counted, and logged in `<prefix>.faults.txt`.
    """

    files: tuple[Path, ...]
    tokenizer: Path
    prefix: Path
    language: str
    held_out: tuple[float, str] | None = None
    append_bos: bool = True
    append_eos: bool = True
    text_field: str = "text"
    on_error: str = "stop"

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "skip"):
            raise InputError(f"on_error={self.on_error!r}: expected 'stop' or 'skip'")
        if self.held_out is not None and self.held_out[1] not in SIDES:
            raise InputError(f"held_out side {self.held_out[1]!r}: expected one of {', '.join(SIDES)}")

    @cached_property
    def _loaded(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @cached_property
    def _encoder(self) -> Encoder:
        return open_encoder(self._loaded, self.append_bos, self.append_eos, dtype_for(self._loaded.vocab_size))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def parts(self) -> Parts:
        """The job's parts and their journal, in `<prefix>.parts`; part k is the k-th file."""
        options = {
            "megatron_cpt": __version__,
            "tokenizer_sha256": self._loaded.sha256,
            "language": self.language,
            "text_field": self.text_field,
            "append_bos": self.append_bos,
            "append_eos": self.append_eos,
            "held_out": list(self.held_out) if self.held_out else None,
        }
        return Parts(Path(f"{self.prefix}.parts"), "dataset", options, self.files)

    def check_tokenizer(self) -> None:
        """Raise DataError where the tokenizer lacks the bos or eos that is asked for."""
        _check_borders(self._loaded, self.append_bos, self.append_eos)

    def work(
        self,
        numbers: Sequence[int],
        workers: int = 1,
        on_progress: Progress | None = None,
        notice: Notice | None = None,
    ) -> None:
        """Encode the parts `numbers` with `workers` threads, each from where its journal says.

        Raises:
            DataError: a broken file or record, no room on the disk, or not the job that was claimed.
            VerificationError: the encoder and the reference library differ on a document.
        """
        parts = self.parts()
        if not parts.is_begun():
            raise DataError(
                f"{parts.folder}, as host {os.uname().nodename} sees it, is of a build with another tokenizer or other "
                "files; let all hosts see the same files at the same place"
            )
        loaded, encoder = self._loaded, self._encoder
        run_parts(
            parts,
            numbers,
            lambda path, start: open_blocks(path, self.text_field, start),
            lambda part: TokenWork(part, encoder, loaded, self.held_out, self.on_error),
            workers,
            _with_space_check(parts, numbers, on_progress),
            notice,
        )

    def assemble(self) -> dict[str, Any]:
        """Make the dataset of the finished parts, remove their folder, and return the manifest.

        Raises:
            DataError: no document in any part; or faults, where `on_error` is "stop".
        """
        parts = self.parts()
        loaded, encoder = self._loaded, self._encoder
        fields = {
            "encoder": {"name": encoder.name, "reason": encoder.reason},
            "held_out": list(self.held_out) if self.held_out else None,
            "text_field": self.text_field,
            **_tokenizer_fields(loaded, self.language, self.append_bos, self.append_eos),
        }
        manifest = assemble(parts, self.prefix, loaded.vocab_size, self.on_error, {"tokenizer": loaded.sha256}, fields)
        parts.remove()
        return manifest


def build_files(
    files: Iterable[str | Path],
    tokenizer: str | Path,
    prefix: str | Path,
    language: str,
    workers: int | None = 1,
    held_out: tuple[float, str] | None = None,
    append_bos: bool = True,
    append_eos: bool = True,
    text_field: str = "text",
    on_error: str = "stop",
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    ray: str | None = None,
    on_progress: Progress | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Write `<prefix>.bin`, `.idx` and `.manifest.json` from corpus files, in their order.

    The result depends neither on `workers` nor on how often the command was stopped and repeated. Documents
    with an empty text are left out and counted. The arguments that are not here are those of `DatasetBuild`.

    Args:
        files: see `DatasetBuild`, as the others.
        tokenizer: likewise.
        prefix: likewise.
        language: likewise.
        workers: threads, see `open_machines`; each needs a few MB, and one record of 32 MiB is
            held at a time. Where a library encodes (`encoder`), its lists of ids come on top.
        held_out: likewise.
        append_bos: likewise.
        append_eos: likewise.
        text_field: likewise.
        on_error: likewise.
        shard: (i, n), i from 0: work on every n-th file only and leave the rest, and the dataset, to others.
        overwrite: replace a dataset that is already there, and drop what another job has left unfinished.
        ray: address of a Ray cluster whose hosts encode the files, as `open_cluster` takes it; None: this process.
        on_progress: called with (bytes done, bytes in all) of the files as they are on disk.
        notice: is told when work that was done is done again.

    Returns:
        The manifest (see docs/formats/indexed_dataset.md); with `shard`: `shard` and the `files` it has done.

    Raises:
        DataError: nothing to write, a dataset is there already, a broken file, or no room on the disk.
        VerificationError: the encoder and the reference library differ on a document.
        ConfigError: no cluster at `ray`, or one that cannot do this.
    """
    paths = tuple(Path(path) for path in files)
    build = DatasetBuild(
        paths, Path(tokenizer), Path(prefix), language, held_out, append_bos, append_eos, text_field, on_error
    )
    if shard is not None:
        check_shard(shard)
    parts = build.parts()
    parts.sweep()
    if not overwrite and not parts.is_begun():
        check_no_dataset(prefix)
    build.check_tokenizer()
    with open_machines(ray, workers) as machines:

        def work(numbers: Sequence[int]) -> None:
            machines.run_parts(parts, build.work, numbers, [build.tokenizer], on_progress, notice)

        parts.claim(replace=overwrite)
        if shard is not None:
            work(parts.pending(shard))
            return {"shard": f"{shard[0]}/{shard[1]}", "files": [str(path) for path in paths[shard[0] :: shard[1]]]}
        with lock_folder(parts.folder, ".building"):
            try:
                work(parts.pending())
                return build.assemble()
            except BaseException:
                parts.discard_untouched()
                raise


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
    if not overwrite:
        check_no_dataset(prefix)
    loaded = load_tokenizer(tokenizer_path)
    _check_borders(loaded, append_bos, append_eos)
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
            **_tokenizer_fields(loaded, language, append_bos, append_eos),
        )


def _tokenizer_fields(loaded: Tokenizer, language: str, append_bos: bool, append_eos: bool) -> dict[str, Any]:
    return {
        "language": language,
        "tokenizer": str(loaded.path.resolve()),
        "tokenizer_sha256": loaded.sha256,
        "append_bos": append_bos,
        "append_eos": append_eos,
        "bos_id": loaded.bos_id,
        "eos_id": loaded.eos_id,
    }


def _check_borders(loaded: Tokenizer, append_bos: bool, append_eos: bool) -> None:
    for name, token, wanted in (("bos", loaded.bos_id, append_bos), ("eos", loaded.eos_id, append_eos)):
        if wanted and token is None:
            raise DataError(
                f"tokenizer {loaded.path} has no {name} piece; build without {name} or use another tokenizer"
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


def _with_space_check(parts: Parts, numbers: Sequence[int], on_progress: Progress | None) -> Progress:
    """A progress function that refuses early what the disk will not hold, by the ratio found in `numbers` so far."""
    asked = -_SPACE_EVERY_BYTES
    mine = {f"{number:05d}" for number in numbers}

    def check(done: int, total: int) -> None:
        nonlocal asked
        if done - asked >= _SPACE_EVERY_BYTES and done:
            data = [path for path in parts.folder.iterdir() if ".json" not in path.name]  # journals come and go
            sizes = [(path.stem in mine, path.stat().st_size) for path in data]
            held = sum(size for is_mine, size in sizes if is_mine)
            asked = done if held else asked  # nothing has left the buffers yet
            needed = int(held / done * total) - held
            if len(parts.inputs) > 1:  # the assembled copy of all parts
                needed += sum(size for _, size in sizes) + needed
            disk = os.statvfs(parts.folder)
            free = disk.f_bavail * disk.f_frsize
            if needed > free:
                raise DataError(
                    f"{parts.folder}: about {needed / 1e9:.1f} GB more are needed there, {free / 1e9:.1f} GB are free; "
                    "free some space or write elsewhere, then run the command again: it goes on from here"
                )
        if on_progress is not None:
            on_progress(done, total)

    return check
