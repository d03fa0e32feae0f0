"""Sentence pairs of a parallel corpus to documents that a model can learn translation from."""

from __future__ import annotations

import hashlib
import io
import json
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.config.manifest import temporary_path
from megatron_cpt.data.documents import read_documents
from megatron_cpt.errors import DataError

Direction = Literal["sampled", "both", "forward", "backward"]
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}

PLAIN = "{source}\n{target}"
# The instruction stands in the language of the sentence that is translated.
_INSTRUCTIONS = {
    "en": "Translate the following {source_language} text into {target_language}.",
    "ja": "次の{source_language}の文を{target_language}に翻訳してください。",
    "ko": "다음 {source_language} 문장을 {target_language}로 번역하세요.",
    "de": "Übersetze den folgenden Text aus dem {source_language} ins {target_language}.",
}
_NAMES = {
    "en": {"en": "English", "ja": "Japanese", "ko": "Korean", "de": "German"},
    "ja": {"en": "英語", "ja": "日本語", "ko": "韓国語", "de": "ドイツ語"},
    "ko": {"en": "영어", "ja": "일본어", "ko": "한국어", "de": "독일어"},
    "de": {"en": "Englischen", "ja": "Japanischen", "ko": "Koreanischen", "de": "Deutschen"},
}
_FIELDS = {"source", "target", "source_language", "target_language"}


@dataclass(frozen=True)
class Pair:
    """One text in two languages.

    Args:
        texts: the text in the first and in the second language.
        place: where it was read, "file:line".
        id: what the corpus calls it, "work#part"; empty when it does not.
    """

    texts: tuple[str, str]
    place: str
    id: str = ""


def read_pairs(paths: Sequence[str | Path], fields: tuple[str, str]) -> Iterator[Pair]:
    """Read the pairs of files, one at a time and in order.

    Args:
        paths: `.jsonl` (also `.gz`, `.zst`) and `.parquet`: `fields` are names; `.tsv` (also compressed):
            `fields` are column numbers from 1.
        fields: where the text in the first and in the second language stands.

    Raises:
        DataError: a file that cannot be read, or a record without both texts; names file and line.
    """
    for path in map(Path, paths):
        suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSION]
        yield from (_read_tsv if suffixes[-1:] == [".tsv"] else _read_fields)(path, fields)


def _read_fields(path: Path, fields: tuple[str, str]) -> Iterator[Pair]:
    for first, second in zip(read_documents(path, fields[0]), read_documents(path, fields[1]), strict=True):
        yield Pair((first.text, second.text), first.source, first.id)


def _read_tsv(path: Path, fields: tuple[str, str]) -> Iterator[Pair]:
    import pyarrow

    if not all(field.isdecimal() and int(field) > 0 for field in fields):
        raise DataError(f"{path}: fields {fields[0]!r} and {fields[1]!r}: a .tsv has columns, counted from 1")
    first, second = (int(field) - 1 for field in fields)
    number = 0
    try:
        with pyarrow.input_stream(str(path), compression=_COMPRESSION.get(path.suffix.lower())) as file:
            stream = io.BufferedReader(file)
            for number, line in enumerate(stream, 1):
                columns = line.decode().rstrip("\r\n").split("\t")
                if max(first, second) >= len(columns):
                    raise DataError(
                        f"{path}:{number}: {len(columns)} columns, expected {max(first, second) + 1} or more"
                    )
                yield Pair((columns[first], columns[second]), f"{path}:{number}")
    except FileNotFoundError:
        raise DataError(f"corpus {path} does not exist") from None
    except UnicodeDecodeError as caught:
        raise DataError(f"{path}:{number}: not valid UTF-8 ({caught.reason}); convert the file first") from None
    except (OSError, EOFError) as caught:
        raise DataError(f"{path}:{number}: the file is damaged or cut short ({caught})") from None


@dataclass(frozen=True)
class Template:
    """How one pair is written.

    Args:
        text: a format with `{source}` and `{target}`, and where it likes `{source_language}` and
            `{target_language}`; "plain" (one under the other) or "instruction" (asks for the translation
            in the language of the sentence, an empty line, the sentence, an empty line, its translation).

    Raises:
        DataError: another placeholder, or not both texts.

    Source: Swallow (arXiv 2404.17790, section on parallel corpora) trains on both forms.
    Deviates: the wording of the instructions is ours.
    """

    text: str

    def __post_init__(self) -> None:
        if self.text in ("plain", "instruction"):
            return
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None}
        except ValueError as caught:
            raise DataError(f"template {self.text!r}: {caught}; a brace that is text is written twice") from None
        if not {"source", "target"} <= names <= _FIELDS:
            raise DataError(
                f"template {self.text!r} has the placeholders {', '.join(sorted(names)) or 'none'}; expected "
                "plain, instruction, or a text with {source} and {target}, and of the others only "
                "{source_language} and {target_language}"
            )

    def write(self, source: str, target: str, source_language: str, target_language: str) -> str:
        """The document of one pair, in one direction.

        Raises:
            DataError: the template names a language whose name is not known.
        """
        form = {"plain": PLAIN, "instruction": "{instruction}\n\n{source}\n\n{target}"}.get(self.text, self.text)
        if self.text == "instruction":
            names = _names_in(source_language)
            instruction = _INSTRUCTIONS.get(source_language, _INSTRUCTIONS["en"]).format(
                source_language=_name_of(source_language, names), target_language=_name_of(target_language, names)
            )
            return form.format(instruction=instruction, source=source, target=target)
        english = _NAMES["en"]
        return form.format(
            source=source,
            target=target,
            source_language=english.get(source_language, source_language),
            target_language=english.get(target_language, target_language),
        )


def _names_in(language: str) -> dict[str, str]:
    return _NAMES.get(language, _NAMES["en"])


def _name_of(language: str, names: dict[str, str]) -> str:
    if language not in names:
        raise DataError(
            f"language {language!r} has no name in the instruction template (known: {', '.join(names)}); "
            "give a template of your own"
        )
    return names[language]


def pair_documents(
    pairs: Iterable[Pair],
    languages: tuple[str, str],
    template: Template,
    direction: Direction = "sampled",
    seed: int = 1,
) -> Iterator[dict[str, str]]:
    """The records of the documents: `id`, `text`, `direction` ("en-ja").

    Args:
        pairs: the pairs; those with an empty side are left out.
        languages: of the first and of the second text.
        template: how a pair is written.
        direction: "forward" (first language to second), "backward", "both" (two documents a pair), or
            "sampled": one of the two, by a hash of the seed and the texts, so that it depends on nothing else.
        seed: of the sampled directions.
    """
    for pair in pairs:
        first, second = (text.strip() for text in pair.texts)
        if not first or not second:
            continue
        if direction == "sampled":
            digest = hashlib.sha256(f"{seed}\0{first}\0{second}".encode()).digest()
            chosen: Sequence[bool] = (digest[0] < 128,)
        else:
            chosen = {"forward": (True,), "backward": (False,), "both": (True, False)}[direction]
        for forward in chosen:
            source, target = (first, second) if forward else (second, first)
            names = languages if forward else languages[::-1]
            text = template.write(source, target, *names)
            yield {"id": pair.id, "text": text, "direction": "-".join(names)}


def write_pairs(records: Iterable[dict[str, str]], output: Path) -> dict[str, Any]:
    """Write the records to a `.jsonl` file (also `.gz`, `.zst`), which appears whole or not at all.

    Returns:
        `output`, `documents`, `text_bytes`, `directions` (documents of each).

    Raises:
        DataError: the name of the file says another kind, it exists, or there is no record.
    """
    import pyarrow

    if [suffix for suffix in output.suffixes if suffix not in _COMPRESSION][-1:] != [".jsonl"]:
        raise DataError(f"{output}: expected a name that ends in .jsonl, .jsonl.gz or .jsonl.zst")
    if output.exists():
        raise DataError(f"{output} exists already; choose another name, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    directions: dict[str, int] = {}
    text_bytes = 0
    temporary = temporary_path(output)
    try:
        with pyarrow.output_stream(str(temporary), compression=_COMPRESSION.get(output.suffix)) as stream:
            for record in records:
                stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                directions[record["direction"]] = directions.get(record["direction"], 0) + 1
                text_bytes += len(record["text"].encode())
        if not directions:
            raise DataError(f"no pair to write to {output}: the files hold none with both sides")
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    documents = sum(directions.values())
    return {"output": str(output), "documents": documents, "text_bytes": text_bytes, "directions": directions}
