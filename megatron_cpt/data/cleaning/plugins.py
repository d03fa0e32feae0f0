"""Models that give texts a number, for rules such as a largest perplexity: used only where a profile names them."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_cpt.data.cleaning.fasttext_file import check_fasttext_file
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


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"the scorer {module} needs a library that is not here: pip install {package}, or the extra [clean]"
        ) from None


def _load(open_model: Callable[[str], Any], path: str) -> Any:
    if not Path(path).is_file():
        raise DataError(f"the model {path} of a scorer does not exist; give its option another path")
    try:
        return open_model(path)
    except (OSError, RuntimeError, ValueError) as caught:
        raise DataError(f"the model {path} of a scorer cannot be loaded: {caught}") from None


class KenlmPerplexity:
    """Perplexity of a text under an n-gram model of KenLM, per token: word or SentencePiece piece.

    perplexity = 10 ** (-log10 P / tokens), as in CCNet (Wenzek et al. 2020, arXiv:1911.00359): P is the product over
    all lines that are not blank, each with its beginning as context and its end as a token; tokens are the words (or
    pieces) and one end a line. Words that the model does not know have the probability of its `<unk>`, and so have
    `<s>` and `</s>` where a text happens to contain them. The text is taken as it is: a model trained on lower-cased
    text or with digits replaced wants the same of a profile's normalisation, or a scorer of your own.

    KenLM holds Python's lock while it works, so one process scores on one core; `--shard` and `--ray` use more.

    Args:
        model: an .arpa or .bin file; .bin is mapped into memory, which processes of a host share.
        pieces: a SentencePiece model that cuts the lines the way the n-gram model was trained; "" for words
            between spaces.
    """

    scale: Scale = "size"

    def __init__(self, model: str, pieces: str = "") -> None:
        kenlm = _library("kenlm", "kenlm")
        config = kenlm.Config()
        config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        self._model = _load(lambda path: kenlm.Model(path, config), model)
        self._pieces: Any = None
        if pieces:
            import sentencepiece

            self._pieces = _load(lambda path: sentencepiece.SentencePieceProcessor(model_file=path), pieces)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Perplexities; NaN for a text without words."""
        return [self._perplexity(text) for text in texts]

    def _perplexity(self, text: str) -> float:
        log10, tokens = 0.0, 0
        for line in text.splitlines():
            words = self._pieces.encode(line, out_type=str) if self._pieces else line.split()
            if words:
                if "<s>" in words or "</s>" in words:
                    words = ["<unk>" if word in ("<s>", "</s>") else word for word in words]
                log10 += self._model.score(" ".join(words), bos=True, eos=True)
                tokens += len(words) + 1
        return math.pow(10.0, min(-log10 / tokens, 300.0)) if tokens else math.nan


class FasttextLanguage:
    """Probability that a text is of a language, by a fastText model such as lid.176 or GlotLID.

    fastText holds Python's lock while it works, so one process scores on one core. A model file that was cut short,
    or whose sizes do not fit together, is refused before the library sees it.

    Args:
        model: the model file, .bin or .ftz.
        language: the label without its prefix, such as "ja" or "kor_Hang".
        characters: how much of the beginning of a text is looked at.
    """

    scale: Scale = "share"

    def __init__(self, model: str, language: str, characters: float = 2000) -> None:
        fasttext = _library("fasttext", "fasttext-predict")

        def load(path: str) -> Any:
            check_fasttext_file(path)
            loaded = fasttext.load_model(path)
            return loaded, loaded.predict("", k=-1)[0]

        self._model, labels = _load(load, model)
        self._label = f"{_LABEL}{language}"
        self._characters = int(characters)
        known = [label.removeprefix(_LABEL) for label in labels]
        if known and language not in known:  # a model without a vector for the end of a line names none
            near = difflib.get_close_matches(language, known, n=3, cutoff=0.3) or sorted(known)[:10]
            raise DataError(f"the model {model} has no language {language!r}; it has {', '.join(near)}, ...")

    def score(self, texts: Sequence[str]) -> list[float]:
        """Probabilities, 0 where the language is not among the five likeliest."""
        return [self._probability(text[: self._characters].replace("\n", " ")) for text in texts]

    def _probability(self, line: str) -> float:
        labels, probabilities = self._model.predict(line, k=5)
        return min(1.0, float(dict(zip(labels, probabilities, strict=True)).get(self._label, 0.0)))


_LABEL = "__label__"
_BUILT_IN: dict[str, Callable[..., Scorer]] = {"kenlm": KenlmPerplexity, "fasttext": FasttextLanguage}
