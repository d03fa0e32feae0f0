"""The world as files: a corpus for each language and split, and the probe."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import MANIFEST, sha256_bytes, sha256_file, write_manifest, write_text_atomic
from megatron_cpt.data.world.generator import World
from megatron_cpt.data.world.templates import SPLITS
from megatron_cpt.data.world.words import TEXT
from megatron_cpt.errors import DataError

_PROBE_LANGUAGES = ("en", "ja")


def write_world(
    folder: str | os.PathLike[str],
    seed: int,
    documents_per_language: int,
    source_language: str = "en",
    target_language: str = "ja",
    held_out_documents: int | None = None,
    probe_items: int | None = None,
) -> dict[str, Any]:
    """Write `<language>.<split>.jsonl` (fields id, text), `probe.json` and, last, `manifest.json`.

    Args:
        folder: created where it is missing; files of an earlier world in it are replaced.
        seed: of the world.
        documents_per_language: train documents of each language.
        source_language: the language that tells every fact; only "en".
        target_language: the language the probe asks in; only "ja".
        held_out_documents: held-out documents of each language (None: a tenth of the train documents, at least 50).
        probe_items: number of probe questions (None: all).

    Returns:
        The manifest's own fields: seed, languages, number of probe questions, and for each file its
        documents, text bytes and SHA-256.

    Raises:
        DataError: another pair of languages, or a number of documents below 1.
    """
    languages = (source_language, target_language)
    if languages != _PROBE_LANGUAGES:
        raise DataError(f"the built-in world is told from 'en' to 'ja', got {languages[0]!r} to {languages[1]!r}")
    if documents_per_language < 1:
        raise DataError(f"documents_per_language is {documents_per_language}; expected at least 1")
    if held_out_documents is None:
        held_out_documents = max(50, documents_per_language // 10)
    world, folder = World(seed), Path(folder)
    probe = [dataclasses.asdict(item) for item in world.probe(probe_items)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # until the new one is written, the folder is unfinished
    files: dict[str, Any] = {}
    for language in languages:
        for split, count in zip(SPLITS, (documents_per_language, held_out_documents), strict=True):
            name = f"{language}.{split}.jsonl"
            files[name] = _write_corpus(folder / name, world, language, count, split)
    write_text_atomic(folder / "probe.json", json.dumps(probe, ensure_ascii=False, indent=1) + "\n")
    files["probe.json"] = {"items": len(probe), "sha256": sha256_file(folder / "probe.json")}
    fields = {"seed": seed, "source_language": source_language, "target_language": target_language, "files": files}
    write_manifest(folder / MANIFEST, "world", {"text": text_hash()}, **fields)
    return fields


def _write_corpus(path: Path, world: World, language: str, count: int, split: str) -> dict[str, Any]:
    documents = list(world.documents(language, count, split))
    lines = [json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) for document in documents]
    write_text_atomic(path, "\n".join(lines) + "\n")
    text_bytes = sum(len(document.text.encode()) for document in documents)
    return {"documents": len(documents), "text_bytes": text_bytes, "sha256": sha256_file(path)}


def text_hash() -> str:
    """Hex SHA-256 over the world's text files, by name: it changes when any wording does."""
    files = sorted(TEXT.rglob("*.txt"), key=lambda path: path.relative_to(TEXT).as_posix())
    return sha256_bytes(
        "".join(f"{path.relative_to(TEXT).as_posix()} {sha256_file(path)}\n" for path in files).encode()
    )
