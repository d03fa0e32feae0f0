"""Cleaning of corpus files from beginning to end; may be killed and run again at any moment.

The folder `<output>/.work` holds the journal until the end, and is there for one job at a time (`Parts`):
1. in it: each file is read, normalised, measured and judged (`passes.Scan`); files are parts, any shard of
   which another process may do.
2. `verdicts/`: the signatures of what the rules keep are searched for duplicates.
3. `write/`: each file is read again, and what stays is written (`passes.Write`).
4. The written files are moved to `<output>`, then come the report and, last, the manifest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import (
    read_json,
    read_manifest,
    sha256_file,
    sha256_json,
    temporary_path,
    write_json_atomic,
    write_manifest,
)
from megatron_cpt.data.blocks import open_blocks
from megatron_cpt.data.cleaning.duplicates import find_duplicates
from megatron_cpt.data.cleaning.passes import (
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
    Job,
    Scan,
    Verdicts,
    Write,
    digest,
)
from megatron_cpt.data.cleaning.profiles import Profile
from megatron_cpt.data.cleaning.report import make_report, write_report
from megatron_cpt.data.cleaning.rules import KEPT
from megatron_cpt.data.machines import Machines, open_machines
from megatron_cpt.data.ordered import Progress, run_parts
from megatron_cpt.data.parts import Notice, Parts, check_shard, differences
from megatron_cpt.errors import DataError
from megatron_cpt.runtime.lock import lock_folder

KIND = "cleaned corpus"
MANIFEST = "manifest.json"
_WORK = ".work"
_FINISHED = Path("write", "finished")  # in _WORK, once nothing but the manifest is missing: an old one is gone by then
_REPLACED = "replaced.json"  # in _WORK, the manifest of what is being removed
_REPORT = "report.json"
_SAID = ("models", "text_field", "on_error")  # options that the manifest has, beside the profile
_ENDINGS = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".txt", ".parquet")


def clean_files(
    files: Sequence[str | Path],
    output: str | Path,
    profile: Profile,
    workers: int | None = 1,
    shard: tuple[int, int] | None = None,
    text_field: str = "text",
    on_error: str = "stop",
    overwrite: bool = False,
    ray: str | None = None,
    on_progress: Progress | None = None,
    notice: Notice | None = None,
) -> dict[str, Any]:
    """Write `<output>/<name>.jsonl.zst` for each file: its documents that the profile keeps, in their order.

    Records keep all their fields, and their very bytes where no step of the profile changes the text. A file
    of which nothing stays gives none. `report.md` (with plots), `report.json` and `manifest.json` say what
    was done. The result does not depend on `workers`, `shard`, `ray`, or on how often the work was stopped and
    continued.

    Args:
        files: corpus files, of the kinds that `open_blocks` reads; duplicates are dropped in their order.
        output: folder to write; new, empty, or where the same command was stopped.
        profile: what to do, see `load_profile`.
        workers: threads, see `open_machines`.
        shard: (i, n) only measures and judges every n-th file from the i-th on; a call without it does what
            is then missing.
        text_field: field (column) that holds the text.
        on_error: "stop" at a record without a text, or "skip" such records, counted and logged in `faults.log`.
        overwrite: replace a finished cleaning, and drop what another job has left unfinished.
        ray: address of a Ray cluster whose hosts do the work, as `open_cluster` takes it; None: this process.
        on_progress: called with (bytes read, bytes in all) of both walks.
        notice: is told when work that was done is done again, and when all of it had been done before.

    Returns:
        The report; of a shard how many files are judged and how many are not yet.

    Raises:
        DataError: wrong input, a record without a text, or an output folder that is in use.
        ConfigError: no cluster at `ray`, or one that cannot do this.
    """
    if on_error not in ("stop", "skip"):
        raise DataError(f"on_error is {on_error!r}, expected 'stop' or 'skip'")
    inputs, output = tuple(Path(file) for file in files), Path(output)
    if shard is not None:
        check_shard(shard)
    job = Job(profile, text_field, on_error)
    scan = Parts(output / _WORK, "judged corpus", _options(job), inputs)
    scan.check_inputs()
    begun = scan.is_begun()
    _check_output(output, inputs, overwrite)

    def is_made() -> bool:
        return not overwrite and _is_made(output, scan, job, shard or (0, 1), may_differ=begun)

    made = is_made()
    if not made:
        _ = job.scorers  # loaded first: an error leaves nothing behind
        try:
            with open_machines(ray, workers) as machines, scan.claimed(replace=overwrite):
                made = is_made()  # another process may have ended it just now
                if not made:
                    _make(scan, job, output, machines, shard, on_progress, notice)
        except BaseException:
            with suppress(OSError):  # it holds something
                output.rmdir()
            raise
    if made:
        scan.discard(begun=True)
        if notice is not None:
            notice(f"{output} is already cleaned of these files with this profile; nothing is left to do")
    elif shard is None:
        scan.remove()
    if shard is not None:
        left = 0 if made else len(scan.pending())
        return {"judged_files": len(inputs) - left, "files_left": left}
    return read_json(output / _REPORT, DataError)  # type: ignore[no-any-return]


def _make(
    scan: Parts,
    job: Job,
    output: Path,
    machines: Machines,
    shard: tuple[int, int] | None,
    on_progress: Progress | None,
    notice: Notice | None,
) -> None:
    with ExitStack() as held:
        if shard is None:
            held.enter_context(lock_folder(scan.folder, ".cleaning"))
        shared = [Path(model) for model in scan.options["models"]]
        walks = 1 if shard is not None else 2
        advance = None if on_progress is None else lambda done, total: on_progress(done, walks * total)
        machines.run_parts(scan, partial(_scan, scan, job), scan.pending(shard), shared, advance, notice)
        if shard is not None:
            return
        found = _decide(scan, job, output / _WORK / "verdicts", machines)
        write = Parts(output / _WORK / "write", KIND, {**scan.options, "scan": found["scan"]}, scan.inputs)
        write.claim(replace=True)
        advance = None if on_progress is None else lambda done, total: on_progress(total + done, 2 * total)
        machines.run_parts(write, partial(_write, scan, write, job), write.pending(), (), advance, notice)
        _finish(scan, write, job, found, output)


def _is_made(output: Path, scan: Parts, job: Job, shard: tuple[int, int], may_differ: bool) -> bool:
    """Whether this very cleaning is there: of this profile, and files of the same content.

    Args:
        output: the folder.
        scan: the job.
        job: likewise.
        shard: (i, n): only every n-th file is read, from the i-th on.
        may_differ: False for another cleaning, too.

    Raises:
        DataError: another cleaning is there, with what differs.
    """
    if not (output / MANIFEST).exists():
        return False
    manifest = read_manifest(output / MANIFEST, KIND, DataError)
    before = {**dict(_leaves("profile", manifest["profile"])), **{name: manifest[name] for name in _SAID}}
    found = differences(before, scan.options)
    names = [os.path.abspath(path) for path in scan.inputs]
    if manifest["files"] != names:
        found.append(f"it is of {len(manifest['files'])} files, now {len(names)} or others")
    sizes = {name: held["bytes"] for name, held in manifest["outputs"].items()}
    for path in [output / name for name in (*sizes, _REPORT)]:
        if not path.is_file() or path.stat().st_size != sizes.get(path.name, path.stat().st_size):
            found.append(f"{path} is missing or of another size than the manifest says")
    for path in () if found else scan.inputs[shard[0] :: shard[1]]:
        if sha256_file(path) != manifest["inputs"][os.path.abspath(path)]:
            found.append(f"{path} has changed")
    if found and not may_differ:
        raise DataError(
            f"{output} holds a finished cleaning that differs ({'; '.join(found)}); "
            "choose another folder, or ask to overwrite it"
        )
    return not found


def _options(job: Job) -> dict[str, Any]:
    models = {
        value: sha256_file(value)
        for scorer in job.profile.active_scorers.values()
        for value in scorer.options.values()
        if isinstance(value, str) and Path(value).is_file()
    }
    profile = dict(_leaves("profile", job.profile.model_dump(mode="json")))
    return {**profile, "models": models, "text_field": job.text_field, "on_error": job.on_error}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of a tree by their paths, so that a difference is shown as the one value it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, value


def _check_output(output: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    inside = [path for path in inputs if os.path.dirname(os.path.realpath(path)) == os.path.realpath(output)]
    if inside:
        raise DataError(f"{inside[0]} lies in {output}, whose files a cleaning replaces; write to another folder")
    if (output / MANIFEST).exists():
        if overwrite:
            read_manifest(output / MANIFEST, KIND, DataError)
        return
    held = [path.name for path in output.iterdir()] if output.exists() else []
    if _WORK not in held and any(not name.startswith(_WORK) for name in held):
        raise DataError(f"{output} is not empty; choose another folder")


def _scan(
    scan: Parts, job: Job, numbers: Sequence[int], workers: int, on_progress: Progress | None, notice: Notice | None
) -> None:
    run_parts(
        scan,
        numbers,
        lambda path, start: open_blocks(path, job.text_field, start),
        lambda part: Scan(job, job.scorers, part),
        workers,
        on_progress,
        notice,
    )


def _write(
    scan: Parts,
    write: Parts,
    job: Job,
    numbers: Sequence[int],
    workers: int,
    on_progress: Progress | None,
    notice: Notice | None,
) -> None:
    def open_work(part: Any) -> Write:
        judged = scan.read(part.number)
        return Write(
            job,
            part,
            judged.array("documents", "<i8"),
            np.fromfile(_verdicts_path(write.folder.parent / "verdicts", part.number), np.uint8),
        )

    run_parts(
        write,
        numbers,
        lambda path, start: open_blocks(path, job.text_field, start),
        open_work,
        workers,
        on_progress,
        notice,
    )


def _verdicts_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.verdicts"


def _decide(scan: Parts, job: Job, folder: Path, machines: Machines) -> dict[str, Any]:
    """Search for duplicates and write every file's verdicts; `found.json` comes last.

    Returns:
        {"scan": identity of what was judged, "firsts": first survivor of each file, "duplicates": summary | None}
    """
    parts = [scan.read(number) for number in range(len(scan.inputs))]
    for part in parts:
        if not part.is_done():
            raise DataError(f"{part.input} has changed since it was judged; run the command again")
    identity = sha256_json([part.sha256 for part in parts])
    done = folder / "found.json"
    if done.exists() and read_json(done, DataError)["scan"] == identity:
        return read_json(done, DataError)  # type: ignore[no-any-return]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    verdicts = [part.array("verdicts", np.uint8) for part in parts]
    found: dict[str, Any] = {"scan": identity, "firsts": [], "duplicates": None}
    wanted, signing = job.profile.duplicates, job.signing
    if wanted is not None and signing is not None:
        paths = [part.cut("signatures") for part in parts]
        duplicates = find_duplicates(paths, folder, signing, wanted.threshold, machines.map)
        for number, mine in enumerate(verdicts):
            survivors = np.flatnonzero(mine == KEPT)
            mine[survivors[duplicates.exact(number)]] = EXACT_DUPLICATE
            mine[survivors[duplicates.near(number)]] = NEAR_DUPLICATE
        np.save(folder / "roots.npy", duplicates.roots)
        found |= {"firsts": list(duplicates.firsts), "duplicates": duplicates.summary()}
    for number, mine in enumerate(verdicts):
        mine.tofile(_verdicts_path(folder, number))
    write_json_atomic(done, found)
    return found


def _finish(scan: Parts, write: Parts, job: Job, found: dict[str, Any], output: Path) -> None:
    work = output / _WORK
    if (output / MANIFEST).exists() and not (work / _FINISHED).exists():
        os.replace(output / MANIFEST, work / _REPLACED)
    if (work / _REPLACED).exists():
        for name in read_manifest(work / _REPLACED, KIND, DataError)["outputs"]:
            (output / name).unlink(missing_ok=True)
        (work / _REPLACED).unlink()
    names, outputs, states = output_names(scan.inputs), {}, []
    for number, name in enumerate(names):
        judged, written = scan.read(number), write.read(number)
        if written.sha256 != judged.sha256:
            raise DataError(f"{judged.input} has changed since it was judged; run the command again")
        states.append((judged.state, written.state["counts"] if written.blocks else {}))
        if not written.size("zst"):
            (output / name).unlink(missing_ok=True)
            continue
        if written.path("zst").exists():
            os.replace(written.cut("zst"), output / name)
        elif not (output / name).exists():
            raise DataError(f"{written.path('zst')} is gone; remove {write.folder} and run the command again")
        documents = written.state["counts"]["documents"]
        outputs[name] = {"sha256": digest(written.state), "bytes": written.size("zst"), "documents": documents}
    written_names = [name if name in outputs else "" for name in names]
    report = make_report(job, job.scorers, [str(path) for path in scan.inputs], written_names, states)
    if found["duplicates"] is not None:
        report["duplicates"]["search"] = found["duplicates"]
        _name_originals(report, scan, found["firsts"], np.load(work / "verdicts" / "roots.npy", mmap_mode="r"))
    _write_faults(scan, output / "faults.log")
    write_report(report, output)
    inputs = {os.path.abspath(path): scan.read(number).sha256 for number, path in enumerate(scan.inputs)}
    said = {"profile": job.profile.model_dump(mode="json"), **{name: scan.options[name] for name in _SAID}}
    said |= {"files": [os.path.abspath(path) for path in scan.inputs]}
    (work / _FINISHED).touch()
    write_manifest(output / MANIFEST, KIND, inputs, **said, outputs=outputs, totals=report["totals"])


def _name_originals(report: dict[str, Any], scan: Parts, firsts: list[int], roots: npt.NDArray[np.int64]) -> None:
    """Say of each sample of a duplicate which document stays in its place."""
    for kind in ("exact", "near"):
        for sample in report["duplicates"][kind]["samples"]:
            part = [str(path) for path in scan.inputs].index(sample["file"])
            root = int(roots[firsts[part] + sample.pop("survivor")])
            home = int(np.searchsorted(firsts, root, "right")) - 1
            line = scan.read(home).array("lines", "<i8")[root - firsts[home]]
            sample["original"] = f"{scan.inputs[home]}:{line}"


def _write_faults(scan: Parts, path: Path) -> None:
    logs = [scan.read(number).array("faults", np.uint8) for number in range(len(scan.inputs))]
    path.unlink(missing_ok=True)
    if not any(len(log) for log in logs):
        return
    temporary = temporary_path(path)
    with open(temporary, "wb") as file:
        for log in logs:
            file.write(log.data)
    os.replace(temporary, path)


def output_names(inputs: Sequence[Path]) -> list[str]:
    """Name of the cleaned file of each input; where two would be the same, with the input's number before it."""
    stems = []
    for path in inputs:
        stem = path.name
        while (ending := next((e for e in _ENDINGS if stem.lower().endswith(e) and len(stem) > len(e)), "")) != "":
            stem = stem[: -len(ending)]
        stems.append(stem)
    unique = [stem if stems.count(stem) == 1 else f"{number:05d}-{stem}" for number, stem in enumerate(stems)]
    return [f"{stem}.jsonl.zst" for stem in unique]


__all__ = ["KIND", "MANIFEST", "Verdicts", "clean_files", "output_names"]
