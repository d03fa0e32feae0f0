"""`surgery compare`: ways of making new rows, run at the same steps with several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cpt.config.comparison import ComparisonConfig, describe_arm, run_with_seed
from megatron_cpt.config.loading import Resolved
from megatron_cpt.config.manifest import sha256_json
from megatron_cpt.errors import CptError
from megatron_cpt.pipeline.arm import Arm, add_helper
from megatron_cpt.pipeline.claim import claim, refuse_foreign
from megatron_cpt.pipeline.corpus import open_corpora
from megatron_cpt.pipeline.measuring import versions
from megatron_cpt.pipeline.run import Run
from megatron_cpt.pipeline.steps import Steps
from megatron_cpt.reporting.comparison import write_comparison
from megatron_cpt.runtime.lock import lock_folder

# What a comparison may change in its folder: what is there already is found again.
_FREE = {"output", "arms", "control", "num_seeds", "keep_models"}


def compare(resolved: Resolved[ComparisonConfig]) -> dict[str, Any]:
    """Run every arm with every seed; what was finished before is not done again.

    The report is written after each seed, so that it can be read while the next one runs.

    Returns:
        The report, as written to `comparison.json`.

    Raises:
        CptError: some arm has failed; the report holds the others.
    """
    config, root = resolved.config, Path(resolved.config.output)
    if config.data.builtin is None:
        open_corpora(config.data)  # a missing file is refused before anything is written
    refuse_foreign(root)
    with lock_folder(root):
        seeds = {seed: Seed(config, seed) for seed in config.seeds}
        identity = sha256_json({"comparison": config.model_dump(mode="json", exclude=_FREE)})
        has_begun = any(seed.steps.any_done() for seed in seeds.values())
        claim(root, config.name, identity, resolved.dump(), has_begun)
        report: dict[str, Any] = {}
        for number, seed in enumerate(seeds.values(), 1):
            print(f"seed {seed.number} ({number} of {len(seeds)})", flush=True)
            seed.run()
            report = write_comparison(_facts(resolved, seeds), root)
    failed = report["failed"]
    if failed:
        lines = "\n  ".join(f"{place}: {error}" for place, error in failed.items())
        raise CptError(
            f"{len(failed)} of {len(config.arms) * len(seeds)} trainings have failed; {root / 'comparison.md'} holds "
            f"the others, and the same command tries these again:\n  {lines}"
        )
    return report


class Seed:
    """What is made with one seed: everything that is shared, then each arm."""

    def __init__(self, config: ComparisonConfig, number: int) -> None:
        self.config, self.number = config, number
        self.steps = Steps(Path(config.output) / f"seed{number}")
        self.arms: dict[str, Arm] = {}
        self.failed: dict[str, CptError] = {}

    def run(self) -> None:
        """Do every step that is not done; what fails of an arm stands in `failed`.

        Raises:
            CptError: a shared step has failed.
        """
        config = self.config
        shared = Run(run_with_seed(config, self.number))
        shared.steps = self.steps
        shared.share()
        if config.helper is not None and any(map(config.wants_helper, config.arms)):
            add_helper(shared, config.helper)
        shared_steps = {step.name for step in self.steps.steps}
        arms = {name: Arm(config, name, shared) for name in config.arms}
        for arm in arms.values():
            arm.add_steps()
        failures = self.steps.run_all()
        for step in shared_steps & failures.keys():
            raise failures[step]
        trained = {name: arm.steps.named("train") for name, arm in arms.items()}
        self.failed = {name: failures[step] for name, step in trained.items() if step in failures}
        self.arms = {name: arm for name, arm in arms.items() if name not in self.failed}


def _facts(resolved: Resolved[ComparisonConfig], seeds: dict[int, Seed]) -> dict[str, Any]:
    config = resolved.config
    arms = {}
    for name in config.arms:
        runs = {str(seed.number): seed.arms[name].found() for seed in seeds.values() if name in seed.arms}
        arms[name] = {
            "begins_with": describe_arm(config, name),
            "steps_of_calibration": config.steps_of_calibration(name),
            "runs": runs,
        }
    return {
        "name": config.name,
        "languages": {"source": config.data.source_language, "target": config.data.target_language},
        "seeds": list(config.seeds),
        "controls": list(config.controls),
        "train_steps": config.train.train_steps,
        "eval_interval_steps": config.train.eval_interval_steps,
        "tokens_per_step": config.tokens_per_step,
        "arms": arms,
        "failed": {
            f"seed {seed.number}, {name}": str(error) for seed in seeds.values() for name, error in seed.failed.items()
        },
        "versions": versions(),
        "config_hash": resolved.hash,
    }
