"""Japanese number words: kanji numerals, kana readings, counters with their sound changes, dates and times."""

from __future__ import annotations

import datetime

_DIGITS = "零一二三四五六七八九"
_READINGS = ("れい", "いち", "に", "さん", "よん", "ご", "ろく", "なな", "はち", "きゅう")
_HUNDREDS = (
    "",
    "ひゃく",
    "にひゃく",
    "さんびゃく",
    "よんひゃく",
    "ごひゃく",
    "ろっぴゃく",
    "ななひゃく",
    "はっぴゃく",
    "きゅうひゃく",
)
_THOUSANDS = ("", "せん", "にせん", "さんぜん", "よんせん", "ごせん", "ろくせん", "ななせん", "はっせん", "きゅうせん")
_NATIVE = ("", "ひとつ", "ふたつ", "みっつ", "よっつ", "いつつ", "むっつ", "ななつ", "やっつ", "ここのつ", "とお")
_DAYS = {
    1: "ついたち",
    2: "ふつか",
    3: "みっか",
    4: "よっか",
    5: "いつか",
    6: "むいか",
    7: "なのか",
    8: "ようか",
    9: "ここのか",
    10: "とおか",
    14: "じゅうよっか",
    17: "じゅうしちにち",
    19: "じゅうくにち",
    20: "はつか",
    24: "にじゅうよっか",
    27: "にじゅうしちにち",
    29: "にじゅうくにち",
}
WEEKDAYS = "月火水木金土日"

# Readings of 1 to 10 with a counter; larger numbers take the reading of their last part.
_COUNTERS = {
    "本": "いっぽん にほん さんぼん よんほん ごほん ろっぽん ななほん はっぽん きゅうほん じゅっぽん",
    "匹": "いっぴき にひき さんびき よんひき ごひき ろっぴき ななひき はっぴき きゅうひき じゅっぴき",
    "杯": "いっぱい にはい さんばい よんはい ごはい ろっぱい ななはい はっぱい きゅうはい じゅっぱい",
    "個": "いっこ にこ さんこ よんこ ごこ ろっこ ななこ はっこ きゅうこ じゅっこ",
    "冊": "いっさつ にさつ さんさつ よんさつ ごさつ ろくさつ ななさつ はっさつ きゅうさつ じゅっさつ",
    "枚": "いちまい にまい さんまい よんまい ごまい ろくまい ななまい はちまい きゅうまい じゅうまい",
    "台": "いちだい にだい さんだい よんだい ごだい ろくだい ななだい はちだい きゅうだい じゅうだい",
    "人": "ひとり ふたり さんにん よにん ごにん ろくにん しちにん はちにん きゅうにん じゅうにん",
    "歳": "いっさい にさい さんさい よんさい ごさい ろくさい ななさい はっさい きゅうさい じゅっさい",
    "階": "いっかい にかい さんがい よんかい ごかい ろっかい ななかい はっかい きゅうかい じゅっかい",
    "回": "いっかい にかい さんかい よんかい ごかい ろっかい ななかい はっかい きゅうかい じゅっかい",
    "時": "いちじ にじ さんじ よじ ごじ ろくじ しちじ はちじ くじ じゅうじ",
    "分": "いっぷん にふん さんぷん よんぷん ごふん ろっぷん ななふん はっぷん きゅうふん じゅっぷん",
    "月": "いちがつ にがつ さんがつ しがつ ごがつ ろくがつ しちがつ はちがつ くがつ じゅうがつ",
    "羽": "いちわ にわ さんわ よんわ ごわ ろくわ ななわ はちわ きゅうわ じゅうわ",
    "頭": "いっとう にとう さんとう よんとう ごとう ろくとう ななとう はっとう きゅうとう じゅっとう",
}
_COUNTER_READINGS = {counter: readings.split() for counter, readings in _COUNTERS.items()}


def kanji(number: int) -> str:
    """A number from 0 to 99,999,999 in kanji numerals, as in 千二百三."""
    if number == 0:
        return _DIGITS[0]
    high, low = divmod(number, 10_000)
    text = f"{kanji(high)}万" if high else ""
    for size, sign in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, low = divmod(low, size)
        if digit:
            text += ("" if digit == 1 and size > 1 else _DIGITS[digit]) + sign
    return text


def reading(number: int) -> str:
    """A number from 0 to 99,999 in kana, as in さんびゃくにじゅういち."""
    if number == 0:
        return _READINGS[0]
    high, low = divmod(number, 10_000)
    thousands, low = divmod(low, 1000)
    hundreds, low = divmod(low, 100)
    tens, ones = divmod(low, 10)
    text = f"{reading(high)}まん" if high else ""
    text += _THOUSANDS[thousands] + _HUNDREDS[hundreds]
    text += ("" if tens < 2 else _READINGS[tens]) + ("じゅう" if tens else "")
    return text + (_READINGS[ones] if ones else "")


def counted(number: int, counter: str) -> str:
    """The kana reading of a number (1 to 99; 1 to 10 for つ, 1 to 31 for 日) with its counter, as in さんぼん."""
    if counter == "つ":
        return _NATIVE[number]
    if counter == "日":
        return _DAYS.get(number) or f"{reading(number)}にち"
    if counter == "歳" and number == 20:
        return "はたち"
    tens, ones = divmod(number, 10)
    table = _COUNTER_READINGS[counter]
    if counter == "人" and tens and ones in (1, 2):
        return f"{reading(number)}にん"
    if ones == 0:
        return ("" if tens == 1 else _READINGS[tens]) + table[9]
    return (reading(tens * 10) if tens else "") + table[ones - 1]


class JapaneseNumber(int):
    """A number in Japanese text; specs: "" digits; "k" kanji; "r" kana reading; "つ" 三つ; "r" + counter さんぼん."""

    def __format__(self, spec: str) -> str:
        number = int(self)
        if not spec:
            return str(number)
        if spec == "k":
            return kanji(number)
        if spec == "つ":
            return "十" if number == 10 else f"{kanji(number)}つ" if number < 10 else f"{number}個"
        if spec == "人":
            return {1: "一人", 2: "二人"}.get(number) or f"{number}人"
        if spec[0] == "r":
            return counted(number, spec[1:]) if spec[1:] else reading(number)
        raise KeyError(spec)


class JapaneseDate:
    """A date in Japanese text.

    Format specs: "" 3月4日; "k" 三月四日; "y" with its year; "wd" 月曜日; "m" 3月; "yy" 2014; "r" kana reading.
    """

    def __init__(self, date: datetime.date):
        self.date = date

    def __format__(self, spec: str) -> str:
        date = self.date
        forms = {
            "": f"{date.month}月{date.day}日",
            "k": f"{kanji(date.month)}月{kanji(date.day)}日",
            "y": f"{date.year}年{date.month}月{date.day}日",
            "wd": f"{WEEKDAYS[date.weekday()]}曜日",
            "m": f"{date.month}月",
            "yy": str(date.year),
        }
        return counted(date.month, "月") + counted(date.day, "日") if spec == "r" else forms[spec]


class JapaneseClock:
    """A time of day in Japanese text; specs: "" 七時半; "d" 7時30分; "p" 午後七時半."""

    def __init__(self, minutes: int):
        self.hour, self.minute = divmod(minutes, 60)

    def __format__(self, spec: str) -> str:
        hour = self.hour % 12 or 12
        if spec == "d":
            return f"{hour}時" + (f"{self.minute}分" if self.minute else "")
        text = f"{kanji(hour)}時"
        if self.minute:
            text += "半" if self.minute == 30 else f"{kanji(self.minute)}分"
        return {"": "", "p": "午前" if self.hour < 12 else "午後"}[spec] + text
