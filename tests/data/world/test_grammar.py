"""Word forms, against lists written by hand, and agreement inside the documents."""

import datetime
import re

import pytest

from megatron_cpt.data.world import World, english, japanese
from megatron_cpt.data.world.words import Clock, view, word_lists

NUMBER_WORDS = {
    0: "zero", 13: "thirteen", 40: "forty", 21: "twenty-one", 100: "one hundred", 105: "one hundred and five",
    342: "three hundred and forty-two", 1000: "one thousand", 1012: "one thousand and twelve",
    5100: "five thousand one hundred", 9999: "nine thousand nine hundred and ninety-nine", 12000: "twelve thousand",
}  # fmt: skip
ORDINALS = {
    1: ("1st", "first"), 2: ("2nd", "second"), 3: ("3rd", "third"), 5: ("5th", "fifth"), 8: ("8th", "eighth"),
    9: ("9th", "ninth"), 11: ("11th", "eleventh"), 12: ("12th", "twelfth"), 13: ("13th", "thirteenth"),
    20: ("20th", "twentieth"), 21: ("21st", "twenty-first"), 30: ("30th", "thirtieth"), 31: ("31st", "thirty-first"),
    100: ("100th", "one hundredth"), 112: ("112th", "one hundred and twelfth"),
}  # fmt: skip
ARTICLES = (
    "an apple, a banana, an hour, a university, a uniform, an umbrella, an 8, an 11, an 18, an 80, a 7, a 1, a 110, "
    "an owl, a European, a one-way street, an onion, an honest man, a ukulele, an uncle"
)
READINGS = {
    0: "れい", 4: "よん", 7: "なな", 9: "きゅう", 10: "じゅう", 14: "じゅうよん", 20: "にじゅう",
    99: "きゅうじゅうきゅう",
    100: "ひゃく", 300: "さんびゃく", 600: "ろっぴゃく", 800: "はっぴゃく", 365: "さんびゃくろくじゅうご", 1000: "せん",
    3000: "さんぜん", 8000: "はっせん", 1801: "せんはっぴゃくいち", 10000: "いちまん",
    20360: "にまんさんびゃくろくじゅう",
}  # fmt: skip
COUNTED = (
    "1本いっぽん 3本さんぼん 6本ろっぽん 8本はっぽん 10本じゅっぽん 21本にじゅういっぽん "
    "1匹いっぴき 3匹さんびき 6匹ろっぴき 1杯いっぱい 3杯さんばい 1冊いっさつ 8冊はっさつ "
    "4枚よんまい 1人ひとり 2人ふたり 4人よにん 7人しちにん 11人じゅういちにん "
    "12人じゅうににん 1歳いっさい 8歳はっさい 20歳はたち 3階さんがい 6階ろっかい "
    "1個いっこ 6個ろっこ 4時よじ 7時しちじ 9時くじ 12時じゅうにじ 1分いっぷん "
    "3分さんぷん 4分よんぷん 8分はっぷん 30分さんじゅっぷん 4月しがつ 7月しちがつ "
    "9月くがつ 12月じゅうにがつ 3羽さんわ 1日ついたち 2日ふつか 4日よっか 8日ようか "
    "10日とおか 11日じゅういちにち 14日じゅうよっか 17日じゅうしちにち 19日じゅうくにち "
    "20日はつか 24日にじゅうよっか 27日にじゅうしちにち 29日にじゅうくにち "
    "31日さんじゅういちにち 1つひとつ 3つみっつ 6つむっつ 8つやっつ 10つとお "
    "1回いっかい 8回はっかい 1頭いっとう 10頭じゅっとう"
)
KANJI = {0: "零", 8: "八", 10: "十", 11: "十一", 20: "二十", 99: "九十九", 100: "百", 305: "三百五", 1000: "千",
         1996: "千九百九十六", 2024: "二千二十四", 10000: "一万", 31600: "三万千六百", 120000: "十二万"}  # fmt: skip


def test_english_numbers_ordinals_and_articles():
    assert {number: english.words(number) for number in NUMBER_WORDS} == NUMBER_WORDS
    assert {n: (english.ordinal(n), english.ordinal_words(n)) for n in ORDINALS} == ORDINALS
    for phrase in ARTICLES.split(", "):
        assert english.article(phrase.split(" ", 1)[1]) == phrase
    assert [english.plural(noun) for noun in ("box", "city", "day", "dish", "bus", "pear")] == [
        "boxes", "cities", "days", "dishes", "buses", "pears"
    ]  # fmt: skip
    assert format(view(1234, "en"), "") == "1,234" and format(view(18, "en"), "a") == "an 18"


def test_japanese_numbers_and_counters():
    assert {number: japanese.reading(number) for number in READINGS} == READINGS
    assert {number: japanese.kanji(number) for number in KANJI} == KANJI
    for entry in COUNTED.split():
        number, counter, reading = re.fullmatch(r"(\d+)([^ぁ-ん]|つ)(.+)", entry).groups()
        assert japanese.counted(int(number), counter) == reading, entry
    assert [format(view(n, "ja"), "つ") for n in (1, 9, 10)] == ["一つ", "九つ", "十"]
    assert [format(view(n, "ja"), "人") for n in (1, 2, 3)] == ["一人", "二人", "3人"]


def test_dates_and_times():
    date = datetime.date(2014, 3, 3)
    assert [format(view(date, "en"), spec) for spec in ("", "y", "the", "wd")] == [
        "March 3", "March 3, 2014", "the third of March", "Monday"
    ]  # fmt: skip
    assert [format(view(date, "ja"), spec) for spec in ("", "k", "y", "wd", "r")] == [
        "3月3日", "三月三日", "2014年3月3日", "月曜日", "さんがつみっか"
    ]  # fmt: skip
    times = {0: "twelve o'clock", 435: "a quarter past seven", 450: "half past seven", 465: "a quarter to eight",
             755: "twenty-five minutes to one", 610: "ten minutes past ten"}  # fmt: skip
    assert {minutes: format(view(Clock(minutes), "en"), "") for minutes in times} == times
    assert format(view(Clock(1170), "en"), "p") == "half past seven in the evening"
    assert [format(view(Clock(minutes), "ja"), spec) for minutes, spec in ((450, ""), (450, "d"), (1165, "p"))] == [
        "七時半", "7時30分", "午後七時二十五分"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def english_text():
    world = World(4)
    return "\n".join(
        document.text for split in ("train", "held_out") for document in world.documents("en", 3000, split)
    )


def test_articles_agree_with_what_follows(english_text):
    for kind, following in re.findall(r"\b([Aa]n?) (\w+)", english_text):
        lower = following.lower()
        vowel = lower[0] in "aeiou8" and not lower.startswith(("one", "uni", "use")) or lower in ("hour", "11", "18")
        assert kind.lower() == ("an" if vowel else "a"), f"{kind} {following}"


def test_nouns_agree_with_their_numbers(english_text):
    several = {english.words(number) for number in range(2, 100)}
    singular = {noun for noun in plurals() if plurals()[noun] != noun}
    for number, noun, after in re.findall(r"\b([\w-]+) (?=([a-z]+)(?: ([a-z]+))?\b)", english_text):
        if number.lower() in several or (number.isdigit() and 1 < int(number) < 1000):
            assert f"{noun} {after}" not in singular, f"{number} {noun} {after}"
            assert noun not in singular or f"{noun} {after}" in plurals().values(), f"{number} {noun} {after}"
    assert not re.search(r"\b(1|[Oo]ne) (points|pages|years|degrees|people|more (are|were))\b", english_text)
    for number, ending in re.findall(r"\b(\d+)(st|nd|rd|th)\b", english_text):
        assert english.ordinal(int(number)) == number + ending


def plurals():
    terms = [term.en for terms in word_lists().values() for term in terms if "s" in term.en.forms]
    return {str(word): word.forms["s"] for word in terms}


def test_plurals_of_the_lists():
    expected = {
        "potato": "potatoes", "cherry tree": "cherry trees", "mouse": "mice", "sheep": "sheep", "wolf": "wolves",
        "deer": "deer", "radish": "radishes", "watch": "watches", "scarf": "scarves", "music box": "music boxes",
        "morning glory": "morning glories", "lily": "lilies", "pony": "ponies", "peach": "peaches",
    }  # fmt: skip
    assert {noun: plurals()[noun] for noun in expected} == expected
