"""Steps that are done once: each leaves a record of what it was made from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.config.manifest import read_json, sha256_json, write_json_atomic
from megatron_cpt.errors import CptError


@dataclass(frozen=True)
class Step:
    """One step, with its key: a hash of its settings and of the keys of the steps it builds on."""

    name: str
    title: str
    key: str
    needs: tuple[str, ...]
    action: Callable[[], dict[str, Any]]
    makes: tuple[Path, ...]
    resumable: Path | None
    is_result: bool


class Steps:
    """The steps of one run folder; remembers what each was made from.

    `steps/<name>.json` holds a step's key, whether it is done, how long it took and what it found. A
    step is run when it has no record that is done under its key, or when something it makes is
    missing and wanted: because it is a result of the run, or because a step that is run needs it. So
    intermediate files may be deleted when the run is over.

    Args:
        root: the run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []

    def add(
        self,
        name: str,
        title: str,
        settings: Mapping[str, Any],
        needs: tuple[str, ...],
        action: Callable[[], dict[str, Any]],
        *,
        makes: tuple[Path, ...] = (),
        resumable: Path | None = None,
        is_result: bool = False,
    ) -> None:
        """Add a step after those it needs.

        Args:
            name: of the record.
            title: what the step does, for people.
            settings: everything the step depends on beside earlier steps.
            needs: names of the steps it builds on.
            action: does it; returns facts for the report.
            makes: files and folders it makes; removed before it begins anew.
            resumable: the one of them that the action continues when it is of the same key.
            is_result: what it makes is what the run is for.
        """
        keys = {step.name: step.key for step in self.steps}
        key = sha256_json([__version__, dict(settings), [keys[need] for need in needs]])
        self.steps.append(Step(name, title, key, needs, action, makes, resumable, is_result))

    def run(self) -> dict[str, Any]:
        """Run the steps that have to be run, in order; returns the facts of the last one."""
        self._run_wanted(self._run)
        return self.facts(self.steps[-1].name)

    def run_all(self) -> dict[str, CptError]:
        """The same, but a step that fails stops only those that need it; returns the failures by name."""
        failed: dict[str, CptError] = {}

        def attempt(step: Step) -> None:
            if cause := next((need for need in step.needs if need in failed), None):
                failed[step.name] = failed[cause]
                print(f"  left out, for {cause} has failed", flush=True)
                return
            try:
                self._run(step)
            except CptError as caught:
                failed[step.name] = caught
                print(f"  failed: {caught}", flush=True)

        self._run_wanted(attempt)
        return failed

    def _run_wanted(self, run: Callable[[Step], None]) -> None:
        wanted = self._wanted()
        for number, step in enumerate(self.steps, 1):
            heading = f"[{number}/{len(self.steps)}] {step.title}"
            if step.name in wanted:
                print(heading, flush=True)
                run(step)
            else:
                print(f"{heading}: done before", flush=True)

    def any_done(self) -> bool:
        """Whether any step was finished in this folder, under whatever key."""
        return any(read_json(path).get("done") for path in (self.root / "steps").glob("*.json"))

    def facts(self, name: str) -> dict[str, Any]:
        """What a step that is done found."""
        found: dict[str, Any] = read_json(self._path(name))["facts"]
        return found

    def seconds(self) -> dict[str, float]:
        """How long each finished step of this run took."""
        records = {step.name: self._record(step) for step in self.steps}
        return {name: record["seconds"] for name, record in records.items() if record.get("done")}

    def _wanted(self) -> set[str]:
        """Names of the steps to run, found from the last to the first."""
        wanted: set[str] = set()
        needed: set[str] = set()
        for step in reversed(self.steps):
            done = self._record(step).get("done", False)
            asked = step.is_result or step.name in needed
            if not done or (asked and not all(path.exists() for path in step.makes)):
                wanted.add(step.name)
                needed |= set(step.needs)
        return wanted

    def _run(self, step: Step) -> None:
        same = bool(self._record(step))
        for path in step.makes:
            if same and path == step.resumable:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_json_atomic(self._path(step.name), {"key": step.key, "done": False})
        begun = time.monotonic()
        facts = step.action()
        seconds = round(time.monotonic() - begun, 2)
        record = {"key": step.key, "done": True, "seconds": seconds, "facts": facts}
        write_json_atomic(self._path(step.name), record)

    def _record(self, step: Step) -> dict[str, Any]:
        """The record of a step under its key, or nothing."""
        path = self._path(step.name)
        record: dict[str, Any] = read_json(path) if path.exists() else {}
        return record if record.get("key") == step.key else {}

    def _path(self, name: str) -> Path:
        return self.root / "steps" / f"{name}.json"
