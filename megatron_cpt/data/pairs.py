"""Sentence pairs of a parallel corpus to documents that a model can learn translation from."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.config.manifest import read_manifest, sha256_file, temporary_path, write_manifest
from megatron_cpt.data.blocks import LONGEST_RECORD_BYTES, kind_of, open_blocks
from megatron_cpt.data.parts import check_inputs, differences
from megatron_cpt.errors import DataError
from megatron_cpt.runtime.lock import lock_briefly

Direction = Literal["sampled", "both", "forward", "backward"]
_KIND = "pairs"
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

    The reader is as strict as that of `open_blocks`, and a broken record stops it. A text that is null or missing
    is no such record: it is read as empty.

    Args:
        paths: `.jsonl` (also `.gz`, `.zst`) and `.parquet`: `fields` are names; `.tsv` (also compressed):
            `fields` are column numbers from 1.
        fields: where the text in the first and in the second language stands.

    Raises:
        DataError: a file that cannot be read, a broken record, a line with too few columns, or a field that no
            record of a file has; names file and line.
    """
    for path in map(Path, paths):
        suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _COMPRESSION]
        yield from (_read_tsv if suffixes[-1:] == [".tsv"] else _read_fields)(path, fields)


def _read_fields(path: Path, fields: tuple[str, str]) -> Iterator[Pair]:
    if kind_of(path)[0] == "txt":
        raise DataError(f"corpus {path} has one text a document; pairs are .jsonl, .tsv (also .gz, .zst) or .parquet")
    sides = zip(_read_side(path, fields[0]), _read_side(path, fields[1]), strict=True)
    for (line, first, name), (_, second, other_name) in sides:
        yield Pair((first, second), f"{path}:{line}", name or other_name)


def _read_side(path: Path, name: str) -> Iterator[tuple[int, str, str]]:
    """(line, text, id) of each record, in order; text and id are empty where the text is null or missing."""
    is_null, is_missing = (
        f"field '{name}' holds null, ",
        f"no field '{name}' (fields here: ",
    )  # as csrc/records words it
    is_known, first_missing = False, ""
    with open_blocks(path, name) as reader:
        while (raw := reader.read()) is not None:
            block = raw.parse()
            for line, reason in block.faults:
                if not reason.startswith((is_null, is_missing)):
                    raise DataError(f"{path}:{line}: {reason}")
                is_known |= reason.startswith(is_null)
                first_missing = first_missing or f"{path}:{line}: {reason}"
            is_known |= len(block) > 0
            records = zip(block.lines.tolist(), block.texts(), block.ids(), strict=True)
            yield from sorted([*records, *((line, "", "") for line, _ in block.faults)])
    if first_missing and not is_known:  # a name that was mistyped, not a text that is not there
        raise DataError(first_missing)


def _read_tsv(path: Path, fields: tuple[str, str]) -> Iterator[Pair]:
    import pyarrow

    if not all(field.isdecimal() and int(field) > 0 for field in fields):
        raise DataError(f"{path}: fields {fields[0]!r} and {fields[1]!r}: a .tsv has columns, counted from 1")
    first, second = (int(field) - 1 for field in fields)
    number = 0
    try:
        with pyarrow.input_stream(str(path), compression=_COMPRESSION.get(path.suffix.lower())) as file:
            stream = io.BufferedReader(file)
            for number, line in enumerate(iter(partial(stream.readline, LONGEST_RECORD_BYTES + 1), b""), 1):
                columns = _text_of_line(line, f"{path}:{number}", number == 1).split("\t")
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
        number_of_system = getattr(caught, "errno", None)  # a decompressor's error has none
        if number_of_system is not None:
            raise OSError(number_of_system, os.strerror(number_of_system), str(path)) from None
        raise DataError(f"{path}:{number}: the file is damaged or cut short ({caught})") from None


def _text_of_line(line: bytes, place: str, is_first: bool) -> str:
    line = line.removesuffix(b"\n")
    if len(line) > LONGEST_RECORD_BYTES:
        raise DataError(f"{place}: a record of more than {LONGEST_RECORD_BYTES} bytes; split it")
    line = (line.removeprefix(codecs.BOM_UTF8) if is_first else line).removesuffix(b"\r")
    if (nul := line.find(0)) >= 0:
        raise DataError(f"{place}: a NUL at byte {nul + 1} of the line; this is not a text file, or remove it")
    return line.decode()


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


@dataclass
class Tally:
    """What was read and written.

    Attributes:
        pairs: pairs that were read.
        half_pairs: those of them that have nothing but white space on a side, or on both; no document is made of them.
        text_bytes: of the documents, UTF-8.
        directions: documents of each direction, such as "en-ja".
    """

    pairs: int = 0
    half_pairs: int = 0
    text_bytes: int = 0
    directions: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The counts, as the manifest has them."""
        return {"documents": sum(self.directions.values()), **asdict(self)}


@dataclass(frozen=True)
class PairSettings:
    """How pairs become documents.

    Args:
        languages: of the first and of the second text.
        template: how a pair is written.
        direction: "forward" (first language to second), "backward", "both" (two documents a pair), or
            "sampled": one of the two, by a hash of the seed and the texts, so that it depends on nothing else.
        seed: of the sampled directions.
    """

    languages: tuple[str, str]
    template: Template
    direction: Direction = "sampled"
    seed: int = 1


def pair_documents(pairs: Iterable[Pair], settings: PairSettings, tally: Tally) -> Iterator[dict[str, str]]:
    """The records of the documents: `id`, `text`, `direction` ("en-ja"); counted in `tally` as they come."""
    for pair in pairs:
        tally.pairs += 1
        first, second = (text.strip() for text in pair.texts)
        if not first or not second:
            tally.half_pairs += 1
            continue
        for forward in _directions(settings, first, second):
            source, target = (first, second) if forward else (second, first)
            names = settings.languages if forward else settings.languages[::-1]
            record = {
                "id": pair.id,
                "text": settings.template.write(source, target, *names),
                "direction": "-".join(names),
            }
            tally.text_bytes += len(record["text"].encode())
            tally.directions[record["direction"]] = tally.directions.get(record["direction"], 0) + 1
            yield record


def _directions(settings: PairSettings, first: str, second: str) -> Sequence[bool]:
    """Whether each document of a pair is forward."""
    if settings.direction == "sampled":
        digest = hashlib.sha256(f"{settings.seed}\0{first}\0{second}".encode()).digest()
        return (digest[0] < 128,)
    return {"forward": (True,), "backward": (False,), "both": (True, False)}[settings.direction]


def write_pairs(
    paths: Sequence[str | Path], fields: tuple[str, str], settings: PairSettings, output: Path
) -> dict[str, Any]:
    """Write the pairs of files as documents to a `.jsonl` file (also `.gz`, `.zst`), which appears whole or not at all.

    `<output>.manifest.json` beside it says from what it was made and how. Where the file is there and was made of
    the same, nothing is done.

    Args:
        paths: see `read_pairs`; each file once.
        fields: see `read_pairs`.
        settings: how pairs become documents.
        output: the file.

    Returns:
        `output` and the counts: `documents`, `pairs`, `half_pairs`, `text_bytes`, `directions`.

    Raises:
        DataError: the name of the file says another kind, it exists and was made of something else (also by another
            command meanwhile), an input is missing or given twice, there is no pair with both sides, or what
            `read_pairs` and `Template.write` refuse.
        OSError: the system refuses to read an input or to write the output; names it.
    """
    if [suffix for suffix in output.suffixes if suffix not in _COMPRESSION][-1:] != [".jsonl"]:
        raise DataError(f"{output}: expected a name that ends in .jsonl, .jsonl.gz or .jsonl.zst")
    if output.exists() and not _manifest(output).exists():
        raise DataError(f"{output} exists already; choose another name, or remove it first")
    files = [Path(path) for path in paths]
    check_inputs(files)
    made_of = {
        "options": {
            "fields": list(fields),
            **json.loads(json.dumps(asdict(settings))),
            "template": settings.template.text,
        },
        "sources": [
            {"path": os.path.abspath(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files
        ],
    }
    if output.exists():
        return {"output": str(output), **_made_before(output, made_of)}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(output)
    try:
        tally = _write(read_pairs(files, fields), settings, output, temporary)
        return {"output": str(output), **_put_in_place(temporary, output, tally, made_of)}
    except OSError as caught:
        if caught.errno is None or str(caught.filename) in map(str, files):
            raise
        raise OSError(caught.errno, os.strerror(caught.errno), str(output)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _write(pairs: Iterable[Pair], settings: PairSettings, output: Path, temporary: Path) -> Tally:
    import pyarrow

    tally = Tally()
    with pyarrow.output_stream(str(temporary), compression=_COMPRESSION.get(output.suffix)) as stream:
        for record in pair_documents(pairs, settings, tally):
            stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    if not tally.directions:
        raise DataError(f"no pair to write to {output}: the files hold {tally.pairs:,}, none with both sides")
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    return tally


def _put_in_place(temporary: Path, output: Path, tally: Tally, made_of: dict[str, Any]) -> dict[str, Any]:
    """Give the file its name, unless another command has made it meanwhile; returns the counts."""
    facts = {"sha256": sha256_file(temporary), "bytes": temporary.stat().st_size}
    inputs = {source["path"]: source["sha256"] for source in made_of["sources"]}
    with lock_briefly(output.with_name(f"{output.name}.lock"), DataError):
        if output.exists():
            return _made_before(output, made_of)
        # Before the file that it describes: so a file that is there has its manifest, whenever this was killed.
        write_manifest(_manifest(output), _KIND, inputs, **made_of, **tally.facts(), outputs={"jsonl": facts})
        os.replace(temporary, output)
    return tally.facts()


def _manifest(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def _made_before(output: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    """The counts of a file that was made before.

    Raises:
        DataError: of something else, or it was changed.
    """
    manifest = read_manifest(_manifest(output), _KIND, DataError)
    found = differences(manifest["options"], made_of["options"])
    sources: tuple[list[dict[str, Any]], ...] = (manifest.get("sources", []), made_of["sources"])
    for number, (before, now) in enumerate(zip_longest(*sources, fillvalue={}), 1):
        if before != now:
            was, new = before.get("path", "none"), now.get("path", "none")
            found.append(f"input {number}, {new}, has changed" if was == new else f"input {number} was {was}, is {new}")
            break  # what follows is only shifted
    if manifest["outputs"]["jsonl"]["sha256"] != sha256_file(output):
        found.append("it was changed after it was made")
    if found:
        raise DataError(
            f"{output} exists already and differs ({'; '.join(found)}); choose another name, or remove it first"
        )
    return {name: manifest[name] for name in Tally().facts()}
