"""Steps that are done once: each leaves a record of what it was made from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.config.manifest import read_json, sha256_json, write_json_atomic


class Steps:
    """Runs the steps of one run folder and remembers what each was made from.

    `steps/<name>.json` holds the step's key (a hash of its settings and of the keys of the steps it
    builds on), whether it is done, how long it took and what it found. A step whose record is done
    under the same key is not run again; one that was cut off begins anew, or, when it can, goes on.

    Args:
        root: the run folder.
        total: number of steps, for the heading.
    """

    def __init__(self, root: Path, total: int) -> None:
        self.root, self.total, self.number = root, total, 0
        self.keys: dict[str, str] = {}

    def do(
        self,
        name: str,
        title: str,
        settings: Mapping[str, Any],
        needs: tuple[str, ...],
        action: Callable[[], dict[str, Any]],
        *,
        folder: Path | None = None,
        resumable: bool = False,
    ) -> dict[str, Any]:
        """Do a step unless it is done.

        Args:
            name: of the record.
            title: what the step does, for people.
            settings: everything the step depends on beside earlier steps.
            needs: names of the steps it builds on.
            action: does it; returns facts for the report.
            folder: what it makes; removed before it begins anew.
            resumable: the action itself continues what it finds in `folder`.

        Returns:
            the facts, from the action or from the record.
        """
        self.number += 1
        key = sha256_json([__version__, dict(settings), [self.keys[need] for need in needs]])
        self.keys[name] = key
        path = self.root / "steps" / f"{name}.json"
        record = read_json(path) if path.exists() else {}
        same = record.get("key") == key
        heading = f"[{self.number}/{self.total}] {title}"
        if same and record.get("done"):
            print(f"{heading}: done before", flush=True)
            facts: dict[str, Any] = record["facts"]
            return facts
        print(heading, flush=True)
        if folder is not None and folder.exists() and not (resumable and same):
            shutil.rmtree(folder)
        write_json_atomic(path, {"key": key, "done": False})
        begun = time.monotonic()
        facts = action()
        seconds = round(time.monotonic() - begun, 2)
        write_json_atomic(path, {"key": key, "done": True, "seconds": seconds, "facts": facts})
        return facts

    def seconds(self) -> dict[str, float]:
        """How long each finished step of this run took."""
        records = ((name, read_json(self.root / "steps" / f"{name}.json")) for name in self.keys)
        return {name: record["seconds"] for name, record in records if record["done"]}
