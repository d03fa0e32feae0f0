"""Figures of texts against a slow reading of their definitions."""

from __future__ import annotations

import collections
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import _native

STOPS, WIDE_STOPS = ".!?。．！？｡", "。．！？｡"
CLOSERS = "\"')]}»’”」』】〕〉》）］｣"
BULLETS = "•‣◦●○■□▪◆▶・･"
STOP_WORDS = ["the", "and", "über", "of"]


def is_white(c: str) -> bool:
    return c in "\t\n\v\f\r" or unicodedata.category(c)[0] == "Z"


def script(c: str) -> str:
    name, point = unicodedata.name(c, ""), ord(c)
    if c in "。．！？":
        return "stop"
    if c in "、，":
        return "comma"
    if c in "々〆〇〻" or name.startswith("CJK UNIFIED") or name.startswith("CJK COMPATIBILITY IDEOGRAPH"):
        return "kanji"
    if 0x3041 <= point <= 0x3096 or 0x309D <= point <= 0x309F:
        return "hiragana"
    if 0x30A1 <= point <= 0x30FF and c != "・" or 0x31F0 <= point <= 0x31FF or 0xFF66 <= point <= 0xFF9F:
        return "katakana"
    if name.startswith("HANGUL SYLLABLE"):
        return "hangul"
    if 0x3131 <= point <= 0x318E or 0xFFA1 <= point <= 0xFFDC:
        return "loose"
    if name.startswith(("HANGUL CHOSEONG", "HANGUL JUNGSEONG", "HANGUL JONGSEONG")):
        return "conjoining"
    latin = name.startswith(("LATIN", "FULLWIDTH LATIN")) and (point < 0x250 or point >= 0x1E00)
    if latin or name in ("FEMININE ORDINAL INDICATOR", "MASCULINE ORDINAL INDICATOR"):
        return "latin"
    if is_white(c):
        return "space"
    if c == "\ufffd":
        return "control"
    category = unicodedata.category(c)
    return {"L": "letter", "M": "letter", "N": "digit", "P": "punctuation", "S": "symbol", "C": "control"}[category[0]]


def is_letter(c: str) -> bool:
    return script(c) in ("letter", "latin", "hiragana", "katakana", "kanji", "hangul", "loose", "conjoining")


def strip_white(text: str) -> str:
    while text and is_white(text[0]):
        text = text[1:]
    while text and is_white(text[-1]):
        text = text[:-1]
    return text


def words_of(text: str) -> list[str]:
    return [word for word in "".join(" " if is_white(c) else c for c in text).split(" ") if word]


def sentences_of(line: str) -> list[str]:
    found, begin, at = [], 0, 0
    while at < len(line):
        if line[at] not in STOPS:
            at += 1
            continue
        start = at
        while at < len(line) and line[at] in STOPS:
            at += 1
        wide = any(c in WIDE_STOPS for c in line[start:at])
        while at < len(line) and line[at] in CLOSERS:
            at += 1
        if wide or at == len(line) or is_white(line[at]) or not line[at].isascii():
            found.append(strip_white(line[begin:at]))
            begin = at
    rest = strip_white(line[begin:])
    return found + ([rest] if rest else [])


def ends_in_ellipsis(text: str) -> bool:
    return text.endswith(("...", "…", "‥", "・"))


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def duplicates(items: list[str]) -> tuple[float, float]:
    counts = collections.Counter(items)
    return (
        share(sum(n - 1 for n in counts.values()), len(items)),
        share(sum(len(item) * (n - 1) for item, n in counts.items()), sum(map(len, items))),
    )


def grams(items: str | list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[k : k + n]) for k in range(len(items) - n + 1)]


def repetition(text: str) -> dict[str, float]:
    values, words = {}, words_of(text)
    all_characters = sum(map(len, words))
    for n in range(2, 11):
        counts, word_counts = collections.Counter(grams(text, n)), collections.Counter(grams(words, n))
        if n < 5:
            values[f"top_{n}gram"] = share(max(counts.values(), default=0), sum(counts.values()))
            repeated = [(count, sum(map(len, gram))) for gram, count in word_counts.items() if count > 1]
            count, size = max(repeated, default=(0, 0))
            values[f"top_{n}words"] = min(1.0, share(count * size, all_characters))
        else:
            values[f"repeated_{n}gram"] = share(sum(count > 1 for count in counts.values()), len(counts))
            covered = {k + j for k, gram in enumerate(grams(words, n)) if word_counts[gram] > 1 for j in range(n)}
            values[f"repeated_{n}words"] = share(sum(len(words[k]) for k in covered), all_characters)
    return values


def runs_of(text: str) -> list[int]:
    runs: list[int] = []
    for k, c in enumerate(text):
        if is_white(c):
            continue
        if k and text[k - 1] == c:
            runs[-1] += 1
        else:
            runs.append(1)
    return runs


def links_of(text: str) -> int:
    linked: set[int] = set()
    at = text.find("://")
    while at >= 0:
        begin = at
        while begin > 0 and begin - 1 not in linked and text[begin - 1].isascii() and text[begin - 1].isalpha():
            begin -= 1
        end = at
        while end < len(text) and " " < text[end] < "\x7f":
            end += 1
        linked |= set(range(begin, end))
        at = text.find("://", end)
    return len(linked)


def met_stop_words(words: list[str]) -> int:
    lower = {ord(c): ord(c) + 32 for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞ"}
    met = set()
    for word in words:
        inner = [k for k, c in enumerate(word) if is_letter(c)]
        if inner:
            met.add(word[inner[0] : inner[-1] + 1].translate(lower))
    return len(met & set(STOP_WORDS))


def reference(text: str) -> dict[str, float]:
    scripts = collections.Counter(script(c) for c in text)
    seen = len(text) - scripts["space"]
    words, lines = words_of(text), [line for part in text.split("\n") if (line := strip_white(part))]
    sentences = [sentence for line in lines for sentence in sentences_of(line)]
    kana_kanji = scripts["hiragana"] + scripts["katakana"] + scripts["kanji"]
    japanese = kana_kanji + scripts["stop"] + scripts["comma"]
    hangul = scripts["hangul"] + scripts["loose"] + scripts["conjoining"]
    bullets = [line for line in lines if line[0] in BULLETS or (line[0] in "-*–" and line[1:] and is_white(line[1]))]
    ended = [line for line in lines if line.rstrip(CLOSERS).endswith((*STOPS, "…"))]
    runs = runs_of(text)
    ellipses = sum(c == "…" for c in text) + sum(word[k : k + 3] == "..." for word in words for k in range(len(word)))
    values = {
        "bytes": len(text.encode()),
        "characters": len(text),
        "words": len(words),
        "lines": len(lines),
        "sentences": len(sentences),
        "word_length_mean": share(seen, len(words)),
        "word_length_max": max(map(len, words), default=0),
        "line_length_mean": share(sum(map(len, lines)), len(lines)),
        "sentence_length_mean": share(sum(map(len, sentences)), len(sentences)),
        "sentence_length_max": max(map(len, sentences), default=0),
        "letter_share": share(kana_kanji + hangul + scripts["latin"] + scripts["letter"], seen),
        "latin_share": share(scripts["latin"], seen),
        "other_letter_share": share(scripts["letter"], seen),
        "digit_share": share(scripts["digit"], seen),
        "punctuation_share": share(scripts["punctuation"] + scripts["stop"] + scripts["comma"], seen),
        "symbol_share": share(scripts["symbol"], seen),
        "control_share": share(scripts["control"], seen),
        "japanese_characters": japanese,
        "japanese_share": share(japanese, seen),
        "hiragana_of_japanese": share(scripts["hiragana"], japanese),
        "katakana_of_japanese": share(scripts["katakana"], japanese),
        "kanji_of_japanese": share(scripts["kanji"], japanese),
        "hangul_share": share(hangul, seen),
        "loose_jamo_share": share(scripts["loose"], seen),
        "conjoining_jamo_share": share(scripts["conjoining"], seen),
        "alphabetic_word_share": share(sum(any(map(is_letter, word)) for word in words), len(words)),
        "stop_words": met_stop_words(words),
        "ellipsis_sentence_share": share(sum(map(ends_in_ellipsis, sentences)), len(sentences)),
        "ellipsis_line_share": share(sum(map(ends_in_ellipsis, lines)), len(lines)),
        "bullet_line_share": share(len(bullets), len(lines)),
        "ended_line_share": share(len(ended), len(lines)),
        "hash_word_ratio": share(text.count("#"), len(words)),
        "ellipsis_word_ratio": share(ellipses, len(words)),
        "link_share": share(links_of(text), seen),
        "longest_run": max(runs, default=0),
        "run_share": share(sum(run for run in runs if run >= 5), seen),
    }
    values["duplicate_lines"], values["duplicate_line_characters"] = duplicates(lines)
    values["duplicate_sentences"], values["duplicate_sentence_characters"] = duplicates(sentences)
    return values | repetition(text)


def metrics(texts: list[str]) -> list[dict[str, float]]:
    columns = _native.text_metrics(_native.Block.from_texts(texts), STOP_WORDS)
    assert list(columns) == _native.metric_names()
    return [{name: float(column[k]) for name, column in columns.items()} for k in range(len(texts))]


def check(texts: list[str]) -> None:
    for text, got in zip(texts, metrics(texts), strict=True):
        assert got == pytest.approx(reference(text), rel=1e-12, abs=0), text


ALPHABETS = (
    "abcdez ABÄÖ.,!?\n",
    "あいうカキー々漢字𠮷、。！？「」…\n　",
    "가나다라ㅋㅎㅠ .,!?~\n",
    "\u1112\u1161\u11ab é\u0301 123 ١٢ #$%+= ://xyhtp\n- *•・...…",
    "\x00\x07\ufffd\ue000\u200b\xa0\u3000\t\rαβжщ🙂👍🏽ｱｲﾊﾟＡｂ３．，",
)


def random_text(draw: random.Random) -> str:
    """A text of a few alphabets in which lines, phrases and single characters come again."""
    alphabet = "".join(draw.sample(ALPHABETS, draw.randint(1, 3)))
    pieces = ["".join(draw.choices(alphabet, k=draw.randint(1, 12))) for _ in range(draw.randint(1, 8))]
    pieces += ["the river and", " the ", "http://a.b/c ", "Über ", "\n", "kkkkkkkk"]
    return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 60)))


def test_figures_follow_their_definitions() -> None:
    draw = random.Random(7)
    check([random_text(draw) for _ in range(400)])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="".join(ALPHABETS), max_size=60), max_size=5))
def test_figures_of_anything(texts: list[str]) -> None:
    check(texts)


def test_every_assigned_character_has_its_kind() -> None:
    """Alphabets, kana, Han of several planes, Hangul, marks and symbols that no version of Unicode moves."""
    ranges = [(0x20, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x620, 0x66A), (0x900, 0x940), (0x1100, 0x1200)]
    ranges += [(0x2010, 0x2070), (0x20A0, 0x20B0), (0x2190, 0x2400), (0x2500, 0x2700), (0x3001, 0x3130)]
    ranges += [(0x3131, 0x318F), (0x4E00, 0x4E20), (0xAC00, 0xAC20), (0xE000, 0xE010), (0xF900, 0xFA6E)]
    ranges += [(0xFF01, 0xFFDD), (0x1F600, 0x1F640), (0x20000, 0x20010), (0x2A700, 0x2A710), (0x30000, 0x30010)]
    characters = [chr(c) for first, end in ranges for c in range(first, end) if unicodedata.category(chr(c)) != "Cn"]
    check(characters)


def test_sentences_of_japanese_dialogue_and_of_english() -> None:
    (japanese, english) = metrics(
        ["「行くのか。」と聞いた。円周率は3.14です。え？！…", 'He said "No." Then 3.5 men left... "So?" Yes']
    )
    assert japanese["sentences"] == 5  # the quotation, what follows it, pi, the question, the dots
    assert english["sentences"] == 4


def test_rare_kanji_are_kanji() -> None:
    (rare,) = metrics(["𠮷𠀋"])
    assert rare["kanji_of_japanese"] == 1 and rare["japanese_characters"] == 2


def test_long_text_is_judged_by_its_beginning() -> None:
    """Beyond 2**20 characters n-grams are no longer counted, everything else is."""
    draw = random.Random(1)
    beginning = "".join(chr(0x4E00 + draw.randrange(20000)) for _ in range(2**20))
    (whole, cut) = metrics([beginning + "x" * 100_000, beginning])
    assert whole["repeated_10gram"] == cut["repeated_10gram"] == 0
    assert whole["longest_run"] == 100_000


def test_wanted_figures_are_the_same_alone() -> None:
    draw = random.Random(11)
    block = _native.Block.from_texts([random_text(draw) for _ in range(50)])
    everything = _native.text_metrics(block, STOP_WORDS)
    for name in _native.metric_names():
        alone = _native.text_metrics(block, STOP_WORDS, [name])
        assert list(alone) == [name] and (alone[name] == everything[name]).all()
    with pytest.raises(ValueError, match="no figure of the name nothing"):
        _native.text_metrics(block, [], ["nothing"])
