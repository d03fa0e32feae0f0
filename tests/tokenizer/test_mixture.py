"""Training text of several languages: shares by bytes, thinned evenly, the same lines each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import TextMixture


def size_of(lines: list[str]) -> int:
    return sum(len(line.encode()) for line in lines)


def test_without_shares_everything_is_taken(english: list[str], japanese: list[str]) -> None:
    documents = ["\r\n".join(english[:200]) + "\n\n  \n", "\n".join(english[200:])]
    mixture = TextMixture({"en": documents, "ja": japanese})
    assert list(mixture) == english + japanese
    assert mixture.languages["en"].available == mixture.languages["en"].taken == size_of(english)
    assert mixture.languages["ja"].share == pytest.approx(size_of(japanese) / size_of(english + japanese))


@pytest.mark.parametrize(("balance", "max_bytes"), [({"en": 1, "ja": 3}, None), ({"en": 2.0, "ja": 1}, 5000)])
def test_shares_hold_in_bytes(
    english: list[str], japanese: list[str], balance: dict[str, float], max_bytes: int | None
) -> None:
    mixture = TextMixture({"en": english, "ja": japanese}, balance, max_bytes)
    lines = list(mixture)
    assert list(mixture) == lines, "every reading gives the same lines"
    parts = {"en": [line for line in lines if line.isascii()], "ja": [line for line in lines if not line.isascii()]}
    longest = max(size_of([line]) for line in english + japanese)
    for language, part in parts.items():
        assert abs(size_of(part) - mixture.languages[language].taken) <= longest
    assert size_of(parts["en"]) / size_of(parts["ja"]) == pytest.approx(balance["en"] / balance["ja"], rel=0.05)
    if max_bytes is None:
        assert parts["ja"] == japanese, "the scarce language is taken whole"
        kept = [english.index(line) for line in parts["en"]]
        assert kept == sorted(kept) and kept[0] < 20 and kept[-1] > 380, "thinned evenly"
    else:
        assert size_of(lines) <= max_bytes + 2 * longest


def test_what_is_no_mixture(english: list[str]) -> None:
    def once() -> Iterator[str]:
        yield from english

    with pytest.raises(TypeError, match="read once"):
        TextMixture({"en": once()})
    cases = [
        ({"en": english, "ja": []}, None, None, "text of ja is empty"),
        ({"en": english}, {"ja": 1.0}, None, "the balance names ja"),
        ({"en": english}, {"en": 0.0}, None, "positive shares"),
        ({"en": english}, {"en": float("nan")}, None, "positive shares"),
        ({"en": english}, None, 0, "max_bytes is 0"),
    ]
    for texts, balance, max_bytes, message in cases:
        with pytest.raises(TokenizerError, match=message):
            list(TextMixture(texts, balance, max_bytes))
