"""Scenes: stories told in order and lists of single statements, with the values their slots draw."""

from __future__ import annotations

import datetime
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_cpt.data.world.templates import (
    STYLES,
    Beat,
    Block,
    Dice,
    join,
    parse_beats,
    read_blocks,
    split_of,
    tell,
)
from megatron_cpt.data.world.words import LANGUAGES, TEXT, Clock, Term, view, word_lists

Values = dict[str, Any]
Step = Callable[[Values, Dice], bool]  # adds a value; False when the values drawn so far cannot stand together
_FIRST_DAY, _NUM_DAYS = datetime.date(2001, 1, 1), 10_957  # thirty years
_STEP = re.compile(r"(\w+)(:|<|!=|=)(.+)")
_TERM = re.compile(r"(\w+)([+*%-]|//)(\w+)")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}
_DRAWS = 40  # of values, until a constraint holds


@dataclass(frozen=True)
class Scene:
    """A kind of text: its slots and its beats in each language.

    Args:
        name: unique name.
        kind: "story" (every beat in order) or "list" (some beats, each with values of its own).
        steps: how the values are drawn, in order.
        fact: a key over the values, such as "{a}+{b}", that assigns them to a split; "" when there is none.
        beats: language -> beats.
    """

    name: str
    kind: str
    steps: tuple[Step, ...]
    fact: str
    beats: Mapping[str, tuple[Beat, ...]]

    def draw(self, split: str, dice: Dice) -> Values | None:
        """Values for the slots, of the split by their fact; None when too many draws failed."""
        for _ in range(_DRAWS):
            values: Values = {}
            if all(step(values, dice) for step in self.steps) and (
                not self.fact or split_of(self.fact.format_map(_views(values, "en"))) == split
            ):
                return values
        return None

    def write(self, language: str, split: str, dice: Dice) -> str | None:
        """One document, or None when no wording fitted the split for these values."""
        style = dice.pick(STYLES)
        return (self._story if self.kind == "story" else self._list)(language, style, split, dice)

    def _story(self, language: str, style: str, split: str, dice: Dice) -> str | None:
        values = self.draw(split, dice)
        if values is None:
            return None
        views = _views(values, language)
        parts = []
        for beat in self.beats[language]:
            if beat.optional and dice.below(3) == 0:
                continue
            text = tell(beat, views, language, style, split, dice)
            if text is not None:
                parts.append((text, beat.paragraph))
            elif not beat.optional:
                return None
        return join(parts, language)

    def _list(self, language: str, style: str, split: str, dice: Dice) -> str | None:
        beats = self.beats[language]
        wanted = 5 + dice.below(6)
        new_lines = dice.below(3) == 0
        first = [beat for beat in beats if beat.first]
        parts: list[tuple[str, bool]] = []
        for beat in first + dice.shuffled([beat for beat in beats if not beat.first]) * 2:
            values = self.draw(split, dice)
            text = values and tell(beat, _views(values, language), language, style, split, dice)
            if text and (text, new_lines) not in parts:
                parts.append((text, new_lines))
            if len(parts) == wanted:
                break
        return join(parts, language)


@cache
def scenes() -> tuple[Scene, ...]:
    """Every scene of the text files, in the order of their names."""
    found = [
        _scene(block, folder.rstrip("s").replace("storie", "story"))
        for folder in ("lists", "stories")
        for path in sorted((TEXT / folder).glob("*.txt"))
        for block in read_blocks(path)
    ]
    return tuple(sorted(found, key=lambda scene: scene.name))


def _scene(block: Block, kind: str) -> Scene:
    steps: list[Step] = []
    fact = ""
    for line in block.lines:
        what, _, rest = line.partition(" ")
        if what == "draw":
            steps += [_step(text) for text in rest.split()]
        elif what == "fact":
            fact = rest
        else:
            raise ValueError(f"scene {block.head[0]}: {line!r} begins with neither draw nor fact")
    beats = {language: parse_beats(block.parts[language]) for language in LANGUAGES}
    return Scene(block.head[0], kind, tuple(steps), fact, beats)


def _views(values: Values, language: str) -> Values:
    return {name: view(value, language) for name, value in values.items()}


def _step(text: str) -> Step:
    """A step from "name:kind", "name=a+b", "a<b" or "a!=b"."""
    match = _STEP.fullmatch(text)
    if match is None:
        raise ValueError(f"cannot read the draw {text!r}")
    name, sign, rest = match.groups()
    if sign == ":":
        return _drawn(name, rest)
    if sign == "=":
        return _derived(name, rest)
    compare: Callable[[Any, Any], bool] = operator.lt if sign == "<" else operator.ne

    def check(values: Values, dice: Dice) -> bool:
        return compare(_value(values, name), _value(values, rest))

    return check


def _value(values: Values, text: str) -> Any:
    return int(text) if text.isdigit() else values[text]


def _derived(name: str, rest: str) -> Step:
    match = _TERM.fullmatch(rest)
    if match is None:
        raise ValueError(f"cannot read the value {rest!r} of {name!r}")
    left, sign, right = match.groups()

    def derive(values: Values, dice: Dice) -> bool:
        one, other = _value(values, left), _value(values, right)
        if isinstance(one, datetime.date) and not isinstance(other, datetime.date):
            other = datetime.timedelta(other)
        values[name] = _OPERATORS[sign](one, other)
        return True

    return derive


def _drawn(name: str, kind: str) -> Step:
    options: tuple[Any, ...]
    if kind in word_lists():
        options = word_lists()[kind]
    elif kind == "date":
        options = tuple(_FIRST_DAY + datetime.timedelta(day) for day in range(_NUM_DAYS))
    elif kind.startswith("clock"):  # clock8-12: from 8:00 to 12:00, in steps of five minutes
        low, high = map(int, kind[5:].split("-"))
        options = tuple(Clock(minutes) for minutes in range(low * 60, high * 60 + 1, 5))
    elif "," in kind:
        options = tuple(int(number) for number in kind.split(","))
    else:
        bounds, _, step = kind.partition("/")
        low, high = map(int, bounds.split("-"))
        options = tuple(range(low, high + 1, int(step or 1)))

    def draw(values: Values, dice: Dice) -> bool:
        value = dice.pick(options)
        while isinstance(value, Term) and value in values.values():
            value = dice.pick(options)
        values[name] = value
        return True

    return draw
