"""The template language of the world's text files.

A file holds blocks, each begun by "== name ..."; inside a block "-- part" begins a part. One line of a part
is one beat of a text:

    {slot} {slot:form}   a drawn value, in the form named
    a | b                alternatives, one of which is told
    <a/b>                alternatives inside a sentence
    [polite/plain]       the two styles of Japanese; a document keeps to one
    ? beat               may be left out
    ! beat               always first (in a list)
    (empty line)         a new paragraph
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

SPLITS = ("train", "held_out")
STYLES = ("polite", "plain")
INFORMATIVE_CHARACTERS = {"en": 32, "ja": 16}
_STYLE = re.compile(r"\[([^/\]]*)/([^\]]*)\]")
_CHOICE = re.compile(r"<([^<>]*)>")
_SENTENCE_END = {"en": re.compile(r"(?<=[.!?])[\"']?\s+|\n"), "ja": re.compile(r"(?<=[。！？])|\n")}
_AROUND = " \n\"'「」"
_MOST_VARIANTS = 200

T = TypeVar("T")


class Dice:
    """Random choices that are the same on every machine and every Python."""

    def __init__(self, *key: object):
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self.random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        return int(self.random() * bound)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """The options in a random order."""
        mixed = list(options)
        for last in range(len(mixed) - 1, 0, -1):
            other = int(self.random() * (last + 1))
            mixed[last], mixed[other] = mixed[other], mixed[last]
        return mixed


@dataclass(frozen=True)
class Beat:
    """One step of a text: its wordings by style, and how it joins the beats before it."""

    wordings: Mapping[str, tuple[str, ...]]
    optional: bool = False
    first: bool = False
    paragraph: bool = False


def split_of(key: str) -> str:
    """The split a sentence or a fact belongs to: by a hash of its text alone, whatever the seed; half each."""
    return SPLITS[hashlib.blake2b(key.encode(), digest_size=1).digest()[0] & 1]


def sentences(text: str, language: str) -> list[str]:
    """The sentences of a text, without the white space and the quotes around them."""
    parts = (part.strip(_AROUND) for part in _SENTENCE_END[language].split(text))
    return [part for part in parts if part]


def fits(text: str, language: str, split: str, owner: str = "") -> bool:
    """Whether every sentence of informative length in a text belongs to the split.

    Args:
        text: some sentences.
        language: "en" or "ja".
        split: "train" or "held_out".
        owner: name of an entity whose facts are told in this split alone: what names it belongs here.
    """
    least = INFORMATIVE_CHARACTERS[language]
    if len(text) < least:
        return True
    return all(
        len(part) < least or (owner and owner in part) or split_of(part) == split for part in sentences(text, language)
    )


def tell(
    beat: Beat, values: Mapping[str, Any], language: str, style: str, split: str, dice: Dice, owner: str = ""
) -> str | None:
    """A wording of the beat that fits the split (see `fits`), or None when none does."""
    wordings = beat.wordings[style]
    start = dice.below(len(wordings))
    for step in range(min(len(wordings), 12)):
        text = wordings[(start + step) % len(wordings)].format_map(values)
        if fits(text, language, split, owner):
            return text
    return None


def join(parts: Sequence[tuple[str, bool]], language: str) -> str:
    """The told beats (text, begins a paragraph) as one document; Japanese speech stands on a line of its own."""
    text = ""
    for part, paragraph in parts:
        if not text:
            text = part
        elif paragraph:
            text += "\n" + part
        elif language == "en":
            text += " " + part
        else:
            text += ("\n" if part[0] == "「" or text[-1] == "」" else "") + part
    return text


def parse_beats(lines: Sequence[str]) -> tuple[Beat, ...]:
    """The beats of a part's lines."""
    beats: list[Beat] = []
    paragraph = False
    for line in lines:
        if not line:
            paragraph = bool(beats)
            continue
        optional, first = line.startswith("? "), line.startswith("! ")
        alternatives = (line[2:] if optional or first else line).split(" | ")
        wordings = {style: _wordings(alternatives, style) for style in STYLES}
        beats.append(Beat(wordings, optional, first, paragraph))
        paragraph = False
    return tuple(beats)


def _wordings(alternatives: Sequence[str], style: str) -> tuple[str, ...]:
    found = []
    for alternative in alternatives:
        styled = _STYLE.sub(lambda match: match[1 + STYLES.index(style)], alternative.strip())
        pieces = _CHOICE.split(styled)  # text, choices, text, choices, ..., text
        options = [[piece] if place % 2 == 0 else piece.split("/") for place, piece in enumerate(pieces)]
        found += ["".join(combination) for combination in itertools.product(*options)]
    if len(found) > _MOST_VARIANTS:
        raise ValueError(f"{len(found)} wordings of one beat, at most {_MOST_VARIANTS}: {alternatives[0]!r}")
    # Neighbours differ in their last choice alone: mix them, so that a search from any of them meets all kinds.
    return tuple(Dice("wordings", alternatives[0]).shuffled(found))


@dataclass(frozen=True)
class Block:
    """One "== ..." block: the words after the sign, the lines before the first part, and the parts."""

    head: tuple[str, ...]
    lines: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]


@cache
def read_blocks(path: Path) -> tuple[Block, ...]:
    """The blocks of a template file, in order; lines that begin with # are comments."""
    return tuple(_blocks(path.read_text(encoding="utf-8").splitlines()))


def _blocks(lines: Sequence[str]) -> Iterator[Block]:
    head: tuple[str, ...] = ()
    parts: dict[str, list[str]] = {"": []}
    name = ""
    for line in [*lines, "== end"]:
        if line.startswith("== "):
            if head:
                top = tuple(entry for entry in parts.pop("") if entry)
                yield Block(head, top, {part: tuple(_trim(entries)) for part, entries in parts.items()})
            head, parts, name = tuple(line.split()[1:]), {"": []}, ""
        elif line.startswith("-- "):
            name = line[3:].strip()
            parts[name] = []
        elif not line.startswith("#"):
            parts[name].append(line.strip())


def _trim(lines: Sequence[str]) -> Sequence[str]:
    end = len(lines)
    while end and not lines[end - 1]:
        end -= 1
    return lines[:end]
