"""Corpus files to an indexed dataset: [bos] + the text's tokens + [eos], one sequence a document.

    files --blocks--> parse, encode (any thread) --in order--> parts/NNNNN.* --assembled--> prefix.bin, .idx, manifest

The parts and their journal stand in `<prefix>.parts/` until the dataset is there. The same command after a
kill goes on from the journal; shards of one job on several machines fill the same folder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.config.manifest import read_manifest, sha256_file
from megatron_cpt.data.assembly import NoDocumentsError, assemble
from megatron_cpt.data.blocks import open_blocks
from megatron_cpt.data.encoder import Encoder, open_encoder
from megatron_cpt.data.indexed import dtype_for, manifest_path
from megatron_cpt.data.machines import Machines, open_machines, threads_here
from megatron_cpt.data.ordered import Progress, run_parts
from megatron_cpt.data.parts import Notice, Parts, check_shard, differences
from megatron_cpt.data.tokens import TokenWork
from megatron_cpt.errors import DataError, InputError
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

SIDES = ("train", "held_out")
_SPACE_EVERY_BYTES = 64 << 20
_OWN_ENDINGS = (".bin", ".idx", ".manifest.json", ".faults.txt")
_ENDINGS = (*_OWN_ENDINGS, ".jsonl", ".ndjson", ".json", ".txt", ".parquet", ".gz", ".zst")


@dataclass(frozen=True)
class DatasetBuild:
    """One dataset to build from files; a plain value that another process can take and work on.

    `parts()` names the work, `work(numbers)` does some of it wherever it is called, `assemble()` makes the
    dataset of the finished parts.

    Args:
        files: the corpus, in order; jsonl, txt or parquet, plain, gzip or zstd.
        tokenizer: folder or model file, as `load_tokenizer` takes it.
        prefix: path of the dataset's files without their endings: "sets/web" for `sets/web.bin`.
        language: short name of the language, kept in the manifest.
        held_out: (share of the works, "train" or "held_out"): which side of the split is written. None: all.
        append_bos: begin each document with the tokenizer's bos (as Llama was trained).
        append_eos: end each document with its eos.
        text_field: field or column that holds the text.
        on_error: "stop" at a broken record, or "skip" it: counted, and logged in `<prefix>.faults.txt`.

    Raises:
        InputError: a value that cannot be, such as a folder as prefix.
    """

    files: Iterable[str | Path]
    tokenizer: str | Path
    prefix: str | Path
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
        object.__setattr__(self, "files", tuple(Path(file) for file in self.files))
        check_prefix(self.prefix, self.paths)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(Path(file) for file in self.files)

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
        return Parts(Path(f"{self.prefix}.parts"), "dataset", options, self.paths)

    def check_tokenizer(self) -> None:
        """Raise DataError where the tokenizer lacks the bos or eos that is asked for."""
        check_borders(self._loaded, self.append_bos, self.append_eos)

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

    def assemble(self, workers: int = 1, on_joining: Progress | None = None) -> dict[str, Any]:
        """Make the dataset of the finished parts, which stay as they are, and return the manifest.

        Args:
            workers: threads.
            on_joining: called with (bytes of tokens copied, bytes in all) where the tokens of several parts are.

        Raises:
            DataError: no document in any part; or faults, where `on_error` is "stop".
        """
        parts = self.parts()
        loaded, encoder = self._loaded, self._encoder
        fields = {
            "encoder": {"name": encoder.name, "reason": encoder.reason},
            "held_out": list(self.held_out) if self.held_out else None,
            "text_field": self.text_field,
            **tokenizer_fields(loaded, self.language, self.append_bos, self.append_eos),
        }
        inputs = {"tokenizer": loaded.sha256}
        return assemble(parts, Path(self.prefix), loaded.vocab_size, self.on_error, inputs, fields, workers, on_joining)

    def is_made(self, shard: tuple[int, int] | None = None, may_differ: bool = False) -> bool:
        """Whether this very dataset is there: of these options, this tokenizer, and files of the same content.

        Args:
            shard: (i, n): of the files read only every n-th, from the i-th on; of the others the size is compared.
            may_differ: False for another dataset, too.

        Raises:
            DataError: another dataset is there, with what differs.
        """
        if not manifest_path(self.prefix).exists():
            return False
        manifest = read_manifest(manifest_path(self.prefix), "shards", DataError)
        found = self._differences(manifest) or self._changed(manifest, shard or (0, 1))
        if found and not may_differ:
            raise DataError(
                f"{self.prefix} already holds a dataset that differs ({'; '.join(found)}); "
                "choose another prefix or ask to overwrite it"
            )
        return not found

    def _differences(self, manifest: Mapping[str, Any]) -> list[str]:
        """What differs from a finished dataset, as far as no file has to be read for it."""
        options = self.parts().options
        found = differences({name: manifest.get(name) for name in options}, options)
        left_out = sum(manifest.get("faults", {}).values())
        if left_out and self.on_error == "stop":
            found.append(f"it leaves out {left_out} broken records, now they are to stop the build")
        before, now = [source["path"] for source in manifest.get("sources", [])], list(map(os.path.abspath, self.paths))
        if before != now:
            found.append(f"it is of {len(before)} files, now {len(now)} or others")
        for ending, output in manifest["outputs"].items():
            path = Path(f"{self.prefix}.{ending}")
            if not path.is_file() or path.stat().st_size != output["bytes"]:
                found.append(f"{path} is missing or of another size than its manifest says")
        return found

    def _changed(self, manifest: Mapping[str, Any], shard: tuple[int, int]) -> list[str]:
        """Files of another content than those of a finished dataset."""
        sources = list(zip(self.paths, manifest["sources"], strict=True))
        changed = [path for path, source in sources if path.stat().st_size != source["bytes"]] or [
            path for path, source in sources[shard[0] :: shard[1]] if sha256_file(path) != source["sha256"]
        ]
        return [f"{path} has changed" for path in changed]


def build_files(
    build: DatasetBuild,
    workers: int | None = 1,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    ray: str | None = None,
    on_progress: Progress | None = None,
    notice: Notice | None = None,
    on_joining: Progress | None = None,
) -> dict[str, Any]:
    """Write `<prefix>.bin`, `.idx` and `.manifest.json` from corpus files, in their order.

    The result depends neither on `workers` nor on how often the command was stopped and repeated; where it is
    there already, nothing is done. Documents with an empty text are left out and counted.

    Args:
        build: the dataset.
        workers: threads, see `open_machines`.
        shard: (i, n), i from 0: work on every n-th file only and leave the rest, and the dataset, to others.
        overwrite: replace a dataset that is already there, and drop what another job has left unfinished.
        ray: address of a Ray cluster whose hosts encode the files, as `open_cluster` takes it; None: this process.
        on_progress: called with (bytes done, bytes in all) of the files as they are on disk.
        notice: is told when work that was done is done again, and when all of it had been done before.
        on_joining: called after all that with (bytes done, bytes in all) of the tokens, where those of several files
            are put together.

    Returns:
        The manifest (see docs/formats/indexed_dataset.md); with `shard`: `shard` and the `files` it has done.

    Raises:
        DataError: nothing to write, another dataset is there already, a broken file, or no room on the disk.
        VerificationError: the encoder and the reference library differ on a document.
        ConfigError: no cluster at `ray`, or one that cannot do this.
    """
    if shard is not None:
        check_shard(shard)
    parts = build.parts()
    parts.check_inputs()
    begun = parts.is_begun()

    def is_made() -> bool:
        return not overwrite and build.is_made(shard, may_differ=begun)

    made = is_made()
    try:
        if not made:
            build.check_tokenizer()
            with open_machines(ray, workers) as machines, parts.claimed(replace=overwrite):
                made = is_made()  # another process may have ended it just now
                if not made:
                    assemble_here = partial(build.assemble, threads_here(workers), on_joining)
                    _make(build, parts, machines, shard, assemble_here, on_progress, notice)
    except NoDocumentsError:
        parts.remove()
        raise
    if made:
        parts.discard(begun=True)
        if notice is not None:
            notice(f"{build.prefix} is already built of these files with these options; nothing is left to do")
    elif shard is None:
        parts.remove()
    if shard is not None:
        return {"shard": f"{shard[0]}/{shard[1]}", "files": [str(path) for path in build.paths[shard[0] :: shard[1]]]}
    return read_manifest(manifest_path(build.prefix), "shards", DataError)


def _make(
    build: DatasetBuild,
    parts: Parts,
    machines: Machines,
    shard: tuple[int, int] | None,
    assemble_here: Callable[[], object],
    on_progress: Progress | None,
    notice: Notice | None,
) -> None:
    def work(numbers: Sequence[int]) -> None:
        machines.run_parts(parts, build.work, numbers, [Path(build.tokenizer)], on_progress, notice)

    if shard is not None:
        work(parts.pending(shard))
        return
    with lock_folder(parts.folder, ".building"):
        work(parts.pending())
        assemble_here()


def check_prefix(prefix: str | Path, files: Iterable[str | Path] = ()) -> None:
    """Raise InputError for what is no prefix of a dataset, or would write over one of the files it is made of."""
    name = os.path.basename(str(prefix))
    if name in ("", ".", "..") or name.lower().endswith(_ENDINGS):
        raise InputError(
            f"{str(prefix)!r} is no prefix of a dataset: expected the path of its files without their "
            "endings, such as sets/web for sets/web.bin, sets/web.idx and sets/web.manifest.json"
        )
    own = {os.path.realpath(f"{prefix}{ending}") for ending in ("", *_OWN_ENDINGS)}
    taken = next((file for file in files if os.path.realpath(file) in own), None)
    if taken is not None:
        raise InputError(f"the dataset {prefix} would write over its input {taken}; choose another prefix")


def tokenizer_fields(loaded: Tokenizer, language: str, append_bos: bool, append_eos: bool) -> dict[str, Any]:
    """The entries of a manifest that say how documents became tokens."""
    return {
        "language": language,
        "tokenizer": str(loaded.path.resolve()),
        "tokenizer_sha256": loaded.sha256,
        "append_bos": append_bos,
        "append_eos": append_eos,
        "bos_id": loaded.bos_id,
        "eos_id": loaded.eos_id,
    }


def check_borders(loaded: Tokenizer, append_bos: bool, append_eos: bool) -> None:
    """Raise DataError where a tokenizer lacks the bos or eos that is asked for."""
    for name, token, wanted in (("bos", loaded.bos_id, append_bos), ("eos", loaded.eos_id, append_eos)):
        if wanted and token is None:
            raise DataError(
                f"tokenizer {loaded.path} has no {name} piece; build without {name} or use another tokenizer"
            )


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
