"""Every change to a text is wanted by name, is what the name says, and is counted."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.data.cleaning.normalise import STEPS, normalise

EXAMPLES = [
    ("line_ends", "a\r\nb\rc\n", "a\nb\nc\n", 2),
    ("controls", "\ufeffa\x00\u00adb\u200b\tc\n", "ab\tc\n", 4),
    ("controls", "\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680", 0),  # a joiner is part of its emoji
    ("spaces", "a \u3000\nb\n\n\n\nc\t", "a\nb\n\nc", 5),
    ("nfc", "\u1112\u1161\u11ab 가 e\u0301", "한 가 é", 5),
    ("nfkc", "Ａ① ｶﾞ ok", "A1 ガ ok", 4),
    ("ja_half_width", "ﾊﾟﾝ、Ａ", "パン、Ａ", 3),
    ("ja_punctuation", "今日は，晴れ．明日も，３．１４とＡ，Ｂだ．", "今日は、晴れ。明日も、３．１４とＡ，Ｂだ。", 4),
    ("ja_punctuation", "今日は、晴れ、明日も，雨。", "今日は、晴れ、明日も，雨。", 0),
    ("ja_punctuation", "𠮷，𠮷．．．", "𠮷、𠮷。。。", 4),  # a kanji beyond U+FFFF is a Japanese character
    ("ja_footer", "本文です。\n次の行。\nCopyright 2020 Example All rights reserved.\n会社概要", None, 49),
    ("ja_footer", "お問い合わせの多い質問に順にお答えしていきますので、最後までお読みください。", None, 0),
    ("ko_laughs", "ㅋㅋㅋㅋㅋㅋ ㅠㅠ 하하하하 ㅎㅎㅎㅎ", "ㅋㅋㅋ ㅠㅠ 하하하하 ㅎㅎㅎ", 4),
]


@pytest.mark.parametrize(("step", "before", "after", "characters"), EXAMPLES)
def test_steps_do_what_they_say(step: str, before: str, after: str | None, characters: int) -> None:
    if after is None:
        after = before[: len(before) - characters]
    assert STEPS[step](before) == (after, characters)


def test_every_step_is_tried() -> None:
    assert {step for step, *_ in EXAMPLES} == STEPS.keys()
    assert all(step.__doc__ for step in STEPS.values())


def test_only_the_end_of_a_page_is_a_footer() -> None:
    footer, body = "会社概要 利用規約", ["本文の行がここに続いています。"] * 12
    assert STEPS["ja_footer"]("\n".join([footer, *body]))[1] == 0
    assert STEPS["ja_footer"]("\n".join([*body, footer, *body[:5]]))[0] == "\n".join(body)


@given(st.text(alphabet="aé\u0301\u1112\u1161\u11ab한ｶﾞ①Ａ，．、。あ漢３ㅋㅠ \t\n\r\u3000\x00\u200b", max_size=40))
def test_steps_count_what_they_change_and_are_done_once(text: str) -> None:
    for name, step in STEPS.items():
        changed, characters = step(text)
        assert (characters > 0) == (changed != text), name
        if name not in ("ja_punctuation", "ja_footer"):  # which look at a text's majority, and at its last lines
            assert step(changed) == (changed, 0), name
    assert STEPS["nfc"](text)[0] == unicodedata.normalize("NFC", text)
    assert STEPS["nfkc"](text)[0] == unicodedata.normalize("NFKC", text)


def test_changes_are_shown_around_their_place() -> None:
    texts = ["same", "x" * 500 + "e\u0301" + "y" * 500, "a\rb\x00"]
    results, changes = normalise(texts, ["line_ends", "controls", "nfc"])
    assert results == [None, "x" * 500 + "é" + "y" * 500, "a\nb"]
    assert [(change.document, change.step) for change in changes] == [(1, "nfc"), (2, "line_ends"), (2, "controls")]
    assert "e\u0301" in changes[0].before and "é" in changes[0].after and len(changes[0].before) <= 60
