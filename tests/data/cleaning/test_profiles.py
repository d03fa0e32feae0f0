"""Profiles that come with the package, profiles of a user, and how documents are held against them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data import _native
from megatron_cpt.data.cleaning.normalise import STEPS
from megatron_cpt.data.cleaning.profiles import Rule, load_profile, profile_names
from megatron_cpt.data.cleaning.rules import judge
from megatron_cpt.errors import ConfigError

SWALLOW = {
    "characters": (400, None),
    "duplicate_lines": (None, 0.30),
    "duplicate_sentences": (None, 0.30),
    "duplicate_line_characters": (None, 0.20),
    "duplicate_sentence_characters": (None, 0.20),
    "top_2gram": (None, 0.20),
    "top_3gram": (None, 0.18),
    "top_4gram": (None, 0.16),
    **{f"repeated_{n}gram": (None, round(0.20 - n / 100, 2)) for n in range(5, 11)},
    "hiragana_of_japanese": (0.2, None),
    "katakana_of_japanese": (None, 0.5),
    "japanese_share": (0.5, None),
    "japanese_characters": (400, None),
    "sentence_length_mean": (20, 90),
    "sentence_length_max": (None, 200),
    "ellipsis_sentence_share": (None, 0.2),
}


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_and_explains_itself(name: str) -> None:
    profile = load_profile(name).config
    assert profile.about and profile.deviations and profile.duplicates is not None
    assert set(profile.normalise) <= STEPS.keys() - {"nfkc"}  # which changes text too much to be anybody's default
    assert all(len(rule.reason) > 10 for rule in profile.active_rules.values())


def test_japanese_web_has_the_published_thresholds() -> None:
    rules = load_profile("ja-web").config.active_rules.values()
    assert {rule.metric: (rule.at_least, rule.at_most) for rule in rules} == SWALLOW


def test_a_profile_extends_another_and_is_changed_by_hand(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: ja-web\nabout: mine\nrules: {short: {at_least: 10}, long_sentence: null}\n")
    profile = load_profile(mine, ["rules.few_hiragana.at_least=0.1", "duplicates=null"]).config
    assert profile.rules["short"].at_least == 10 and profile.rules["short"].reason
    assert profile.rules["few_hiragana"].at_least == 0.1
    assert "long_sentence" not in profile.active_rules and "katakana_of_japanese" in str(profile.active_rules)
    assert profile.duplicates is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rules.short.metric=charcters", "did you mean 'characters'"),
        ("rules.short.at_leest=1", "did you mean rules.short.at_least"),
        ("rules.short.at_least=long", "expected number"),
        ("rules.short.at_least=null", "neither at_least nor at_most"),
        ("rules.short.at_most=1", "no text could stay"),
        ("normalise=[nfcc]", "did you mean 'nfc'"),
        ("duplicates.threshold=0", "greater than 0"),
        ("scorers.characters={use: kenlm}", "choose another name"),
        ("rules.known={metric: stop_words, at_least: 1, reason: none}", "stop_words: a rule counts them"),
    ],
)
def test_what_cannot_mean_anything_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile("ja-web", [override])


def test_an_unknown_profile_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean the profile 'ja-web'"):
        load_profile("ja_web")


def test_verdicts_are_those_of_the_first_rule_broken() -> None:
    draw = random.Random(3)
    documents, names = 200, ["a", "b", "c"]
    metrics = {name: np.array([draw.choice([0.0, 0.5, 1.0, math.nan]) for _ in range(documents)]) for name in names}
    rules = {
        "low": Rule(metric="a", at_least=0.5, reason="-"),
        "both": Rule(metric="b", at_least=0.5, at_most=0.5, reason="-"),
        "high": Rule(metric="c", at_most=0.5, reason="-"),
    }
    verdicts, broken = judge(metrics, rules, documents)
    for document in range(documents):
        a, b, c = (metrics[name][document] for name in names)
        holds = [a >= 0.5, b == 0.5, c <= 0.5]
        assert broken[:, document].tolist() == [not fine for fine in holds]
        assert verdicts[document] == (holds.index(False) + 1 if False in holds else 0)


def test_without_rules_everything_stays() -> None:
    verdicts, broken = judge({}, {}, 3)
    assert verdicts.tolist() == [0, 0, 0] and broken.shape == (0, 3)


def test_novels_stay_under_prose_and_go_under_web() -> None:
    """Why there are two profiles for Japanese."""
    sentence = "".join(chr(0x3042 + (k * 7) % 80) for k in range(230)) + "。"
    dialogue = "".join(f"「{chr(0x4E00 + k)}だ。」\n" for k in range(150))
    metrics = _native.text_metrics(_native.Block.from_texts([sentence * 1 + dialogue]))
    kept = {}
    for name in ("ja-web", "ja-prose"):
        kept[name] = judge(metrics, load_profile(name).config.active_rules, 1)[0][0] == 0
    assert kept == {"ja-web": False, "ja-prose": True}
