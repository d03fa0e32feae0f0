"""The word lists of the world: terms that know their forms in both languages."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_cpt.data.world.english import EnglishClock, EnglishDate, EnglishNumber, article, capital, plural
from megatron_cpt.data.world.japanese import JapaneseClock, JapaneseDate, JapaneseNumber

LANGUAGES = ("en", "ja")
TEXT = Path(__file__).parent / "text"
ENTITY_KINDS = ("person", "town", "shop", "animal", "food")
_PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her"), "it": ("it", "its", "it")}


class Word(str):
    """A word of one language; `format(word, name)` gives the form of that name."""

    forms: Mapping[str, str]

    def __new__(cls, text: str, forms: Mapping[str, str]) -> Word:
        """A word with the forms a template may ask for."""
        word = super().__new__(cls, text)
        word.forms = forms
        return word

    def __format__(self, spec: str) -> str:
        return self.forms[spec] if spec else str(self)


@dataclass(frozen=True, eq=False)
class Term:
    """One thing with its name in both languages; two are the same when they are one object."""

    en: Word
    ja: Word


@dataclass(frozen=True)
class Clock:
    """A time of day, in minutes after midnight."""

    minutes: int

    def __add__(self, minutes: int) -> Clock:
        return Clock(self.minutes + minutes)


@dataclass(frozen=True)
class Entity:
    """Somebody or something invented that facts are told about; its name is the same in both languages.

    Args:
        kind: one of ENTITY_KINDS.
        name: Latin letters, unique in the world.
        gender: "he", "she" or "it", for English pronouns.
    """

    kind: str
    name: str
    gender: str

    @property
    def pronouns(self) -> tuple[str, str, str]:
        """English subject, possessive and object pronoun."""
        return _PRONOUNS[self.gender]


def view(value: Any, language: str) -> Any:
    """What a template of a language formats for a drawn value."""
    if isinstance(value, Term):
        return value.en if language == "en" else value.ja
    if isinstance(value, int):
        return EnglishNumber(value) if language == "en" else JapaneseNumber(value)
    if isinstance(value, datetime.date):
        return EnglishDate(value) if language == "en" else JapaneseDate(value)
    if isinstance(value, Clock):
        return EnglishClock(value.minutes) if language == "en" else JapaneseClock(value.minutes)
    raise TypeError(f"a template cannot format {value!r}")


@cache
def word_lists() -> dict[str, tuple[Term, ...]]:
    """Every word list by its kind, story people ("child", "adult", "somebody") and the towns included."""
    lists = {kind: tuple(_term(row) for row in rows) for kind, rows in _tables(TEXT / "words.txt").items()}
    people = _tables(TEXT / "names.txt")
    for kind in ("child", "adult"):
        lists[kind] = tuple(_story_person(row, kind) for row in people[kind])
    lists["somebody"] = lists["child"] + lists["adult"]
    lists["town"] = tuple(Term(Word(e.name, {}), Word(e.name, {})) for e in entities() if e.kind == "town")
    return lists


@cache
def entities() -> tuple[Entity, ...]:
    """Every invented entity the world tells facts about, in the order of the names file."""
    kinds = {"woman": ("person", "she"), "man": ("person", "he"), "he-animal": ("animal", "he")}
    kinds |= {"she-animal": ("animal", "she")} | {kind: (kind, "it") for kind in ("town", "shop", "food")}
    found = []
    for section, lines in _sections(TEXT / "names.txt").items():
        if section in kinds:
            kind, gender = kinds[section]
            found += [Entity(kind, name, gender) for line in lines for name in line.split()]
    return tuple(found)


def _sections(path: Path) -> dict[str, list[str]]:
    """Lines of a "[section] ..." file; what follows the bracket is the section's first line."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name, _, rest = line[1:].partition("]")
            lines = sections[name] = [rest.strip()] if rest.strip() else []
        elif line.strip() and not line.startswith("#"):
            lines.append(line.strip())
    return sections


def _tables(path: Path) -> dict[str, list[dict[str, str]]]:
    """The comma-separated tables among a file's sections: those whose first line names "en" and "ja"."""
    tables = {}
    for name, (header, *lines) in _sections(path).items():
        columns = [column.strip() for column in header.split(",")]
        if {"en", "ja"} <= set(columns):
            rows = [[cell.strip() for cell in line.split(",")] for line in lines]
            for row in rows:
                if len(row) != len(columns):
                    raise ValueError(
                        f"{path.name}, [{name}]: {', '.join(row)!r} has {len(row)} cells, not {len(columns)}"
                    )
            tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]
    return tables


def _term(row: Mapping[str, str]) -> Term:
    name = row["en"]
    english = {"a": article(name), "A": capital(article(name)), "C": capital(name)}
    if "s" in row:
        many = row["s"] or plural(name)
        english |= {"s": many, "S": capital(many)}
    japanese = {"c": row["c"]} if "c" in row else {}
    for column, cell in row.items():
        language, dot, form = column.partition(".")
        if dot and language == "en":
            english |= {form: cell, f"{form}.a": article(cell), f"{form}.C": capital(cell)}
        elif dot:
            japanese[form] = cell
    return Term(Word(name, english), Word(row["ja"], japanese))


def _story_person(row: Mapping[str, str], kind: str) -> Term:
    subject, possessive, object_form = _PRONOUNS[row["gender"]]
    male = subject == "he"
    forms = {"he": subject, "He": capital(subject), "his": possessive, "His": capital(possessive), "him": object_form}
    forms |= {"himself": "himself" if male else "herself", "boy": "boy" if male else "girl"}
    forms |= {"son": "son" if male else "daughter", "brother": "brother" if male else "sister"}
    name = row["ja"]
    polite = name + ("さん" if kind == "adult" else "くん" if male else "ちゃん")
    japanese = {"さん": polite, "男の子": "男の子" if male else "女の子", "息子": "息子" if male else "娘"}
    japanese |= {"兄": "兄" if male else "姉", "弟": "弟" if male else "妹"}
    japanese["私"] = "ぼく" if male and kind == "child" else "私"
    return Term(Word(row["en"], forms), Word(name, japanese))
