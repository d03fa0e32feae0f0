"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cpt.errors import InputError


def check_free(output: Path, error: type[InputError]) -> None:
    """Raise `error` when `output` is a file or a folder that holds anything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise error(f"{output} already exists and is not an empty folder: name a new folder, or remove this one first")


@contextmanager
def new_folder(output: Path, error: type[InputError]) -> Iterator[Path]:
    """A temporary folder that takes the name `output` when the block ends without an exception.

    Raises:
        InputError: of the class `error`, when `output` is taken (see `check_free`).
    """
    check_free(output, error)
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        if output.is_dir():
            output.rmdir()
        os.replace(staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
