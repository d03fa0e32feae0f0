"""How the rows of new pieces are made: one section for each method, with the settings that it has.

In a configuration a method without settings of its own may stand as its name alone: `embedding: mean`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from megatron_cpt.config.section import NonNegative, Positive, PositiveFloat, Section
from megatron_cpt.errors import ConfigError

MODEL_FIELDS = ("helper", "donor")  # settings of methods that name a model beside the base


class Method(Section):
    """What every method has.

    `copy_kept: false` makes the rows of pieces that the base has anew as well, as a control; bytes and
    specials too. `match_norm` scales each new row to the mean norm of the old rows.
    """

    match_norm: bool = False
    copy_kept: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """Files of text that the method reads, as far as the settings name any."""
        return ()

    @property
    def models(self) -> tuple[str, ...]:
        """Folders of models that it reads, beside the base: what `MODEL_FIELDS` of it name."""
        return tuple(getattr(self, name) for name in MODEL_FIELDS if name in type(self).model_fields)


class PiecesMethod(Method):
    """From the rows of the old pieces that a new piece is cut into.

    mean: their mean. first, last: that one's row. position: weighted 1, 2, ..., n.
    """

    method: Literal["mean", "first", "last", "position"] = "mean"


class SameMethod(Method):
    """One row for all new pieces: zero, or the mean of all old rows."""

    method: Literal["zero", "global_mean"]


class InheritMethod(Method):
    """The row that the base has at the same id, whatever its piece; the mean of old pieces beyond the base's size."""

    method: Literal["inherit"]


class NormalMethod(Method):
    """Independent N(0, std) numbers: what a new model begins with."""

    method: Literal["normal"]
    std: PositiveFloat = 0.02
    seed: NonNegative = 1


class CovarianceMethod(Method):
    """A draw from the normal distribution that has the old rows' mean and covariance."""

    method: Literal["covariance"]
    seed: NonNegative = 1


class ClpMethod(Method):
    """CLP-Transfer: old rows of shared pieces, weighted by similarity in a helper model of the new tokenizer.

    topk: softmax(cosine / temperature) over the `top_k` most similar. clamped: cosines, the negative ones 0.
    published: all cosines, signed, by their sum.
    """

    method: Literal["clp"]
    helper: str  # Hugging Face folder of a model with the new tokenizer
    form: Literal["topk", "clamped", "published"] = "topk"
    top_k: Positive = 10
    temperature: PositiveFloat = 0.1


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Files = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class TextMethod(Method):
    """Of each corpus that a method reads, the first `max_bytes` bytes are used.

    A corpus is one file or a list of them (jsonl, txt, parquet). Inside a recipe it may be left out: then it is
    the recipe's own training text of that side.
    """

    max_bytes: Positive = 50_000_000


class AlignedMethod(TextMethod):
    """The mean of the old pieces that a new piece overlaps in real text, weighted by how often it does."""

    method: Literal["aligned"]
    target_corpus: Files = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The corpus."""
        return self.target_corpus


class VectorsMethod(TextMethod):
    """Methods that make a static vector for each piece from what stands around it."""

    dimension: Positive = 100
    window: Positive = 5  # pieces to either side
    min_count: Positive = 10  # rarer pieces get no vector


class FocusMethod(VectorsMethod):
    """FOCUS: old rows of shared pieces, by sparsemax of the similarity of static vectors.

    The vectors are of the new tokenizer's pieces in texts of both languages. `target_only`: in the target's alone, as
    published; then new pieces are like those few old ones that the target's text holds, and the source loses more.
    """

    method: Literal["focus"]
    source_corpus: Files = ()
    target_corpus: Files = ()
    target_only: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """The corpora."""
        return self.target_corpus if self.target_only else (*self.source_corpus, *self.target_corpus)


class WechselMethod(VectorsMethod):
    """WECHSEL: old rows, by similarity of static vectors of two languages that were aligned with each other.

    The pairs that align them are the pieces that both vocabularies share, and those of `dictionary`: a line
    with a word of each language, the source's first, with a tab between.
    """

    method: Literal["wechsel"]
    source_corpus: Files = ()
    target_corpus: Files = ()
    dictionary: str | None = None
    top_k: Positive = 10
    temperature: PositiveFloat = 0.1

    @property
    def files(self) -> tuple[str, ...]:
        """Both corpora and the dictionary."""
        dictionary = () if self.dictionary is None else (self.dictionary,)
        return (*self.source_corpus, *self.target_corpus, *dictionary)


class OmpMethod(Method):
    """Orthogonal matching pursuit: the sparse sum that makes a piece's row in a donor, of the base's rows."""

    method: Literal["omp"]
    donor: str  # Hugging Face folder of a model, with its tokenizer, that has the new pieces
    num_atoms: Positive = 64


METHODS = (
    PiecesMethod,
    SameMethod,
    InheritMethod,
    NormalMethod,
    CovarianceMethod,
    AlignedMethod,
    ClpMethod,
    FocusMethod,
    WechselMethod,
    OmpMethod,
)


def _names(section: type[Method]) -> tuple[str, ...]:
    names: tuple[str, ...] = get_args(section.model_fields["method"].annotation)
    return names


METHOD_NAMES: tuple[str, ...] = tuple(name for section in METHODS for name in _names(section))


def _by_name(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


MatrixMethod = Annotated[
    PiecesMethod
    | SameMethod
    | InheritMethod
    | NormalMethod
    | CovarianceMethod
    | AlignedMethod
    | ClpMethod
    | FocusMethod
    | WechselMethod
    | OmpMethod,
    Field(discriminator="method"),
    BeforeValidator(_by_name),
]


class CalibrationConfig(Section):
    """A handful of numbers for all new rows, found on a little text of both languages with the model frozen.

    First the prior: vectors of the pieces, of `dimension` numbers (0: none), from `counted_tokens` of the target's
    dataset, and a forward pass over `prior_tokens` (0: no prior). Then `steps` of Adam. Samples are of `seq_length`
    tokens, or of the base's longest, if that is less.
    """

    prior_tokens: NonNegative = 16384
    dimension: Annotated[int, Field(ge=0, le=1024)] = 64
    counted_tokens: Positive = 20_000_000
    steps: NonNegative = 0
    step_tokens: Positive = 1024
    seq_length: Positive = 128
    learning_rate: PositiveFloat = 0.05  # of an offset, in units of the root mean square of the old rows
    rank: NonNegative = 8  # of the map of the head's new rows; 0: none
    source_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5  # of the text
    seed: NonNegative = 1

    @model_validator(mode="after")
    def _does_something(self) -> CalibrationConfig:
        if not self.prior_tokens and not self.steps:
            raise ValueError("prior_tokens or steps above 0, or null for no calibration")
        return self

    @property
    def tokens(self) -> int:
        """At most this many are read, in whole samples: for the prior, for the size of a step, and for each step."""
        batches = self.steps + 1 if self.steps else 0
        samples = -(-self.prior_tokens // self.seq_length) - batches * (-self.step_tokens // self.seq_length)
        return samples * self.seq_length


class SurgeryConfig(Section):
    """How the rows of new pieces are made, for each matrix."""

    embedding: MatrixMethod = PiecesMethod()
    head: MatrixMethod = PiecesMethod()
    calibration: CalibrationConfig | None = CalibrationConfig()  # null: the rows as the methods make them

    @property
    def problem(self) -> str | None:
        """What its parts do not mean together."""
        if self.calibration is None or (self.embedding.copy_kept and self.head.copy_kept):
            return None
        return (
            "got calibration, which is of new pieces alone, and also copy_kept: false, which makes the rows of kept "
            "ones anew; give calibration: null, or copy the kept rows"
        )


class ArmSurgeryConfig(SurgeryConfig):
    """The surgery of an arm of a comparison: its methods alone, unless a calibration is stated."""

    calibration: CalibrationConfig | None = None


def parse_method(value: Any) -> Method:
    """A method from its name, or from its name and settings as a mapping.

    Raises:
        ConfigError: no such method, or a setting that it does not have; one line for each problem.
    """
    try:
        parsed: Method = TypeAdapter(MatrixMethod).validate_python(value)
    except ValidationError as caught:
        raise ConfigError("\n".join(_lines(caught, value))) from None
    return parsed


def parse_calibration(value: Any) -> CalibrationConfig:
    """The settings of a calibration from a mapping.

    Raises:
        ConfigError: a setting that it does not have, or a value out of range.
    """
    try:
        return CalibrationConfig.model_validate(value)
    except ValidationError as caught:
        raise ConfigError("\n".join(map(_line_of_calibration, caught.errors(include_url=False)))) from None


def _line_of_calibration(error: Any) -> str:
    if error["type"] == "value_error":
        return f"calibration: got {error['input']}, expected {error['ctx']['error']}"
    if not error["loc"]:
        return f"calibration: got {error['input']!r}, expected settings with values"
    name = error["loc"][0]
    if error["type"] == "extra_forbidden":
        return f"calibration has no setting {name}: expected one of {', '.join(CalibrationConfig.model_fields)}"
    return f"calibration: {name} is {error['input']!r}; {error['msg']}"


def _lines(caught: ValidationError, value: Any) -> Sequence[str]:
    name = value.get("method") if isinstance(value, dict) else value
    lines = []
    for error in caught.errors(include_url=False):
        if error["type"].startswith("union_tag"):
            lines.append(f"surgery method {name!r} is unknown: expected one of {', '.join(METHOD_NAMES)}")
            continue
        setting = ".".join(str(part) for part in error["loc"][1:])
        if error["type"] == "missing":
            lines.append(f"surgery method {name} needs {setting}: give --set {setting}=VALUE")
        elif error["type"] == "extra_forbidden":
            known = next(section for section in METHODS if name in _names(section)).model_fields
            near = [field for field in known if len(setting) > 2 and setting in field] or difflib.get_close_matches(
                setting, known
            )
            hint = f"did you mean {' or '.join(near)}?" if near else "leave it out"
            lines.append(f"surgery method {name} has no setting {setting}: {hint}")
        else:
            lines.append(f"surgery method {name}: {setting} is {error['input']!r}; {error['msg']}")
    return lines
