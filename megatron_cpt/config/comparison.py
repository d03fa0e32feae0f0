"""A comparison: several ways to begin the adaptation of one base, told apart by the same steps and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_cpt.config.layers import Layers
from megatron_cpt.config.loading import Resolved, load_config, resolve
from megatron_cpt.config.schema import Language, LearnConfig, LlamaShape, RunConfig
from megatron_cpt.config.section import Positive, Section
from megatron_cpt.config.surgery import ArmSurgeryConfig, SurgeryConfig
from megatron_cpt.errors import ConfigError

TRAINED = "trained"  # as a method's helper or donor: the one that the comparison trains itself
# What an arm may not change: the curves would have other axes.
_SHARED = ("train_steps", "batch", "eval_interval_steps")


class ArmConfig(Section):
    """One way to begin, and what it changes of the training that all share.

    `scratch` begins with random weights in the new vocabulary; `tokenizer: base` keeps the base and its vocabulary.
    """

    scratch: bool = False
    tokenizer: Literal["adapted", "base"] = "adapted"
    surgery: ArmSurgeryConfig | None = None  # None: the comparison's own
    train: dict[str, Any] = {}  # changes of the comparison's `train`


class HelperConfig(Section):
    """The model that arms name as `helper: trained` or `donor: trained`.

    It has the new vocabulary and is trained from random weights on the target text, once for each seed.
    """

    shape: LlamaShape
    train: LearnConfig


class ComparisonConfig(RunConfig):
    """A run whose surgery has several arms; everything else is made once for each seed and shared."""

    surgery: ArmSurgeryConfig = ArmSurgeryConfig()  # of arms that state none
    # seed, seed + 1, ...: of the base, the order of the data, drawn rows, and the helper.
    num_seeds: Positive = 3
    control: Language | tuple[Language, ...] = ()  # the arms that the others are measured against; empty: the first
    arms: dict[Language, ArmConfig] = Field(min_length=1)
    helper: HelperConfig | None = None
    keep_models: bool = False  # the weights of each arm, which else go when its curve is known

    @property
    def seeds(self) -> range:
        """Every arm is run with each of these."""
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the arms that the others are measured against."""
        given = (self.control,) if isinstance(self.control, str) else self.control
        return given or (next(iter(self.arms)),)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a training step."""
        return self.train.batch.global_batch_size * self.train.batch.seq_length

    def surgery_of(self, arm: str) -> SurgeryConfig | None:
        """How an arm's rows are made; None where it begins without surgery."""
        stated = self.arms[arm]
        without = stated.scratch or stated.tokenizer == "base"
        return None if without else stated.surgery or self.surgery

    def steps_of_calibration(self, arm: str) -> int:
        """Steps that an arm trains less because it has read their tokens before."""
        surgery = self.surgery_of(arm)
        if surgery is None or surgery.calibration is None:
            return 0
        return -(-surgery.calibration.tokens // self.tokens_per_step)

    def wants_helper(self, arm: str) -> bool:
        """Whether an arm reads the model that the comparison trains."""
        surgery = self.surgery_of(arm)
        methods = () if surgery is None else (surgery.embedding, surgery.head)
        return any(TRAINED in method.models for method in methods)


def load_comparison(source: str | Path, overrides: Sequence[str] = ()) -> Resolved[ComparisonConfig]:
    """Load a comparison from a YAML file, which may extend a recipe.

    Raises:
        ConfigError: anything unreadable, unknown, out of range or against a rule; one line for each problem.
    """
    resolved = load_config(source, ComparisonConfig, overrides)
    problems = list(_problems(resolved.config))
    if problems:
        header = f"{source} has {len(problems)} problems:\n  " if len(problems) > 1 else ""
        raise ConfigError(header + "\n  ".join(problems))
    for arm in resolved.config.arms:
        run_with_seed(resolved.config, resolved.config.seed, arm)
    return resolved


def _problems(config: ComparisonConfig) -> Iterator[str]:
    for name in config.controls:
        if name not in config.arms:
            yield f"control: got {name!r}, expected an arm: {', '.join(config.arms)}"
    if config.tokenizer.method == "none":
        yield (
            "tokenizer.method: got none, expected extend or replace, for without a new vocabulary there are no new "
            "rows to compare; an arm of its own keeps the base's: arms.plain.tokenizer=base"
        )
    for name, arm in config.arms.items():
        if arm.scratch and arm.tokenizer == "base":
            yield f"arms.{name}: got scratch and also tokenizer: base, expected one of the two; leave one out"
        if arm.surgery is not None and config.surgery_of(name) is None:
            yield f"arms.{name}: got surgery for an arm that begins without; leave surgery out, or what is beside it"
        if arm.surgery is not None and arm.surgery.problem is not None:
            yield f"arms.{name}.surgery: {arm.surgery.problem}"
        if config.wants_helper(name) and config.helper is None:
            yield f"arms.{name}: names the {TRAINED!r} helper, but there is no `helper` with shape and train; add it"
        for key in _SHARED:
            if key in arm.train:
                yield f"arms.{name}.train.{key}: arms are compared at the same steps; change train.{key} for all"
        if config.steps_of_calibration(name) >= config.train.train_steps:
            yield (
                f"arms.{name}: calibration reads the tokens of {config.steps_of_calibration(name)} steps, all of "
                f"train.train_steps = {config.train.train_steps}; lower prior_tokens or steps"
            )
    helper = config.helper
    if helper is not None and helper.train.batch.seq_length > helper.shape.max_position_embeddings:
        yield (
            f"helper.train.batch.seq_length: got {helper.train.batch.seq_length}, expected at most helper.shape."
            f"max_position_embeddings = {helper.shape.max_position_embeddings}; change one of them"
        )


def run_with_seed(config: ComparisonConfig, seed: int, arm: str | None = None) -> Resolved[RunConfig]:
    """The run that makes what the arms share with one seed, or the run that an arm is; in the seed's folder.

    Methods and calibration that draw at random draw anew for each seed.

    Raises:
        ConfigError: what the arm changes of `train` does not fit.
    """
    layers = Layers("shared" if arm is None else f"arm {arm}")
    layers.tree = config.model_dump(mode="json", include=set(RunConfig.model_fields))
    layers.tree |= {"output": f"{config.output}/seed{seed}", "seed": seed}
    if arm is None:
        return resolve(layers, RunConfig)
    if config.arms[arm].tokenizer == "base":
        layers.tree["tokenizer"]["method"] = "none"
    surgery = config.surgery_of(arm)
    if surgery is not None:
        layers.tree["surgery"] = _drawn_anew(surgery.model_dump(mode="json"), seed - config.seed)
    layers.overlay({"train": config.arms[arm].train}, f"arms.{arm}")
    layers.tree["train"]["train_steps"] -= config.steps_of_calibration(arm)
    try:
        return resolve(layers, RunConfig)
    except ConfigError as caught:
        text = str(caught).replace("--set train.", f"--set arms.{arm}.train.")
        raise ConfigError(f"arms.{arm}: {text}") from None


def _drawn_anew(surgery: dict[str, Any], shift: int) -> dict[str, Any]:
    """The sections of a surgery, every seed in them moved on."""
    return {
        name: {**section, "seed": section["seed"] + shift} if section and "seed" in section else section
        for name, section in surgery.items()
    }


def describe_arm(config: ComparisonConfig, arm: str) -> str:
    """How an arm begins, in some words."""
    stated = config.arms[arm]
    surgery = config.surgery_of(arm)
    if surgery is None:
        words = "random weights" if stated.scratch else "the base and its vocabulary"
    else:
        embedding, head = (_words(section) for section in (surgery.embedding, surgery.head))
        words = f"both {embedding}" if embedding == head else f"embedding {embedding}, head {head}"
        if surgery.calibration is not None:
            words += f"; calibrated{_changes(surgery.calibration)}"
    return words + (f"; train {stated.train}" if stated.train else "")


def _words(method: Section) -> str:
    return f"{method.model_dump()['method']}{_changes(method)}"


def _changes(section: Section) -> str:
    """What a section states that is not the default, in brackets."""
    stated = section.model_dump(exclude_defaults=True, exclude={"method"})
    return f" ({', '.join(f'{key}={value}' for key, value in stated.items())})" if stated else ""
