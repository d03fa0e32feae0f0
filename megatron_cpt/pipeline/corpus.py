"""The texts of a run: what is trained on, and what is kept aside to be scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.manifest import read_json, sha256_file
from megatron_cpt.config.schema import CorpusConfig
from megatron_cpt.data import Document, is_held_out, read_documents
from megatron_cpt.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """One language's texts.

    Attributes:
        language: its name.
        parts: files to train on, by the name that stages call them; a language without such names is one part.
        held_out_files: files of held-out text; None: a share of `files`, by works.
        fraction: that share.
        held_out_bytes: whole documents up to this many bytes are scored, at least one.
        text_field: field of the records that holds the text.
    """

    language: str
    parts: dict[str, tuple[Path, ...]]
    held_out_files: tuple[Path, ...] | None
    fraction: float
    held_out_bytes: int
    text_field: str

    @property
    def files(self) -> tuple[Path, ...]:
        """Files to train on, of all parts."""
        return tuple(path for files in self.parts.values() for path in files)

    def train(self) -> Iterator[Document]:
        """Documents to train on, in file order."""
        documents = read_documents(self.files, self.text_field, self.language)
        if self.held_out_files is not None:
            return documents
        return (document for document in documents if not is_held_out(document, self.fraction))

    def held_out(self) -> list[Document]:
        """Documents to score: drawn over all held-out works by hash, up to `held_out_bytes`.

        Raises:
            DataError: no work is held out, or all are.
        """
        files = self.files if self.held_out_files is None else self.held_out_files
        every = 0
        candidates = []
        for document in read_documents(files, self.text_field, self.language):
            every += 1
            if document.text and (self.held_out_files is not None or is_held_out(document, self.fraction)):
                candidates.append(document)
        if not candidates or (self.held_out_files is None and len(candidates) == every):
            raise DataError(
                f"{self.language}: {len(candidates)} of {every} documents are held out at "
                f"data.held_out_fraction={self.fraction:g}; expected some on both sides: give more works (documents "
                "with one id before '#' are one work) or another fraction"
            )
        candidates.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
        chosen: list[Document] = []
        size = 0
        for document in candidates:
            if chosen and size + len(document.text.encode()) > self.held_out_bytes:
                break
            chosen.append(document)
            size += len(document.text.encode())
        return chosen

    def hashes(self) -> list[str]:
        """SHA-256 of every file, in order."""
        return [sha256_file(path) for path in (*self.files, *(self.held_out_files or ()))]


def open_corpora(config: CorpusConfig) -> tuple[Corpus, Corpus]:
    """The source and target corpora of files that the user named.

    Raises:
        DataError: a file is missing.
    """
    corpora = []
    for language, texts in zip((config.source_language, config.target_language), config.texts(), strict=True):
        parts = {
            name: tuple(map(Path, (text.files,) if isinstance(text.files, str) else text.files))
            for name, text in texts.items()
        }
        for path in (path for files in parts.values() for path in files):
            if not path.is_file():
                raise DataError(f"{path} does not exist; data.source and data.target name files of text")
        fraction, limit = config.held_out_fraction, config.held_out_bytes
        corpora.append(Corpus(language, parts, None, fraction, limit, config.text_field))
    return corpora[0], corpora[1]


def world_corpora(config: CorpusConfig, folder: Path) -> tuple[Corpus, Corpus]:
    """The corpora of the built-in world that was written into `folder`."""
    languages = (config.source_language, config.target_language)
    source, target = (
        Corpus(
            language,
            {language: (folder / f"{language}.train.jsonl",)},
            (folder / f"{language}.held_out.jsonl",),
            config.held_out_fraction,
            config.held_out_bytes,
            "text",
        )
        for language in languages
    )
    return source, target


def read_probe(folder: Path) -> dict[str, list[tuple[str, str, list[str]]]]:
    """The world's questions in both languages: language -> (prompt, answer, wrong answers)."""
    items = read_json(folder / "probe.json", DataError)
    return {
        "en": [
            (i["source_prompt"], " " + i["source_answer"], [" " + x for x in i["source_distractors"]]) for i in items
        ],
        "ja": [(i["prompt"], i["answer"], i["distractors"]) for i in items],
    }
