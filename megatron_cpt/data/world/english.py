"""English word forms: articles, plurals, numbers in words, ordinals, dates and times of day."""

from __future__ import annotations

import datetime

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_SILENT_H = ("hour", "honest", "honor")
_VOWEL_LETTER_CONSONANT_SOUND = ("uni", "use", "usual", "euro", "uku", "one", "once")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by the sound it begins with (digits included)."""
    lower = phrase.lower()
    if lower[0].isdigit():
        vowel = lower.startswith("8") or lower.split()[0].split("-")[0] in ("11", "18")
    elif lower.startswith(_SILENT_H):
        vowel = True
    else:
        vowel = lower[0] in "aeiou" and not lower.startswith(_VOWEL_LETTER_CONSONANT_SOUND)
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(noun: str) -> str:
    """The regular plural; irregular ones stand in the word lists."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def words(number: int) -> str:
    """A number from 0 to 999,999 in words, as in "one hundred and five"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{_ONES[hundreds]} hundred" + (f" and {words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    link = " and " if 0 < rest < 100 else " "
    return f"{words(thousands)} thousand" + (f"{link}{words(rest)}" if rest else "")


def ordinal_words(number: int) -> str:
    """An ordinal in words, as in "twenty-first"."""
    head, mark, last = words(number).rpartition("-")
    if not mark:
        head, mark, last = words(number).rpartition(" ")
    if last in _ORDINALS:
        last = _ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return head + mark + last


def ordinal(number: int) -> str:
    """An ordinal in digits, as in "21st"."""
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


class EnglishNumber(int):
    """A number in English text; format specs: "" 1,234; "w" words; "W" Words; "a" an 8; "o" 3rd; "ow" third."""

    def __format__(self, spec: str) -> str:
        if not spec:
            return f"{int(self):,}"
        forms = {"w": words, "W": lambda n: capital(words(n)), "o": ordinal, "ow": ordinal_words}
        return article(str(int(self))) if spec == "a" else forms[spec](int(self))


class EnglishDate:
    """A date in English text.

    Format specs: "" March 3; "y" March 3, 2014; "the" the third of March; "wd" Monday; "m" March; "yy" 2014.
    """

    def __init__(self, date: datetime.date):
        self.date = date

    def __format__(self, spec: str) -> str:
        date, month = self.date, MONTHS[self.date.month - 1]
        if spec == "the":
            return f"the {ordinal_words(date.day)} of {month}"
        if spec == "wd":
            return WEEKDAYS[date.weekday()]
        forms = {"": f"{month} {date.day}", "y": f"{month} {date.day}, {date.year}", "m": month, "yy": str(date.year)}
        return forms[spec]


class EnglishClock:
    """A time of day in English text; specs: "" half past seven; "d" 7:30; "p" half past seven in the evening."""

    def __init__(self, minutes: int):
        self.hour, self.minute = divmod(minutes, 60)

    def __format__(self, spec: str) -> str:
        hour = self.hour % 12 or 12
        if spec == "d":
            return f"{hour}:{self.minute:02d}"
        if spec == "p":
            part = "in the morning" if self.hour < 12 else "in the afternoon" if self.hour < 18 else "in the evening"
            return f"{self:} {part}"
        if self.minute == 0:
            return f"{words(hour)} o'clock"
        if self.minute == 30:
            return f"half past {words(hour)}"
        side, minutes, hour = (
            ("past", self.minute, hour) if self.minute < 30 else ("to", 60 - self.minute, hour % 12 + 1)
        )
        return f"{'a quarter' if minutes == 15 else f'{words(minutes)} minutes'} {side} {words(hour)}"
