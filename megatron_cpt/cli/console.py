"""What the verbs share: options, progress on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console, RenderableType

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one value of the configuration; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")]

LINE_INTERVAL_SECONDS = 30.0  # between progress lines where stderr is a file


def emit(value: dict[str, Any], as_json: bool, render: Callable[[dict[str, Any]], RenderableType]) -> None:
    """Print a result on stdout: as JSON, or as what `render` makes of it for a person."""
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        # Text in a file or pipe is read by programs: it must not be cut at a guessed width.
        Console(width=None if sys.stdout.isatty() else 200).print(render(value))


@contextlib.contextmanager
def stdout_for_results(as_json: bool) -> Iterator[None]:
    """With `--json`, send everything else that is said on stdout to stderr, by started processes too."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def say_kept(staged: Path) -> None:
    """Say that work which was stopped can go on later."""
    print(f"What is done is kept in {staged}; the same command goes on with it.", file=sys.stderr)


class Advance(Protocol):
    """What shows how far some work is."""

    def __call__(self, done: int, total: int, step: str = "") -> None:
        """Show (done, total), in bytes or items, of the work first described or of a further `step` by its name."""


@contextlib.contextmanager
def progress(description: str) -> Iterator[Advance]:
    """Show the progress of long work on stderr, with the time that is left.

    A bar on a terminal; elsewhere one line every half minute, and none for work shorter than that.

    Yields:
        A function to call with (done, total), and with the name of a further step, which has a bar of its own.
    """
    if sys.stderr.isatty():
        with _bar(description) as advance:
            yield advance
    else:
        yield _lines(description)


@contextlib.contextmanager
def _bar(description: str) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {"": bars.add_task(description, total=None)}

        def advance(done: int, total: int, step: str = "") -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=None)
            bars.update(tasks[step], completed=done, total=total)

        yield advance


def _lines(description: str) -> Advance:
    started = last = time.monotonic()
    shown = ""

    def advance(done: int, total: int, step: str = "") -> None:
        nonlocal started, last, shown
        now = time.monotonic()
        if step != shown:
            started, last, shown = now, now, step
        if now - last < LINE_INTERVAL_SECONDS or not done:
            return
        last = now
        left = (now - started) * max(total - done, 0) / done
        print(
            f"{step or description}: {100 * done / max(total, 1):.0f} %, {left:.0f} s left", file=sys.stderr, flush=True
        )

    return advance
