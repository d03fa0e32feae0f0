"""Is a conversion the same, byte for byte, when it is killed at random moments and begun again?

Each trial kills `megatron-cpt checkpoint convert` with SIGKILL at a random moment of its work (imports do not count,
nor what comes after the result can be loaded), half of the trials a second time when it is repeated, then lets the same
command end and compares every file with those of a conversion that nobody disturbed. Every other trial kills the first
process alone, so that workers of its own may outlive it, the rest kill all of its processes. While the work is cut off
nothing that can be loaded may stand at the destination: `checkpoint show` has to refuse it, and a reader's way in must
not be there under its final name (hf: config.json with weights or their index; torch_dist: .metadata; mp_rank:
latest_checkpointed_iteration.txt).

Fields of the manifest that differ between two undisturbed conversions (times, say) are printed and left out of the
comparison; everything else counts. A repetition went on when it gave the kernel less than 95 % of the bytes that an
undisturbed conversion writes.

    python benchmarks/bench_convert_kill.py --kills 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conversions import COMMAND, Sizes, add_sizes, hashes_of, refused, sizes_of, write_model

MEDIUM = Sizes(8, 1024, 2816, 16, 4, 32000)
WAYS_IN = {
    "hf": ({"config.json", "model.safetensors"}, {"config.json", "model.safetensors.index.json"}),
    "torch_dist": ({".metadata"},),
    "mp_rank": ({"latest_checkpointed_iteration.txt"},),
}
WENT_ON = 0.95  # of the bytes that an undisturbed conversion writes


@dataclass(frozen=True)
class Direction:
    """One conversion."""

    source: Path
    to: str
    options: tuple[str, ...] = ()

    def start(self, result: Path) -> subprocess.Popen[bytes]:
        """Begin it; what it says goes into files beside the folder that holds the result."""
        words = [*COMMAND, "convert", str(self.source), str(result), "--to", self.to, *self.options, "--json"]
        with open(said(result, "out"), "wb") as output, open(said(result, "err"), "wb") as errors:
            return subprocess.Popen(words, stdout=output, stderr=errors, start_new_session=True)


@dataclass(frozen=True)
class Whole:
    """What an undisturbed conversion makes."""

    content: dict[str, Any]
    ignored: frozenset[str]  # fields of the manifest
    written_bytes: int
    start_seconds: float  # until it begins to write
    work_seconds: float  # from then on until the result can be loaded


@dataclass
class Tally:
    """What the trials of one direction showed."""

    trials: int = 0
    killed: int = 0
    nothing: int = 0
    complete: int = 0
    same: int = 0
    reported: int = 0
    written: list[float] = field(default_factory=list)  # of each repetition, as a part of a whole conversion
    problems: list[str] = field(default_factory=list)


def said(result: Path, end: str) -> Path:
    """Where a conversion's output goes."""
    return result.parent.with_suffix(f".{end}")


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; it stays there for `wait`, its counters too."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def wait_for_work(result: Path, process: subprocess.Popen[bytes]) -> float:
    """Wait until anything lies beside the result; returns that moment."""
    while not has_ended(process) and not any(result.parent.iterdir()):
        time.sleep(0.001)
    return time.monotonic()


def kill(process: subprocess.Popen[bytes], alone: bool) -> bool:
    """SIGKILL to a process, and to those it started unless `alone`; returns whether it was still at work."""
    with suppress(ProcessLookupError):
        if alone:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def to_the_end(direction: Direction, process: subprocess.Popen[bytes], result: Path) -> int:
    """Wait until a conversion ends; returns the bytes that it and its workers gave to the kernel to write."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    if process.wait():
        raise SystemExit(f"conversion to {direction.to} fails: {said(result, 'err').read_text().strip()}")
    return int(counters["wchar"])


def content_of(result: Path, ignored: frozenset[str] = frozenset()) -> dict[str, Any]:
    """SHA-256 of every file by its path, and the fields of the manifest that are not ignored."""
    content: dict[str, Any] = dict(hashes_of(result))
    if content.pop("manifest.json", None):
        manifest = json.loads((result / "manifest.json").read_text())
        content |= {f"manifest.{key}": value for key, value in manifest.items() if key not in ignored}
    return content


def undisturbed(direction: Direction, folder: Path) -> Whole:
    """Convert twice, see what differs, and take the shorter times."""
    results = [folder / f"whole{number}" / "result" for number in (1, 2)]
    starts, works = [], []
    for result in results:
        result.parent.mkdir()
        begun = time.monotonic()
        process = direction.start(result)
        at_work = wait_for_work(result, process)
        while not has_ended(process) and not has_way_in(direction, result):
            time.sleep(0.001)
        starts.append(at_work - begun)
        works.append(time.monotonic() - at_work)
        written = to_the_end(direction, process, result)
    one, other = map(content_of, results)
    different = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    if any(not name.startswith("manifest.") for name in different):
        raise SystemExit(f"two undisturbed conversions differ: {', '.join(sorted(different))}")
    ignored = frozenset(name.removeprefix("manifest.") for name in different)
    content = content_of(results[0], ignored)
    for result in results:
        shutil.rmtree(result.parent)
    return Whole(content, ignored, written, min(starts), min(works))


def has_way_in(direction: Direction, result: Path) -> bool:
    """Whether what a reader looks for first is at the destination."""
    held = set(os.listdir(result)) if result.is_dir() else set()
    return any(way <= held for way in WAYS_IN[direction.to])


def state_of(direction: Direction, result: Path, whole: Whole) -> str:
    """What stands at the destination of a killed conversion: "nothing", "complete" or what is wrong with it."""
    words = [*COMMAND, "show", str(result)]
    shown = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    if not shown and not has_way_in(direction, result):
        return "nothing"
    found = content_of(result, whole.ignored)
    different = sorted(name for name in whole.content | found if found.get(name) != whole.content.get(name))
    return f"loadable while cut off, different in {', '.join(different)}" if different else "complete"


def trial(direction: Direction, parent: Path, whole: Whole, draw: random.Random, tally: Tally) -> None:
    """Kill, look, repeat, compare."""
    parent.mkdir()
    result = parent / "result"
    alone, state = tally.trials % 2 == 0, "nothing"
    tally.trials += 1
    for number in range(draw.choice((1, 2))):
        process = direction.start(result)
        if number == 0:
            wait_for_work(result, process)
            time.sleep(draw.uniform(0, whole.work_seconds))
        else:  # what the first left behind is there from the start
            time.sleep(whole.start_seconds + draw.uniform(0, whole.work_seconds))
        tally.killed += kill(process, alone)
        state = state_of(direction, result, whole)
        if state != "nothing":
            break
    if state == "nothing":
        tally.nothing += 1
        tally.written.append(to_the_end(direction, direction.start(result), result) / whole.written_bytes)
        tally.reported += bool(json.loads(said(result, "out").read_text()).get("resumed"))
    elif state == "complete":
        tally.complete += 1
    else:
        tally.problems.append(f"{parent.name}: {state}")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # workers that outlived the first process
    found = content_of(result, whole.ignored) if result.is_dir() else {}
    if found == whole.content:
        tally.same += 1
    else:
        different = sorted(name for name in whole.content | found if found.get(name) != whole.content.get(name))
        tally.problems.append(f"{parent.name}: different in {', '.join(different)}")
    # The lock of a process that was killed after its result had taken its name holds nobody up.
    if left := sorted(path.name for path in parent.iterdir() if path not in (result, parent / ".result.lock")):
        tally.problems.append(f"{parent.name}: left behind {', '.join(left)}")
    shutil.rmtree(parent)


def run(direction: Direction, name: str, folder: Path, kills: int, seed: int) -> bool:
    """All trials of one direction; returns whether nothing was wrong."""
    whole = undisturbed(direction, folder)
    draw, tally = random.Random(seed), Tally()
    for number in range(kills):
        trial(direction, folder / f"{direction.to}{number}", whole, draw, tally)
    went_on = [part for part in tally.written if part < WENT_ON]
    share = f", which wrote {statistics.mean(went_on):.0%} of a conversion's bytes on average" if went_on else ""
    print(
        f"{name}: {tally.same} of {kills} byte-identical; {tally.killed} kills met a living process, {tally.nothing} "
        f"conversions were cut off with nothing loadable at their place, {tally.complete} were complete; "
        f"{len(went_on)} of {len(tally.written)} repetitions went on{share}, {tally.reported} say so themselves; "
        f"a conversion works {whole.work_seconds:.1f} s after {whole.start_seconds:.1f} s of start; fields of the "
        f"manifest that differ anyway: {', '.join(sorted(whole.ignored)) or 'none'}"
    )
    for problem in tally.problems:
        print(f"  {problem}")
    sys.stdout.flush()
    return not tally.problems


def main() -> None:
    """Make the sources, run all directions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, MEDIUM)
    parser.add_argument("--kills", type=int, default=50, help="trials of each direction")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tp", type=int, default=2, help="of the mp_rank files")
    parser.add_argument("--pp", type=int, default=2, help="of the mp_rank files")
    parser.add_argument("--only", nargs="+", default=[], help="directions by their names, like torch_dist-hf")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; six times the model's size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as name:
        folder = Path(name)
        write_model(folder / "hf", sizes_of(arguments), 4)
        directions = {"hf-torch_dist": Direction(folder / "hf", "torch_dist")}
        directions["torch_dist-hf"] = Direction(folder / "torch_dist", "hf")
        layout = ("--tp", str(arguments.tp), "--pp", str(arguments.pp))
        refusal = refused(folder / "hf", ("--to", "mp_rank", *layout))
        if not refusal:
            directions["hf-mp_rank"] = Direction(folder / "hf", "mp_rank", layout)
            directions["mp_rank-hf"] = Direction(folder / "mp_rank", "hf")
        else:
            print(f"mp_rank is left out: {refusal}")
        if unknown := set(arguments.only) - directions.keys():
            raise SystemExit(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(directions)}")
        for direction in directions.values():
            if direction.to != "hf":
                to_the_end(direction, direction.start(folder / direction.to), folder / direction.to)
        fine = [
            run(direction, name, folder, arguments.kills, arguments.seed)
            for name, direction in directions.items()
            if not arguments.only or name in arguments.only
        ]
    if not all(fine):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
