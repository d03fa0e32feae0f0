"""The world's public face: documents of both languages, and the probe between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.data.documents import Document
from megatron_cpt.data.world.knowledge import Fact, Knowledge, slots
from megatron_cpt.data.world.scenes import Scene, scenes
from megatron_cpt.data.world.telling import write_facts
from megatron_cpt.data.world.templates import SPLITS, Dice
from megatron_cpt.data.world.words import LANGUAGES, view, word_lists
from megatron_cpt.errors import DataError

LEAST_BYTES, MOST_BYTES = 200, 1200
_FACT_SHARE, _STORY_SHARE = 45, 32  # of 100 documents; the rest are lists
_ATTEMPTS = 1000
_NUM_DISTRACTORS = 3


@dataclass(frozen=True)
class ProbeItem:
    """A fact that only English documents tell, asked in Japanese.

    Args:
        prompt: Japanese text that ends right before the answer.
        answer: the Japanese answer.
        distractors: three other answers of the same kind.
        fact: the English statement of the fact.
        source_prompt: the same question in English, a text that ends right before " " and the answer.
        source_answer: the English answer.
        source_distractors: the distractors in English, in the same order.
    """

    prompt: str
    answer: str
    distractors: list[str]
    fact: str
    source_prompt: str
    source_answer: str
    source_distractors: list[str]


class World:
    """A small invented world, told in English and in Japanese.

    Documents of the two languages are written independently: neither translates the other, but most facts
    are told in both. Document number i of a language and a split is a pure function of (seed, language,
    split, i), so there is no end to them.

    The splits are disjoint in facts: an entity's facts, and the problems and dates of the lists, belong to
    one split by a hash. They are disjoint in sentences: one of informative length (32 characters in English,
    16 in Japanese) belongs to the split of the entity whose fact it tells by name, any other to one by a hash
    of its text, and a document holds sentences of its own split alone. No hash contains the seed, so the
    held-out documents of one seed are disjoint from the train documents of every other.

    Args:
        seed: any whole number.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.knowledge = Knowledge(seed)
        self._stories = tuple(scene for scene in scenes() if scene.kind == "story")
        self._lists = tuple(scene for scene in scenes() if scene.kind == "list")

    def documents(self, language: str, count: int, split: str = "train") -> Iterator[Document]:
        """The first `count` documents of a language and a split, 200 to 1200 bytes each.

        Args:
            language: "en" or "ja".
            count: number of documents.
            split: "train" or "held_out".

        Raises:
            DataError: an unknown language or split.
        """
        _expect("language", language, LANGUAGES)
        _expect("split", split, SPLITS)
        return (self._document(language, split, number) for number in range(count))

    def _document(self, language: str, split: str, number: int) -> Document:
        dice = Dice("document", self.seed, language, split, number)
        name = f"world-{self.seed}-{language}-{split}-{number}"
        for _ in range(_ATTEMPTS):
            text = self._text(language, split, dice)
            if text and LEAST_BYTES <= len(text.encode()) <= MOST_BYTES:
                return Document(text, language, f"world:{self.seed}", name)
        raise AssertionError(f"no text for {name} in {_ATTEMPTS} attempts: the text files offer too few wordings")

    def _text(self, language: str, split: str, dice: Dice) -> str | None:
        kind = dice.below(100)
        if kind < _FACT_SHARE:
            return write_facts(self.knowledge, language, split, dice)
        scene: Scene = dice.pick(self._stories if kind < _FACT_SHARE + _STORY_SHARE else self._lists)
        for _ in range(20):  # the same scene again, or scenes with few wordings would be rare
            text = scene.write(language, split, dice)
            if text and LEAST_BYTES <= len(text.encode()) <= MOST_BYTES:
                return text
        return None

    def probe(self, count: int | None = None) -> list[ProbeItem]:
        """Facts that English train documents tell and no Japanese document does, asked in Japanese.

        The answer's words are told in Japanese about other entities, in the prompt's own wording.

        Args:
            count: how many (None: all there are).

        Raises:
            DataError: the world has fewer.
        """
        facts = [fact for fact in self.knowledge.facts if fact.english_only]
        if count is not None and count > len(facts):
            raise DataError(f"a probe of {count} items: the world has {len(facts)} English-only facts; ask for fewer")
        dice = Dice("probe", self.seed)
        return [_probe_item(fact, dice) for fact in dice.shuffled(facts)[:count]]


def _probe_item(fact: Fact, dice: Dice) -> ProbeItem:
    others = [value for value in word_lists()[fact.attribute.values] if value is not fact.value]
    distractors = dice.shuffled(others)[:_NUM_DISTRACTORS]
    prompts, answers, wrong = {}, {}, {}
    for language in LANGUAGES:
        prompt, template = fact.attribute.cloze[language]
        prompts[language] = prompt.format_map(slots(fact, language))
        answers[language] = template.format(v=view(fact.value, language))
        wrong[language] = [template.format(v=view(value, language)) for value in distractors]
    statement = f"{prompts['en']} {answers['en']}."
    return ProbeItem(prompts["ja"], answers["ja"], wrong["ja"], statement, prompts["en"], answers["en"], wrong["en"])


def _expect(what: str, got: str, expected: tuple[str, ...]) -> None:
    if got not in expected:
        raise DataError(f"the built-in world has no {what} {got!r}; expected one of {', '.join(expected)}")
