"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cpt.errors import CptError, InputError


def check_free(folder: Path, error: type[InputError]) -> None:
    """Raise `error` when `folder` is a link, a mount, a file, or a folder that holds anything."""
    if folder.is_symlink() or os.path.ismount(folder):
        raise error(
            f"{folder} is a link or a mount, which cannot be replaced by a finished folder: name a folder in it"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise error(f"{folder} already holds files: choose a new folder, or remove this one first")


def check_writable(folder: Path, error: type[InputError]) -> None:
    """Raise `error` when `folder` cannot be made, because what is above it may not be written."""
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise error(f"{folder} cannot be made: {above} is a file; choose another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise error(f"{folder} cannot be made: {above} may not be written by you; choose another path")


def check_apart(source: Path, destination: Path, error: type[InputError]) -> None:
    """Raise `error` when one of two folders lies inside the other, or they are one."""
    one, other = source.resolve(), destination.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise error(f"{destination} and {source} lie one inside the other: choose a folder outside the source")


@contextmanager
def new_folder(folder: Path, error: type[InputError]) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block ends without an exception.

    When the block fails it is removed; when the process dies it stays under a name that nobody loads,
    and the next attempt replaces it.

    Raises:
        InputError: of the class `error`, when `folder` is taken (see `check_free`).
    """
    check_free(folder, error)
    staged = staged_folder(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if folder.is_dir():
            folder.rmdir()
        os.replace(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def staged_folder(folder: Path) -> Path:
    """Where a folder is made before it takes its name."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def resumable_folder(folder: Path, error: type[InputError]) -> Iterator[Path]:
    """As `new_folder`, but what a killed or interrupted attempt has done is there for the next one.

    Only a failure that another attempt would meet again, one of this tool's own errors, removes it. The caller lets
    no other process in, and has brought to disk what the folder holds (`sync_folder`).
    """
    check_free(folder, error)
    staged = staged_folder(folder)
    staged.mkdir(parents=True, exist_ok=True)
    try:
        yield staged
    except CptError:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if folder.is_dir():
        folder.rmdir()
    os.replace(staged, folder)
    sync_path(folder.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder and all that is in it to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
