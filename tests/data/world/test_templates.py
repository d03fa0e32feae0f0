"""The text files: every wording can be filled in, and every scene can be told in both splits."""

import pytest

from megatron_cpt.data.world.knowledge import Knowledge, attributes, openings, slots
from megatron_cpt.data.world.scenes import scenes
from megatron_cpt.data.world.templates import STYLES, Dice, fits, parse_beats, sentences, split_of, tell
from megatron_cpt.data.world.words import LANGUAGES, entities, view, word_lists


def test_there_are_several_hundred_templates_in_each_language():
    for language in LANGUAGES:
        statements = [beat for group in attributes().values() for a in group for beat in a.statements[language]]
        beats = [beat for scene in scenes() for beat in scene.beats[language]]
        assert len(statements) > 150
        assert sum(len(beat.wordings["polite"]) for beat in beats) > 1000


@pytest.mark.parametrize("scene", scenes(), ids=lambda scene: scene.name)
def test_every_wording_of_a_scene_can_be_filled_in(scene):
    for language in LANGUAGES:
        drawn = scene.draw("train", Dice("test", scene.name))
        values = {name: view(value, language) for name, value in drawn.items()}
        for beat in scene.beats[language]:
            for style in STYLES:
                for wording in beat.wordings[style]:
                    assert "{" not in wording.format_map(values)


@pytest.mark.parametrize("scene", scenes(), ids=lambda scene: scene.name)
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_scene_can_be_told_in_both_splits(scene, language, split):
    told = [scene.write(language, split, Dice("test", scene.name, number)) for number in range(60)]
    assert sum(text is not None and len(text.encode()) >= 200 for text in told) >= 3


def test_every_fact_can_be_told_in_every_wording():
    names = {entity.name for entity in entities()}
    assert len(names) == len(entities())
    for fact in Knowledge(0).facts:
        for language in LANGUAGES:
            for named in (True, False):
                values = slots(fact, language, named)
                for beat in fact.attribute.statements[language]:
                    for style in STYLES:
                        assert all(wording.format_map(values) for wording in beat.wordings[style])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_cloze_is_the_beginning_of_a_statement(language):
    for fact in Knowledge(0).facts:
        prompt, answer = (part.format_map(slots(fact, language)) for part in fact.attribute.cloze[language])
        link = " " if language == "en" else ""
        told = [
            wording.format_map(slots(fact, language))
            for beat in fact.attribute.statements[language]
            for wording in beat.wordings["polite"]
        ]
        assert any(statement.startswith(prompt + link + answer) for statement in told), prompt


def test_openings_exist_for_every_kind_and_language():
    assert set(openings()) == {(kind, language) for kind in attributes() for language in LANGUAGES}


def test_word_lists_hold_no_word_twice():
    for kind, terms in word_lists().items():
        for language in LANGUAGES:
            words = [str(getattr(term, language)) for term in terms]
            assert len(set(words)) == len(words), kind


def test_styles_choices_and_alternatives_are_told_apart():
    (beat,) = parse_beats(["<a/b>{x}[です/だ]。 | c[/!]"])
    assert set(beat.wordings["polite"]) == {"a{x}です。", "b{x}です。", "c"}
    assert set(beat.wordings["plain"]) == {"a{x}だ。", "b{x}だ。", "c!"}


def test_a_beat_is_told_in_its_own_split_only():
    (beat,) = parse_beats(["{x} is a sentence of informative length, is it not?"])
    for number in range(50):
        told = {split: tell(beat, {"x": number}, "en", "plain", split, Dice(number)) for split in ("train", "held_out")}
        assert sorted(text is None for text in told.values()) == [False, True]


def test_sentences_are_compared_without_quotes_and_short_ones_are_free():
    text = '"This is the first long sentence of all," she said. "No." "This is the second one, and it is long."'
    assert sentences(text, "en") == [
        'This is the first long sentence of all," she said.',
        "No.",
        "This is the second one, and it is long.",
    ]
    assert sentences("「はい？」と言った。終わり。", "ja") == ["はい？", "と言った。", "終わり。"]
    long = "これは長い文なので、どちらか一方にしか入りません。"
    assert fits("短い。", "ja", "train") and fits("短い。", "ja", "held_out")
    assert fits(long, "ja", split_of(long)) and not fits(
        long + "短い。", "ja", {"train", "held_out"}.difference({split_of(long)}).pop()
    )
