"""What the documents state about numbers, dates and weeks is true, read back by an independent parser."""

import datetime
import re
from functools import cache

import pytest

from megatron_cpt.data.world import World

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WORD = r"[A-Za-z-]+(?: hundred(?: and [a-z-]+)?)?"
KANJI = "[零一二三四五六七八九十百千万]+"


@cache
def lines(language):
    world = World(9)
    texts = [document.text for split in ("train", "held_out") for document in world.documents(language, 3000, split)]
    return "\n".join(texts)


def from_words(text):
    total = 0
    for part in re.findall(r"[a-z]+", text.lower()):
        if part == "hundred":
            total *= 100
        elif part in UNITS:
            total += UNITS.index(part)
        elif part in TENS:
            total += 10 * TENS.index(part)
        elif part != "and":
            return None
    return total


def from_kanji(text):
    total = digit = 0
    for sign in text:
        if sign in "零一二三四五六七八九":
            digit = "零一二三四五六七八九".index(sign)
        else:
            total += (digit or 1) * {"十": 10, "百": 100, "千": 1000}[sign]
            digit = 0
    return total + digit


DIGITS = int
ENGLISH = [
    (r"(\d+) \+ (\d+) = (\d+)", DIGITS, lambda a, b, c: a + b == c),
    (r"(\d+) - (\d+) = (\d+)", DIGITS, lambda a, b, c: a - b == c),
    (r"(\d+) x (\d+) = (\d+)", DIGITS, lambda a, b, c: a * b == c),
    (r"What is (\d+) \+ (\d+)\? It is (\d+)", DIGITS, lambda a, b, c: a + b == c),
    (r"(\d+) minus (\d+)(?: is|\? The answer is) (\d+)", DIGITS, lambda a, b, c: a - b == c),
    (r"(\d+) times (\d+)(?: is|\? It is) (\d+)", DIGITS, lambda a, b, c: a * b == c),
    (r"(\d+) divided by (\d+) is (\d+)", DIGITS, lambda a, b, c: a == b * c),
    (rf"({WORD}) plus ({WORD}) equals ({WORD})", from_words, lambda a, b, c: a + b == c),
    (rf"({WORD}) minus ({WORD}) equals ({WORD})", from_words, lambda a, b, c: a - b == c),
    (rf"({WORD}) times ({WORD}) is ({WORD})\.", from_words, lambda a, b, c: a * b == c),
    (r"(\d+) is greater than (\d+)", DIGITS, lambda a, b: a > b),
    (rf"({WORD}) is smaller than ({WORD})\.", from_words, lambda a, b: a < b),
    (r"had (\d+) [a-z ]+ and gave away (\d+)\. Now s?he has (\d+)", DIGITS, lambda a, b, c: a - b == c),
    (r"paid with (\d+) yen and got (\d+) yen back", DIGITS, lambda a, b: a > b > 0),
    (r"At (\d+) yen each \w+ pays (\d+) yen for (\d+)", DIGITS, lambda price, cost, n: price * n == cost),
]
JAPANESE = [
    (r"(\d+)＋(\d+)＝(\d+)", DIGITS, lambda a, b, c: a + b == c),
    (r"(\d+)－(\d+)＝(\d+)", DIGITS, lambda a, b, c: a - b == c),
    (r"(\d+)×(\d+)＝(\d+)", DIGITS, lambda a, b, c: a * b == c),
    (r"(\d+)に(\d+)を足すと(\d+)に", DIGITS, lambda a, b, c: a + b == c),
    (r"(\d+)から(\d+)を引くと(\d+)に", DIGITS, lambda a, b, c: a - b == c),
    (r"(\d+)に(\d+)をかけると(\d+)に", DIGITS, lambda a, b, c: a * b == c),
    (r"(\d+)割る(\d+)は(\d+)", DIGITS, lambda a, b, c: a == b * c),
    (rf"({KANJI})足す({KANJI})は({KANJI})", from_kanji, lambda a, b, c: a + b == c),
    (rf"({KANJI})引く({KANJI})は({KANJI})", from_kanji, lambda a, b, c: a - b == c),
    (rf"({KANJI})かける({KANJI})は({KANJI})", from_kanji, lambda a, b, c: a * b == c),
    (r"(\d+)は(\d+)より大きい", DIGITS, lambda a, b: a > b),
    (rf"({KANJI})は({KANJI})より小さい数", from_kanji, lambda a, b: a < b),
    (r"1(?:個|本|枚|冊)(\d+)円の\D+(\d+)(?:個|本|枚|冊)買うと、?(\d+)円", DIGITS, lambda p, n, cost: p * n == cost),
    (r"(\d+)円から(\d+)円を払うと、(\d+)円が残", DIGITS, lambda a, b, c: a - b == c),
    (r"(\d+)円を出すと、おつりは(\d+)円", DIGITS, lambda a, b: a > b > 0),
]


@pytest.mark.parametrize(
    ("pattern", "read", "holds"), ENGLISH, ids=lambda value: value if isinstance(value, str) else ""
)
def test_english_arithmetic_is_true(pattern, read, holds):
    found = re.findall(pattern, lines("en").replace(",", ""))
    assert len(found) > 20
    for numbers in found:
        assert holds(*map(read, numbers)), numbers


@pytest.mark.parametrize(
    ("pattern", "read", "holds"), JAPANESE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_japanese_arithmetic_is_true(pattern, read, holds):
    found = re.findall(pattern, lines("ja"))
    assert len(found) > 20
    for numbers in found:
        assert holds(*map(read, numbers)), numbers


def test_dates_fall_on_the_weekday_that_is_stated():
    english = re.findall(r"([A-Z][a-z]+ \d+, \d{4}) was a (\w+)\.", lines("en"))
    japanese = re.findall(r"(\d{4})年(\d+)月(\d+)日は(.)曜日[でだ]", lines("ja"))
    assert min(len(english), len(japanese)) > 30
    for date, weekday in english:
        assert datetime.datetime.strptime(date, "%B %d, %Y").strftime("%A") == weekday
    for year, month, day, weekday in japanese:
        assert "月火水木金土日"[datetime.date(int(year), int(month), int(day)).weekday()] == weekday


def test_the_week_is_in_order():
    after = re.findall(r"The day after (\w+) is (\w+)\.", lines("en"))
    third = re.findall(r"Three days after (\w+) it is (\w+)\.", lines("en"))
    after_ja = re.findall(r"(.)曜日の次の日は(.)曜日", lines("ja"))
    assert min(map(len, (after, third, after_ja))) > 20
    assert all((WEEK.index(one) + 1) % 7 == WEEK.index(other) for one, other in after)
    assert all((WEEK.index(one) + 3) % 7 == WEEK.index(other) for one, other in third)
    assert all(("月火水木金土日".index(one) + 1) % 7 == "月火水木金土日".index(other) for one, other in after_ja)


def test_clocks_move_by_the_minutes_that_are_stated():
    english = re.findall(r"From (\d+):(\d+) to (\d+):(\d+) is (\d+) minutes", lines("en"))
    japanese = re.findall(r"(\d+)時(?:(\d+)分)?から(\d+)時(?:(\d+)分)?までは(\d+)分", lines("ja"))
    assert min(len(english), len(japanese)) > 20
    for times in english + japanese:
        hour, minute, later, rest, minutes = (int(number or 0) for number in times)
        assert (hour * 60 + minute + minutes - later * 60 - rest) % 720 == 0, times
