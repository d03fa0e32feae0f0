"""The training text of `tokenizer train`, `extend`, `replace` and `sweep`: files by language, in shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.tokenizer.texts import read_texts
from megatron_cpt.config.schema import LANGUAGE_PATTERN
from megatron_cpt.errors import InputError

if TYPE_CHECKING:
    from megatron_cpt.tokenizer import TextMixture

Corpus = Annotated[
    list[str],
    typer.Option(
        metavar="[LANG=]FILE...", help="Corpus, with its language: .jsonl or .txt (also .gz, .zst), or .parquet."
    ),
]
MoreCorpus = Annotated[list[str] | None, typer.Argument(metavar="[LANG=]FILE", show_default=False, hidden=True)]
Balance = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LANG=SHARE,...",
        help="Share of each language in the bytes trained on, such as ja=2,en=1; by default all text is used as it is.",
    ),
]
MaxBytes = Annotated[
    int | None, typer.Option(min=1, help="Train on this many bytes at most, taken evenly from the whole corpus.")
]
Coverage = Annotated[float, typer.Option(help="Share of the text's characters that get a piece.")]
Presegment = Annotated[
    str,
    typer.Option(
        metavar="MODULE:FUNCTION|COMMAND",
        help="Finds words that no piece may cross, in the training only: gives each line back with spaces between "
        "its words, such as 'mecab -Owakati'.",
    ),
]

Advance = Callable[[int, int], None]


class FileTexts:
    """The documents of corpus files; reading begins again with each iteration."""

    def __init__(self, files: list[Path], text_field: str, language: str, advance: Advance | None) -> None:
        self._arguments = (files, text_field, language, advance)

    def __iter__(self) -> Iterator[str]:
        """The texts, file by file."""
        return read_texts(*self._arguments)


def corpora_of(options: list[str], language: str) -> dict[str, list[Path]]:
    """The files of options [LANG=]FILE by their language; those without one are of `language`."""
    files: dict[str, list[Path]] = {}
    for option in options:
        name, equals, file = option.partition("=")
        named = equals and file and re.fullmatch(LANGUAGE_PATTERN, name) and not Path(option).exists()
        files.setdefault(name if named else language, []).append(Path(file if named else option))
    return files


def corpus_texts(
    files: dict[str, list[Path]],
    text_field: str,
    balance: list[str] | None,
    max_bytes: int | None,
    advance: Advance | None,
) -> TextMixture | FileTexts:
    """The documents of all files; a mixture where there are several languages, shares, or a limit."""
    from megatron_cpt.tokenizer import TextMixture

    texts: dict[str, Iterable[str]] = {
        language: FileTexts(own, text_field, language, advance) for language, own in files.items()
    }
    shares = _shares(balance)
    if len(files) == 1 and shares is None and max_bytes is None:
        return FileTexts(next(iter(files.values())), text_field, next(iter(files)), advance)
    return TextMixture(texts, shares, max_bytes)


def _shares(options: list[str] | None) -> dict[str, float] | None:
    if not options:
        return None
    shares: dict[str, float] = {}
    for option in (part for text in options for part in text.split(",")):
        language, _, share = option.strip().partition("=")
        try:
            shares[language] = float(share)
        except ValueError:
            raise InputError(f"--balance {option!r}: expected LANG=SHARE, such as ja=2,en=1") from None
    return shares
