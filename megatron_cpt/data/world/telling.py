"""Documents that tell facts: a portrait of one entity, a list, questions and answers, a talk."""

from __future__ import annotations

from functools import cache

from megatron_cpt.data.world.english import capital
from megatron_cpt.data.world.knowledge import Attribute, Fact, Knowledge, attributes, openings, slots
from megatron_cpt.data.world.templates import STYLES, Beat, Dice, fits, join, parse_beats, read_blocks, tell
from megatron_cpt.data.world.words import LANGUAGES, TEXT, Entity, view, word_lists

_ENTITY_WEIGHTS = ("person",) * 5 + ("town",) * 3 + ("shop", "animal") * 2 + ("food",) * 2
_ASK_MARKS = {
    "en": (("Question: ", "Answer: "), ("Q: ", "A: "), ("", "")),
    "ja": (("質問：", "答え："), ("問い：", "答え："), ("", "")),
}


def write_facts(knowledge: Knowledge, language: str, split: str, dice: Dice) -> str | None:
    """One document of facts of the split."""
    form = dice.pick((_portrait, _portrait, _portrait, _row, _row, _questions, _questions, _talk))
    return form(knowledge, language, split, dice)


def _entity(knowledge: Knowledge, split: str, dice: Dice) -> Entity:
    return dice.pick(knowledge.entities(dice.pick(_ENTITY_WEIGHTS), split))


def _chosen(facts: tuple[Fact, ...], count: int, dice: Dice) -> list[Fact]:
    """Some facts in random order; the English-only ones, if these are among them, are always told."""
    mixed = dice.shuffled(facts)
    hidden = [fact for fact in mixed if fact.english_only]
    return dice.shuffled((hidden + [fact for fact in mixed if not fact.english_only])[: max(count, len(hidden))])


def _sentence(fact: Fact, language: str, style: str, split: str, named: bool, dice: Dice) -> str | None:
    values = slots(fact, language, named)
    beats = fact.attribute.statements[language]
    for beat in dice.shuffled(beats):
        text = tell(beat, values, language, style, split, dice, fact.entity.name)
        if text is not None:
            return text
    return None


def _portrait(knowledge: Knowledge, language: str, split: str, dice: Dice) -> str | None:
    """Several facts about one entity, or about two one after the other."""
    style = dice.pick(STYLES)
    parts: list[tuple[str, bool]] = []
    for count in range(1 + dice.below(2)):
        entity = _entity(knowledge, split, dice)
        opening = dice.pick(openings()[entity.kind, language])
        values = {"n": entity.name, **dict(zip(("x", "xs", "xo"), entity.pronouns, strict=True))}
        first = tell(opening, values, language, style, split, dice, entity.name) if dice.below(3) else None
        if first:
            parts.append((first, count > 0))
        begins = first is None
        for fact in _chosen(knowledge.about(entity, language), 4 + dice.below(4), dice):
            named = begins or dice.below(5) < 3
            text = _sentence(fact, language, style, split, named, dice)
            if text:
                parts.append((text, begins and count > 0))
                begins = False
    return join(parts, language)


def _row(knowledge: Knowledge, language: str, split: str, dice: Dice) -> str | None:
    """One or two attributes of several entities."""
    style = dice.pick(STYLES)
    kind = dice.pick(_ENTITY_WEIGHTS)
    wanted = dice.shuffled(attributes()[kind])[: 1 + dice.below(2)]
    members = dice.shuffled(knowledge.entities(kind, split))[: 5 + dice.below(5)]
    new_lines = dice.below(2) == 0
    parts: list[tuple[str, bool]] = []
    for entity in members:
        for fact in _of(knowledge, entity, wanted, language):
            text = _sentence(fact, language, style, split, True, dice)
            if text:
                parts.append((text, new_lines))
    return join(parts, language)


def _of(knowledge: Knowledge, entity: Entity, wanted: list[Attribute], language: str) -> list[Fact]:
    return [fact for fact in knowledge.about(entity, language) if fact.attribute in wanted]


def _pairs(fact: Fact, language: str, dice: Dice) -> list[tuple[str, str]]:
    """Every question about a fact with every answer to it, in random order."""
    values = slots(fact, language)
    asked = fact.attribute.questions[language]
    texts = [(question.format_map(values), answer.format_map(values)) for question, given in asked for answer in given]
    return dice.shuffled([(question, capital(answer)) for question, answer in texts])


def _questions(knowledge: Knowledge, language: str, split: str, dice: Dice) -> str | None:
    """Questions with their answers, about one entity or about many."""
    before_question, before_answer = dice.pick(_ASK_MARKS[language])
    if dice.below(2):
        facts = _chosen(knowledge.about(_entity(knowledge, split, dice), language), 7, dice)
    else:
        facts = [dice.pick(knowledge.about(_entity(knowledge, split, dice), language)) for _ in range(8)]
    parts: list[tuple[str, bool]] = []
    for fact in dict.fromkeys(facts):
        for question, answer in _pairs(fact, language, dice):
            lines = f"{before_question}{question}\n{before_answer}{answer}"
            if fits(lines, language, split, fact.entity.name):
                parts.append((lines, True))
                break
    return join(parts, language)


def _talk(knowledge: Knowledge, language: str, split: str, dice: Dice) -> str | None:
    """Two people of the stories ask and answer."""
    style = dice.pick(STYLES)
    speakers = dice.shuffled(word_lists()[dice.pick(("child", "adult"))])[:2]
    parts: list[tuple[str, bool]] = []
    for fact in _chosen(knowledge.about(_entity(knowledge, split, dice), language), 5, dice):
        if dice.below(3) == 0:
            speakers.reverse()
        question, answer = _pairs(fact, language, dice)[0]
        values = {"a": view(speakers[0], language), "b": view(speakers[1], language)}
        values |= {"q": question.rstrip("。"), "r": answer.rstrip("。.")}
        for beat in dice.shuffled(_talk_beats()[language]):
            text = tell(beat, values, language, style, split, dice, fact.entity.name)
            if text is not None:
                parts.append((text, True))
                break
    return join(parts, language)


@cache
def _talk_beats() -> dict[str, tuple[Beat, ...]]:
    (block,) = read_blocks(TEXT / "talk.txt")
    return {language: parse_beats(block.parts[language]) for language in LANGUAGES}
