"""Models that give texts a number, for rules such as a largest perplexity: used only where a profile names them."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_cpt.data.cleaning.profiles import ScorerConfig
from megatron_cpt.errors import CptError, DataError

Scale = Literal["share", "size"]


class Scorer(Protocol):
    """What gives each text a number.

    It must be a pure function of the text, and safe to call from several threads.
    """

    @property
    def scale(self) -> Scale:
        """How its numbers are drawn: "share" from 0 to 1, "size" above 0 on a logarithmic axis."""

    def score(self, texts: Sequence[str]) -> Sequence[float]:
        """One number a text; NaN breaks every rule."""


def open_scorers(scorers: Mapping[str, ScorerConfig]) -> dict[str, Scorer]:
    """Load the scorers of a profile.

    Raises:
        DataError: a library, module or model file is missing, or the options do not fit.
    """
    return {name: _open(name, config) for name, config in scorers.items()}


def _open(name: str, config: ScorerConfig) -> Scorer:
    make = _BUILT_IN.get(config.use) or _named(name, config.use)
    try:
        return make(**config.options)
    except TypeError as caught:
        raise DataError(f"scorer {name}: {config.use} cannot be made with these options ({caught})") from None


def _named(name: str, use: str) -> Callable[..., Scorer]:
    module, colon, attribute = use.partition(":")
    if not colon or not attribute:
        near = difflib.get_close_matches(use, _BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {' or '.join(_BUILT_IN)} or module:attribute"
        raise DataError(f"scorer {name}: no scorer {use!r}; {hint}")
    try:
        made: Any = importlib.import_module(module)
        for part in attribute.split("."):
            made = getattr(made, part)
    except (ImportError, AttributeError) as caught:
        raise DataError(f"scorer {name}: cannot load {use} ({caught}); check the name and PYTHONPATH") from None
    return made  # type: ignore[no-any-return]


def scores(name: str, scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """The numbers of a scorer, one a text; raises CptError where it gives another count of them or fails."""
    try:
        numbers = [float(number) for number in scorer.score(texts)]
    except Exception as caught:
        raise CptError(f"scorer {name} failed: {type(caught).__name__}: {caught}") from caught
    if len(numbers) != len(texts):
        raise CptError(f"scorer {name} gave {len(numbers)} numbers for {len(texts)} texts; expected one each")
    return numbers


def _library(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"the scorer {module} needs a library that is not here: {install}") from None


def _model(path: str) -> str:
    if not Path(path).is_file():
        raise DataError(f"the model {path} of a scorer does not exist; give the option `model` another path")
    return path


class KenlmPerplexity:
    """Perplexity of a text under an n-gram model of KenLM, per word or per SentencePiece piece.

    perplexity = 10 ** (-log10 P(all lines, each with its end) / (words + lines))

    Args:
        model: an .arpa or .bin file.
        pieces: a SentencePiece model that cuts the lines the way the n-gram model was trained; "" for words
            between spaces.
    """

    scale: Scale = "size"

    def __init__(self, model: str, pieces: str = "") -> None:
        self._model = _library("kenlm", "pip install kenlm").Model(_model(model))
        self._pieces: Any = None
        if pieces:
            import sentencepiece

            self._pieces = sentencepiece.SentencePieceProcessor(model_file=_model(pieces))

    def score(self, texts: Sequence[str]) -> list[float]:
        """Perplexities; NaN for a text without words."""
        return [self._perplexity(text) for text in texts]

    def _perplexity(self, text: str) -> float:
        log10, count = 0.0, 0
        for line in text.splitlines():
            words = self._pieces.encode(line, out_type=str) if self._pieces else line.split()
            if words:
                log10 += self._model.score(" ".join(words), bos=True, eos=True)
                count += len(words) + 1
        return math.pow(10.0, min(-log10 / count, 300.0)) if count else math.nan


class FasttextLanguage:
    """Probability that a text is of a language, by a fastText model such as lid.176 or GlotLID.

    Args:
        model: the model file.
        language: the label without its prefix, such as "ja" or "kor_Hang".
        characters: how much of the beginning of a text is looked at.
    """

    scale: Scale = "share"

    def __init__(self, model: str, language: str, characters: float = 2000) -> None:
        self._model = _library("fasttext", "pip install fasttext-predict").load_model(_model(model))
        self._label = f"__label__{language}"
        self._characters = int(characters)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Probabilities, 0 where the language is not among the five likeliest."""
        return [self._probability(text[: self._characters].replace("\n", " ")) for text in texts]

    def _probability(self, line: str) -> float:
        labels, probabilities = self._model.predict(line, k=5)
        return min(1.0, float(dict(zip(labels, probabilities, strict=True)).get(self._label, 0.0)))


_BUILT_IN: dict[str, Callable[..., Scorer]] = {"kenlm": KenlmPerplexity, "fasttext": FasttextLanguage}
