"""The texts that benchmarks are given on their command lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_cpt.data import Document
from megatron_cpt.data.blocks import open_blocks


def named(values: Iterable[str]) -> dict[str, list[str]]:
    """NAME=FILE[:FIELD]... as name -> files."""
    files: dict[str, list[str]] = {}
    for value in values:
        name, _, file = value.partition("=")
        files.setdefault(name, []).append(file)
    return files


def distinct_documents(files: Iterable[str]) -> Iterator[Document]:
    """The documents of FILE[:FIELD]... that have a text, each text once."""
    seen = set()
    for value in files:
        path, _, field = value.partition(":")
        with open_blocks(path, field or "text") as reader:
            while (raw := reader.read()) is not None:
                block = raw.parse()
                for id, text in zip(block.ids(), block.texts(), strict=True):
                    if text and text not in seen:
                        seen.add(text)
                        yield Document(text, "", path, id)


def write_plain(files: Iterable[str], path: Path) -> Path:
    """One plain jsonl file with the distinct documents of all."""
    with path.open("w", encoding="utf-8") as out:
        for document in distinct_documents(files):
            out.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
    return path
