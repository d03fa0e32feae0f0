"""The probe: told in English train documents, never in Japanese, and not answerable by a prior."""

import re
from collections import Counter, defaultdict
from functools import cache

import pytest

from megatron_cpt.data.world import World
from megatron_cpt.errors import DataError

SEED = 3


@cache
def documents(language, split="train"):
    return [document.text for document in World(SEED).documents(language, 4000, split)]


def by_name(texts, marks):
    """Name -> the sentences that hold it; a question is one with its answer."""
    found = defaultdict(list)
    for text in texts:
        text = re.sub(r"([?？])\s|(?<=か。)\n", r"\1 ", text)
        for sentence in re.split(rf"(?<=[{marks}])\s*|\n", text):
            for name in set(re.findall(r"[A-Z][a-z]+", sentence)):
                found[name].append(sentence)
    return found


def name_of(item):
    return re.match(r"[A-Za-z]+", item.prompt)[0]


def test_a_probe_has_four_different_choices_of_one_kind():
    items = World(SEED).probe()
    assert len(items) > 200
    assert len({item.prompt for item in items}) == len(items)
    for item in items:
        for answer, distractors in ((item.answer, item.distractors), (item.source_answer, item.source_distractors)):
            assert len(distractors) == 3 and len({answer, *distractors}) == 4
        assert item.fact == f"{item.source_prompt} {item.source_answer}."
        assert not item.prompt.endswith((" ", "。")) and item.source_answer in item.fact
    assert World(SEED).probe(50) == items[:50] != World(SEED + 1).probe(50)


def test_english_train_documents_tell_each_fact_in_several_wordings():
    told, wordings = by_name(documents("en"), ".!?"), []
    for item in World(SEED).probe():
        value = re.sub(r"^an? ", "", item.source_answer)
        tellings = [sentence for sentence in told[name_of(item)] if value in sentence]
        assert len(tellings) >= 4 and len(set(tellings)) >= 4, item.fact
        wordings.append(len(set(tellings)))
    assert sum(wordings) > 6 * len(wordings)


def test_no_japanese_document_tells_a_fact_of_the_probe():
    told = {split: by_name(documents("ja", split), "。！") for split in ("train", "held_out")}
    for item in World(SEED).probe():
        for split in told:
            assert not [sentence for sentence in told[split][name_of(item)] if item.answer in sentence], item
        assert not any(item.prompt in text for text in told["train"][name_of(item)])


def test_japanese_documents_know_every_name_and_most_answers_in_the_wording_of_the_prompt():
    whole = "\n".join(documents("ja"))
    items = World(SEED).probe()
    assert all(whole.count(name_of(item)) >= 5 for item in items)
    assert all(whole.count(item.answer) >= 5 for item in items)
    known = [item.prompt.removeprefix(name_of(item)) + item.answer in whole for item in items]
    assert sum(known) > 0.9 * len(known)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_prior_over_the_answers_does_not_solve_the_probe(seed):
    """Always taking the most frequent or the longest choice is right about one time in four."""
    items = World(seed).probe()
    whole = "\n".join(document.text for document in World(seed).documents("ja", 2000))
    by_attribute = defaultdict(Counter)
    for item in items:
        attribute = item.prompt.removeprefix(name_of(item))
        by_attribute[attribute][item.answer] += 1
    assert all(max(counts.values()) - min(counts.values()) <= 1 for counts in by_attribute.values())
    for score in (
        lambda item, choice: whole.count(item.prompt.removeprefix(name_of(item)) + choice),
        lambda item, choice: whole.count(choice),
        lambda item, choice: len(choice),
        lambda item, choice: -len(choice),
    ):
        right = 0.0
        for item in items:
            best = max(score(item, choice) for choice in (item.answer, *item.distractors))
            ties = [choice for choice in (item.answer, *item.distractors) if score(item, choice) == best]
            right += (item.answer in ties) / len(ties)
        assert 0.15 < right / len(items) < 0.35


def test_more_items_than_there_are_is_refused():
    with pytest.raises(DataError, match="English-only facts"):
        World(1).probe(10_000)
