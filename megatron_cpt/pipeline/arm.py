"""One arm of a comparison with one seed: a run that shares everything but its rows and its training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint import convert, read_shape
from megatron_cpt.config.comparison import TRAINED, ComparisonConfig, HelperConfig, run_with_seed
from megatron_cpt.config.schema import TrainDataConfig
from megatron_cpt.config.surgery import CalibrationConfig
from megatron_cpt.errors import TooLittleText
from megatron_cpt.pipeline.measuring import Paths, history_of
from megatron_cpt.pipeline.run import Run, validation
from megatron_cpt.pipeline.steps import Steps
from megatron_cpt.surgery import SurgeryPlan
from megatron_cpt.training.folder import CHECKPOINTS, INITIAL
from megatron_cpt.training.job import run_job
from megatron_cpt.training.metrics import read_metrics

HELPER = "helper"
_IN_BASE_TOKENS = {"tokenizer": "base_tokenizer", "shards": "shards_base"}


class StepsOfArm(Steps):
    """The steps of an arm, kept among the steps of its seed under names of their own.

    Args:
        shared: the steps of the seed.
        arm: its name.
        renamed: steps of the seed that this arm needs in place of others.
        without: steps that it does not have.
        more: further settings on which the arm's own steps depend, and steps that they need.
    """

    def __init__(
        self,
        shared: Steps,
        arm: str,
        renamed: Mapping[str, str],
        without: frozenset[str],
        more: tuple[Mapping[str, Any], tuple[str, ...]],
    ) -> None:
        super().__init__(shared.root)
        self.steps = shared.steps
        self._arm, self._renamed, self._without, self._more = arm, renamed, without, more

    def add(
        self,
        name: str,
        title: str,
        settings: Mapping[str, Any],
        needs: tuple[str, ...],
        action: Callable[[], dict[str, Any]],
        **options: Any,
    ) -> None:
        """Add a step of the arm, as `Steps.add` does, where the seed has it not yet."""
        own = self.named(name)
        if own in {step.name for step in self.steps}:
            return
        is_own = own not in self._renamed.values()
        further, also_needed = self._more if is_own else ({}, ())
        needed = (*(self.named(need) for need in needs if need not in self._without), *also_needed)
        title = f"{self._arm}: {title}" if is_own else title
        super().add(own, title, {**settings, **further}, tuple(dict.fromkeys(needed)), action, **options)

    def named(self, name: str) -> str:
        """What a step of a run is called here."""
        if name in ("surgery", "train"):
            return f"{self._arm}.{name}"
        return self._renamed.get(name, name)


class Arm(Run):
    """An arm with one seed.

    Args:
        comparison: all arms.
        name: of this one.
        shared: the run that makes what all arms of this seed share, its steps added.
    """

    def __init__(self, comparison: ComparisonConfig, name: str, shared: Run) -> None:
        super().__init__(run_with_seed(comparison, shared.config.seed, name))
        self.name, self.stated, self.keep_models = name, comparison.arms[name], comparison.keep_models
        self.source, self.target = shared.source, shared.target
        self.paths = Paths(self.root, self.config, name)
        self.has_surgery = comparison.surgery_of(name) is not None
        helper = (HELPER,) if comparison.wants_helper(name) else ()
        self.own_models = {TRAINED: helper_folder(self.root)} if helper else {}
        self.steps: StepsOfArm = StepsOfArm(
            shared.steps,
            name,
            _IN_BASE_TOKENS if self.stated.tokenizer == "base" else {},
            frozenset() if self.has_surgery else frozenset({"surgery"}),
            ({"scratch": self.stated.scratch}, helper),
        )

    def add_steps(self) -> None:
        """Add the arm's steps to those of its seed."""
        if self.stated.tokenizer == "base":
            self._shards()
        if self.has_surgery:
            self._surgery()
        self._adapt()

    def found(self) -> dict[str, Any]:
        """What the arm's training found, with the `certificate` of its surgery, if it had one."""
        surgery = self.steps.facts(self.steps.named("surgery")) if self.has_surgery else {}
        made = {key: value for key, value in surgery.items() if key in ("certificate", "calibration")}
        return {**self.steps.facts(self.steps.named("train")), **made}

    def _calibrated(self, plan: SurgeryPlan, settings: CalibrationConfig) -> tuple[SurgeryPlan, dict[str, Any]]:
        """As a run does, but what is taken off the arm's training has to have been read."""
        made, facts = super()._calibrated(plan, settings)
        missing = settings.tokens - facts.get("tokens", 0)
        if missing >= settings.seq_length:
            raise TooLittleText(
                facts.get("left_out")
                or f"calibration read {missing:,} tokens less than are taken off the training of {self.name}: give "
                "more text, or lower prior_tokens"
            )
        return made, facts

    def _start(self) -> dict[str, Any]:
        if not self.stated.scratch:
            return super()._start()
        return {"shape": self.config.base.shape or read_shape(self.paths.base_model)[0]}

    def _train(self) -> dict[str, Any]:
        super()._train()
        metrics = read_metrics(self.paths.train)
        if not self.keep_models:  # what is left are the plan, the metrics and this record
            weights = [self.paths.train / INITIAL, self.paths.train / CHECKPOINTS]
            for folder in (*weights, *((self.paths.operated_model,) if self.has_surgery else ())):
                shutil.rmtree(folder, ignore_errors=True)
        return {"history": history_of(metrics), "bytes": _bytes_read(metrics)}


def _bytes_read(metrics: list[dict[str, Any]]) -> int:
    """UTF-8 bytes of the text that a job was trained on."""
    read, before = 0.0, 0
    for record in metrics:
        if "loss" in record:
            read += (record["tokens"] - before) * record["bytes_per_second"] / record["tokens_per_second"]
            before = record["tokens"]
    return round(read)


def helper_folder(root: Path) -> Path:
    """Hugging Face folder of a seed's helper."""
    return root / HELPER / "hf"


def add_helper(shared: Run, helper: HelperConfig) -> None:
    """Add the step that trains the helper on target text, with the new vocabulary."""
    paths, target = shared.paths, shared.target
    job_folder, model = paths.root / HELPER / "train", helper_folder(paths.root)

    def train() -> dict[str, Any]:
        everything = shared.config.training_data(str(paths.shards)).train
        texts = tuple(source for source in everything if source.language == target.language)
        data = TrainDataConfig(train=texts, validation=validation(paths.shards, (target,)))
        job = shared.job(helper.train, job_folder, paths.tokenizer, data, shape=helper.shape)
        checkpoint = run_job(job, helper.train.num_processes)
        convert(checkpoint, model, "hf", tokenizer=paths.tokenizer)
        return {"history": history_of(read_metrics(job_folder))}

    settings = {**helper.model_dump(), "seed": shared.config.seed, "vocab_divisor": shared.config.vocab_divisor}
    title = f"train the helper on {target.language} text"
    makes = (job_folder, model)
    shared.steps.add(HELPER, title, settings, ("tokenizer", "shards"), train, makes=makes, resumable=job_folder)
