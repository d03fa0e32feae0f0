"""`megatron-cpt surgery compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, SetOption, emit, stdout_for_results

if TYPE_CHECKING:
    from megatron_cpt.config.comparison import ComparisonConfig
    from megatron_cpt.config.loading import Resolved


def compare(
    config: Annotated[str, typer.Argument(help="YAML file of a comparison (examples/comparisons).")],
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train one base from several beginnings, at the same steps with several seeds, and compare bits per byte.

    Writes comparison.md, .png, .csv and .json into the output folder. What is finished is not done again: stopped, the
    same command goes on; arms and seeds may be added.
    """
    from megatron_cpt.config.comparison import load_comparison

    resolved = load_comparison(config, overrides or [])
    plan = _plan(resolved)  # an impossible layout is refused before anything is made
    if dry_run:
        from megatron_cpt.pipeline.corpus import open_corpora

        if resolved.config.data.builtin is None:
            open_corpora(resolved.config.data)
        emit(plan, as_json, _render_plan)
        return
    from megatron_cpt.pipeline.compare import compare as run

    with stdout_for_results(as_json):
        report = run(resolved)
    emit(report, as_json, lambda value: _summary(value, resolved.config.output))


def _plan(resolved: Resolved[ComparisonConfig]) -> dict[str, Any]:
    """Steps and tokens of every arm and of what they share, and the layouts of the jobs."""
    from megatron_cpt.cli.plan import describe, plan_learn
    from megatron_cpt.config.comparison import describe_arm, run_with_seed

    config = resolved.config
    jobs = describe(run_with_seed(config, config.seed))["jobs"]
    tokens = {"base": jobs["base"]["tokens"]["total"] if "base" in jobs else 0, "helper": 0}
    if config.helper is not None and any(map(config.wants_helper, config.arms)):
        vocab_size = jobs["adapt"]["vocabulary"]["vocab_size"]
        helper = config.helper
        jobs["helper"] = plan_learn("helper.train", helper.train, helper.shape, vocab_size, config.vocab_divisor)
        tokens["helper"] = jobs["helper"]["tokens"]["total"]
    arms = {}
    for name in config.arms:
        calibration = config.steps_of_calibration(name)
        steps = config.train.train_steps - calibration
        arms[name] = {
            "begins_with": describe_arm(config, name),
            "steps_of_calibration": calibration,
            "train_steps": steps,
            "train_tokens": steps * config.tokens_per_step,
        }
    each = tokens["base"] + tokens["helper"] + len(arms) * config.train.train_steps * config.tokens_per_step
    return {
        "name": config.name,
        "output": config.output,
        "seeds": list(config.seeds),
        "controls": list(config.controls),
        "tokens_per_step": config.tokens_per_step,
        "shared_tokens": tokens,
        "arms": arms,
        "tokens_in_all": each * len(config.seeds),
        "jobs": jobs,
        "config_hash": resolved.hash,
    }


def _render_plan(plan: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="")
    table.add_column("arm")
    table.add_column("begins with")
    for column in ("steps of calibration", "of training", "tokens of training"):
        table.add_column(column, justify="right")
    for name, arm in plan["arms"].items():
        counts = [f"{arm[key]:,}" for key in ("steps_of_calibration", "train_steps", "train_tokens")]
        table.add_row(name, Text(arm["begins_with"]), *counts)
    shared = ", ".join(f"{name} {tokens:,}" for name, tokens in plan["shared_tokens"].items() if tokens)
    return Group(
        Text(f"{plan['name']}: {len(plan['arms'])} arms with seeds {', '.join(map(str, plan['seeds']))}"),
        Text(f"measured against {', '.join(plan['controls'])}; {plan['tokens_per_step']:,} tokens a step\n"),
        table,
        Text(f"\ntokens of training that the arms of a seed share: {shared or 'none'}"),
        Text(f"tokens in all: {plan['tokens_in_all']:,}"),
    )


def _summary(report: dict[str, Any], output: str) -> Any:
    from rich.console import Group
    from rich.text import Text

    from megatron_cpt.reporting.comparison import summary_tables

    parts: list[Any] = []
    for title, head, rows in summary_tables(report):
        parts += [Text(f"\n{title}"), _table(head, rows)]
    return Group(*parts, Text(f"\nreport: {output}/comparison.md"))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="")
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
