"""Changes to texts, each named by the profile that wants it and counted where it is made."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

Step = Callable[[str], tuple[str, int]]

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
_TRAILING = re.compile(r"[ \t\u3000\u00a0]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"(?<=\n\n)\n+")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]+")
_LAUGHS = re.compile(r"([ㄱ-ㅎㅏ-ㅣ])\1{3,}")
_JAPANESE_BEFORE = r"[ぁ-ゖァ-ヺー々〇〻㐀-䶿一-鿿豈-﫿\U00020000-\U000323af）」』］〕】〉》]"
_FOOTER_LINES, _FOOTER_SHARE = 10, 0.3
_FOOTER_WORDS = (
    "http Copyright copyright © (C) reserved Reserved RESERVED Rights rights Inc. Powered by WordPress "
    "RSS Sponsored sponsored Advertisement Comments Tweet Share Follow Twitter Facebook Instagram "
    "コメント トラックバック ランキング スポンサーリンク スポンサー アフィリエイト 広告掲載 広告 ツイート "
    "シェア いいね フォロー 無断転載 無断複製 禁じます 著作権 固定リンク 関連記事 最新記事 人気記事 "
    "前の記事 次の記事 記事一覧 一覧へ カテゴリー プライバシーポリシー サイトポリシー 利用規約 "
    "特定商取引法 会社概要 運営者情報 お問い合わせ 問い合わせ サイトマップ ログイン ログアウト マイページ "
    "新規登録 会員登録 資料請求 トップページ ページトップ"
).split()
_FOOTER = re.compile("|".join(re.escape(word) for word in sorted(_FOOTER_WORDS, key=len, reverse=True)))


def line_ends(text: str) -> tuple[str, int]:
    """End lines with LF alone; counts the CRs."""
    count = text.count("\r")
    return (text.replace("\r\n", "\n").replace("\r", "\n"), count) if count else (text, 0)


def controls(text: str) -> tuple[str, int]:
    """Remove what is not seen: control characters (tab and line ends stay), soft hyphens, zero-width spaces, BOMs."""
    return _CONTROLS.subn("", text)


def spaces(text: str) -> tuple[str, int]:
    """Remove white space at the end of lines, and all but one of several blank lines."""
    changed = _BLANK_LINES.sub("", _TRAILING.sub("", text))
    return changed, len(text) - len(changed)


def nfc(text: str) -> tuple[str, int]:
    """Compose what can be composed (Unicode NFC), such as syllables from jamo; counts characters of changed words."""
    return _normal_form(text, "NFC")


def nfkc(text: str) -> tuple[str, int]:
    """Unicode NFKC: full-width letters become ASCII, circled numbers numbers, and more; counts as `nfc` does."""
    return _normal_form(text, "NFKC")


def _normal_form(text: str, form: Literal["NFC", "NFKC"]) -> tuple[str, int]:
    if text.isascii() or unicodedata.is_normalized(form, text):
        return text, 0
    changed = unicodedata.normalize(form, text)
    words = re.findall(r"\S+|\s+", text)
    return changed, max(1, sum(len(word) for word in words if not unicodedata.is_normalized(form, word)))


def ja_half_width(text: str) -> tuple[str, int]:
    """Make half-width katakana and their marks full-width."""
    count = 0

    def widen(found: re.Match[str]) -> str:
        nonlocal count
        count += len(found[0])
        return unicodedata.normalize("NFKC", found[0])

    return (_HALF_WIDTH.sub(widen, text), count) if _HALF_WIDTH.search(text) else (text, 0)


def ja_punctuation(text: str) -> tuple[str, int]:
    """Make full-width commas and full stops Japanese ones, in texts that use them as such.

    That is where more of them than of the Japanese ones follow a Japanese character or closing bracket; those
    after full-width digits or Latin letters stay.
    """
    total = 0
    for western, japanese in (("，", "、"), ("．", "。")):
        if western not in text:
            continue
        if len(re.findall(f"{_JAPANESE_BEFORE}{western}", text)) > len(
            re.findall(f"{_JAPANESE_BEFORE}{japanese}", text)
        ):
            runs = re.compile(f"(?<![０-９Ａ-Ｚａ-ｚ{western}]){western}+")
            total += sum(len(run) for run in runs.findall(text))
            text = runs.sub(partial(_repeat, japanese), text)
    return text, total


def _repeat(mark: str, run: re.Match[str]) -> str:
    return mark * len(run[0])


def ja_footer(text: str) -> tuple[str, int]:
    """Cut a page where, in its last ten lines, a line begins that consists to 30 % of words of footers."""
    lines = text.split("\n")
    for k in range(max(0, len(lines) - _FOOTER_LINES), len(lines)):
        matched = sum(len(word) for word in _FOOTER.findall(lines[k]))
        if matched > _FOOTER_SHARE * len(lines[k]):
            kept = "\n".join(lines[:k])
            return kept, len(text) - len(kept)
    return text, 0


def ko_laughs(text: str) -> tuple[str, int]:
    """Shorten runs of one loose jamo, as in laughing and crying, to three."""
    changed = _LAUGHS.sub(r"\1\1\1", text)
    return changed, len(text) - len(changed)


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (line_ends, controls, spaces, nfc, nfkc, ja_half_width, ja_punctuation, ja_footer, ko_laughs)
}


@dataclass
class Change:
    """What one step did to one document.

    Attributes:
        document: number in its block.
        step: name of the step.
        characters: how many characters it removed or replaced.
        before: some of the text around the first difference.
        after: the same place afterwards.
    """

    document: int
    step: str
    characters: int
    before: str
    after: str


def normalise(texts: Sequence[str], steps: Sequence[str]) -> tuple[list[str | None], list[Change]]:
    """Apply steps to texts.

    Args:
        texts: the texts of a block.
        steps: names of `STEPS`, in order.

    Returns:
        For each text what has become of it (None: it is as it was), and every change.
    """
    results: list[str | None] = []
    changes: list[Change] = []
    for document, original in enumerate(texts):
        text = original
        for step in steps:
            changed, characters = STEPS[step](text)
            if characters:
                changes.append(Change(document, step, characters, *_around_difference(text, changed)))
                text = changed
        results.append(None if text == original else text)
    return results, changes


_SHOWN = 30  # characters on either side


def _around_difference(before: str, after: str) -> tuple[str, str]:
    shorter = min(len(before), len(after))
    low, high = 0, shorter  # the longest common beginning, by halves: comparing slices is quick
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[low:middle] == after[low:middle] else (low, middle - 1)
    begin = max(0, low - _SHOWN)
    return before[begin : low + _SHOWN], after[begin : low + _SHOWN]
