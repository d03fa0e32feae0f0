"""What a world knows: the facts about its entities, who may tell them, and which only English tells."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_cpt.data.world.templates import Beat, Dice, parse_beats, read_blocks
from megatron_cpt.data.world.words import ENTITY_KINDS, LANGUAGES, TEXT, Entity, Term, entities, view, word_lists

ENGLISH_ONLY_PER_ENTITY = 2
_HELD_OUT_SHARE = 5  # one entity in so many


@dataclass(frozen=True, eq=False)
class Attribute:
    """One kind of fact, such as a person's favorite color, with its wordings.

    Args:
        kind: the kind of entity that has it.
        name: unique within the kind.
        values: the word list its values come from.
        statements: language -> wordings.
        questions: language -> (question, answers).
        cloze: language -> the text before the value and the value's own template.
    """

    kind: str
    name: str
    values: str
    statements: Mapping[str, tuple[Beat, ...]]
    questions: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]
    cloze: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Fact:
    """One entity's value of one attribute.

    Args:
        entity: whom it is about.
        attribute: what it says.
        value: the value's term.
        split: the only split whose documents tell it.
        english_only: no Japanese document tells it.
    """

    entity: Entity
    attribute: Attribute
    value: Term
    split: str
    english_only: bool


@cache
def attributes() -> Mapping[str, tuple[Attribute, ...]]:
    """The attributes of every kind of entity."""
    found: dict[str, list[Attribute]] = {kind: [] for kind in ENTITY_KINDS}
    for block in read_blocks(TEXT / "facts.txt"):
        kind, dot, name = block.head[0].partition(".")
        if not dot:
            continue
        clozes = dict(zip(LANGUAGES, block.parts["cloze"], strict=True))
        found[kind].append(
            Attribute(
                kind,
                name,
                block.head[1],
                {language: parse_beats(block.parts[language]) for language in LANGUAGES},
                {language: _questions(block.parts[f"{language} ask"]) for language in LANGUAGES},
                {language: _cut(cloze) for language, cloze in clozes.items()},
            )
        )
    return {kind: tuple(group) for kind, group in found.items()}


@cache
def openings() -> Mapping[tuple[str, str], tuple[Beat, ...]]:
    """First sentences of texts about one entity, by (kind, language)."""
    return {
        (block.head[0], language): parse_beats(block.parts[language])
        for block in read_blocks(TEXT / "facts.txt")
        if "." not in block.head[0]
        for language in LANGUAGES
    }


def _questions(lines: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    rows = [line.split(" | ") for line in lines if line]
    return tuple((question, tuple(answers)) for question, *answers in rows)


def _cut(cloze: str) -> tuple[str, str]:
    place = cloze.index("{v")
    return cloze[:place].rstrip(), cloze[place:]


@cache
def held_out_entities() -> frozenset[str]:
    """Names of the entities whose facts only held-out documents tell: one in five of each kind, by hash."""
    chosen: set[str] = set()
    for kind in ENTITY_KINDS:
        names = sorted(
            (e.name for e in entities() if e.kind == kind), key=lambda n: hashlib.sha256(n.encode()).digest()
        )
        chosen.update(names[: len(names) // _HELD_OUT_SHARE])
    return frozenset(chosen)


class Knowledge:
    """Every fact of one world.

    Which entities are held out does not depend on the seed; which facts are English-only and what their
    values are does. Among the English-only facts of an attribute, among the other train facts and among the
    held-out ones, all values occur equally often (give or take one), so that no value is likely by itself.
    """

    def __init__(self, seed: int):
        facts: list[Fact] = []
        for kind, group in attributes().items():
            facts += _facts_of_kind(kind, group, Dice("knowledge", seed, kind))
        self.facts = tuple(facts)
        self._by_entity: dict[str, tuple[Fact, ...]] = {
            entity.name: tuple(fact for fact in facts if fact.entity is entity) for entity in entities()
        }

    def entities(self, kind: str, split: str) -> tuple[Entity, ...]:
        """The entities of a kind whose facts the split tells."""
        held_out = held_out_entities()
        return tuple(e for e in entities() if e.kind == kind and (e.name in held_out) == (split == "held_out"))

    def about(self, entity: Entity, language: str) -> tuple[Fact, ...]:
        """What documents of a language may tell about an entity."""
        return tuple(fact for fact in self._by_entity[entity.name] if language == "en" or not fact.english_only)


def _facts_of_kind(kind: str, group: tuple[Attribute, ...], dice: Dice) -> list[Fact]:
    members = [entity for entity in dice.shuffled(entities()) if entity.kind == kind]
    held_out = held_out_entities()
    trained = [entity for entity in members if entity.name not in held_out]
    hidden = {
        (entity.name, (ENGLISH_ONLY_PER_ENTITY * place + step) % len(group))
        for place, entity in enumerate(trained)
        for step in range(ENGLISH_ONLY_PER_ENTITY)
    }
    facts = []
    for place, attribute in enumerate(group):
        groups = (
            ("train", True, [entity for entity in trained if (entity.name, place) in hidden]),
            ("train", False, [entity for entity in trained if (entity.name, place) not in hidden]),
            ("held_out", False, [entity for entity in members if entity.name in held_out]),
        )
        for split, english_only, about in groups:
            values = _evenly(word_lists()[attribute.values], len(about), dice)
            facts += [
                Fact(entity, attribute, value, split, english_only) for entity, value in zip(about, values, strict=True)
            ]
    return facts


def _evenly(values: tuple[Term, ...], count: int, dice: Dice) -> list[Term]:
    dealt: list[Term] = []
    while len(dealt) < count:
        dealt += dice.shuffled(values)
    return dice.shuffled(dealt[:count])


def slots(fact: Fact, language: str, named: bool = True) -> dict[str, Any]:
    """Slot values for a fact's wordings, with its entity's name (or a pronoun; in Japanese, nothing)."""
    name = fact.entity.name
    values: dict[str, Any] = {"n": name, "v": view(fact.value, language)}
    if language == "ja":
        return values | {"は": f"{name}は" if named else "", "の": f"{name}の" if named else ""}
    subject, possessive, object_form = fact.entity.pronouns
    capitals = (name, f"{name}'s") if named else (subject.capitalize(), possessive.capitalize())
    return values | {"x": subject, "xs": possessive, "xo": object_form, "X": capitals[0], "Xs": capitals[1]}
