"""The text a tokenizer is trained on: several languages, in stated shares of its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from megatron_cpt.errors import TokenizerError


@dataclass(frozen=True)
class LanguageBytes:
    """UTF-8 bytes of one language: `available` in its texts, `taken` of them, and the `share` of all that is taken."""

    available: int
    taken: int
    share: float


class TextMixture:
    """Lines of several languages, each language in its share; gives the same lines each time it is read.

    A language that has more text than its share needs is thinned evenly over its whole length: a line is
    taken when the bytes wanted so far have grown past the bytes taken so far. Nothing is repeated, so the
    language that is scarcest for its share is taken whole, and the sum is as large as the shares allow.

    Args:
        texts: documents by language, that can be read twice (a list, or an object with `__iter__`; not a
            generator): once to count their bytes, once to take them.
        balance: wanted share of each language, any positive numbers; None takes everything there is.
        max_bytes: no more than this many bytes in all, taken evenly.

    Raises:
        TokenizerError: the balance names other languages than the texts, a share or `max_bytes` is not
            positive, or a language has no text.
    """

    def __init__(
        self,
        texts: Mapping[str, Iterable[str]],
        balance: Mapping[str, float] | None = None,
        max_bytes: int | None = None,
    ) -> None:
        once = [language for language, documents in texts.items() if iter(documents) is documents]
        if once:
            raise TypeError(f"the texts of {once} can be read once only; give a list or an object that begins again")
        if balance is not None and balance.keys() != texts.keys():
            raise TokenizerError(
                f"the balance names {', '.join(balance)}, the texts are {', '.join(texts)}: give each language a share"
            )
        if balance is not None and not all(isfinite(share) and share > 0 for share in balance.values()):
            raise TokenizerError(f"the balance is {dict(balance)}: expected positive shares, such as ja=2 en=1")
        if max_bytes is not None and max_bytes < 1:
            raise TokenizerError(f"max_bytes is {max_bytes}: expected at least 1")
        self._texts = texts
        self.balance = None if balance is None else dict(balance)
        self.max_bytes = max_bytes
        self._languages: dict[str, LanguageBytes] | None = None

    @property
    def languages(self) -> dict[str, LanguageBytes]:
        """What each language gives."""
        if self._languages is None:
            self._languages = self._counted()
        return self._languages

    def __iter__(self) -> Iterator[str]:
        """The lines that are taken, language by language."""
        languages = self.languages
        for language, documents in self._texts.items():
            yield from _thinned(lines_of(documents), languages[language].taken, languages[language].available)

    def _counted(self) -> dict[str, LanguageBytes]:
        available = {
            language: sum(_size(line) for line in lines_of(documents)) for language, documents in self._texts.items()
        }
        empty = [language for language, size in available.items() if not size]
        if empty:
            raise TokenizerError(
                f"the text of {', '.join(empty)} is empty: check the corpus files and their text field"
            )
        total: float = sum(available.values())
        shares = {language: size / total for language, size in available.items()}
        if self.balance is not None:
            weights = sum(self.balance.values())
            shares = {language: self.balance[language] / weights for language in available}
            total = min(available[language] / shares[language] for language in available)
        if self.max_bytes is not None:
            total = min(total, self.max_bytes)
        taken = {language: min(available[language], round(total * shares[language])) for language in available}
        return {language: LanguageBytes(available[language], taken[language], shares[language]) for language in taken}


def lines_of(texts: Iterable[str]) -> Iterator[str]:
    """The lines of documents as a tokenizer is trained on them: without line ends, none of them blank."""
    for text in texts:
        for line in text.split("\n"):
            line = line.rstrip("\r")
            if line.strip():
                yield line


def _thinned(lines: Iterable[str], taken: int, available: int) -> Iterator[str]:
    passed = given = 0
    for line in lines:
        size = _size(line)
        passed += size
        if given * available < passed * taken:  # in whole numbers, so that no rounding decides
            given += size
            yield line


def _size(line: str) -> int:
    return len(line.encode(errors="surrogatepass"))  # half of a surrogate pair is refused where it is used
