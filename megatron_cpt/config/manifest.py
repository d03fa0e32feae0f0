"""What made an artefact: a `manifest.json` written last, atomically, beside it.

A folder (or a file prefix) without its manifest is unfinished and is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from megatron_cpt import __version__
from megatron_cpt.errors import InputError

MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_NO_DIGITS = "-" * 64


def sha256_bytes(data: bytes | memoryview) -> str:
    """Hex SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON: the same for equal values on every machine."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def temporary_path(path: str | os.PathLike[str]) -> Path:
    """Where this process writes what will be renamed to `path`: a hidden name beside it, with host and process id.

    Removes what processes that were killed on this host have left there under such names.
    """
    path = Path(path)
    before = f".{path.name}.{os.uname().nodename}."
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        pid = other.name.removeprefix(before).removesuffix(".tmp")
        if other.name == f"{before}{pid}.tmp" and re.fullmatch("[0-9]{1,9}", pid) and not _is_alive(int(pid)):
            other.unlink(missing_ok=True)
    return path.with_name(f"{before}{os.getpid()}.tmp")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def write_atomic(path: str | os.PathLike[str], fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a reader sees the old file or the new one, never a part.

    Args:
        path: the file; its folder is there.
        fill: writes the content with `file.write`.

    Raises:
        OSError: what the system refuses, with `path` as its file name; nothing of the new file is left.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as caught:
        with suppress(OSError):  # the first refusal is the one to tell
            temporary.unlink(missing_ok=True)
        if isinstance(caught, OSError) and caught.errno is not None:
            raise OSError(caught.errno, caught.strerror, str(path)) from None
        raise


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON (indented, UTF-8, keys in the order given) atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str], error: type[InputError] = InputError) -> Any:
    """Read a JSON file; raises `error` that names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as caught:
        raise error(f"cannot read {path}: {caught.strerror or caught}") from None
    except RecursionError:
        raise error(f"{path} is nested too deep for a file of settings; it is another kind of file") from None
    except ValueError as caught:
        raise error(f"{path} is not valid JSON ({caught}); it was cut short or is another kind of file") from None


def write_manifest(path: str | os.PathLike[str], kind: str, inputs: Mapping[str, str], **fields: Any) -> None:
    """Write the manifest file `path` of a finished artefact.

    Args:
        path: the manifest's own path, `<folder>/manifest.json` or `<prefix>.manifest.json`.
        kind: what the artefact is: "tokenizer", "shards", "plan", "checkpoint", ...
        inputs: name -> SHA-256 of everything the artefact was made from.
        fields: whatever the next step has to compare (sizes, true and padded vocabulary, options).
    """
    write_json_atomic(path, _manifest(kind, inputs, fields))


def write_sealed_manifest(path: str | os.PathLike[str], kind: str, inputs: Mapping[str, str], **fields: Any) -> None:
    """As `write_manifest`, with a hash of the file itself at its end, for `is_intact`."""
    sealed = {**_manifest(kind, inputs, fields), _SEAL: _NO_DIGITS}
    text = json.dumps(sealed, indent=2, ensure_ascii=False) + "\n"
    write_text_atomic(path, text.replace(_NO_DIGITS, sha256_bytes(text.encode())))


def _manifest(kind: str, inputs: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "megatron_cpt": __version__, "inputs": dict(sorted(inputs.items())), **fields}


def is_intact(path: str | os.PathLike[str]) -> bool:
    """Whether a sealed manifest is byte for byte as it was written."""
    data = Path(path).read_bytes()
    found = re.search(rb'"' + _SEAL.encode() + rb'": "([0-9a-f]{64})"\n}\n\Z', data)
    return (
        found is not None
        and sha256_bytes(data[: found.start(1)] + _NO_DIGITS.encode() + data[found.end(1) :]) == found[1].decode()
    )


def read_manifest(path: str | os.PathLike[str], kind: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a manifest and check its kind; raises `error` where it is missing or of another kind."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise error(f"{folder} is no folder: expected {kind!r} there with its manifest; check the path")
    if not os.path.exists(path):
        raise error(
            f"{path} is missing: expected {kind!r} there, made by this tool; what is there is unfinished or something "
            "else: make it again, or point to the right place"
        )
    manifest = read_json(path, error)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        got = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise error(f"{path} describes {got!r}, expected {kind!r}: point to the right folder")
    return manifest
