"""`megatron-cpt plan`: what a configuration means, before anything is started."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, SetOption, emit
from megatron_cpt.config.loading import Resolved, load_any_config
from megatron_cpt.config.schema import LearnConfig, LlamaShape, RunConfig, TrainConfig
from megatron_cpt.errors import ConfigError

app = typer.Typer(help="Show what a configuration means.")


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="Recipe name or YAML file, of a whole run or of one training job.")],
    overrides: SetOption = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes of a training job.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print every value with its origin, and the parameters, tokens per step, layout, memory and data of each job."""
    resolved = load_any_config(config, overrides or [])
    emit(describe(resolved, nproc), as_json, lambda value: render(value, resolved))


def describe(resolved: Resolved[RunConfig] | Resolved[TrainConfig], nproc: int | None = None) -> dict[str, Any]:
    """The plan of a run or a training job, for `plan` and for `--dry-run`.

    Args:
        resolved: a loaded configuration.
        nproc: processes of a training job; None takes WORLD_SIZE, else one copy of the model. A run
            states its own.

    Returns:
        `config`, `config_hash` and `jobs`: name -> what `planning.plan_job` returns.

    Raises:
        ConfigError: an impossible layout; CheckpointError, TokenizerError: a model or tokenizer
            that the configuration names cannot be read.
    """
    config = resolved.config
    jobs = _plan_run(config) if isinstance(config, RunConfig) else {"train": _plan_train(config, nproc)}
    return {"config": config.model_dump(mode="json"), "config_hash": resolved.hash, "jobs": jobs}


def _plan_run(config: RunConfig) -> dict[str, Any]:
    base = config.base
    jobs = {}
    vocab_size = base.vocab_size
    if base.path is None:
        assert base.shape is not None and base.train is not None  # a rule of the configuration
        shape = base.shape
        jobs["base"] = _plan_learn("base.train", base.train, shape, vocab_size, config.vocab_divisor)
    else:
        shape, vocab_size = _read_model(base.path)
    if config.tokenizer.method == "extend":
        # The most it can become: pieces that the base has already, and a rest of the divisor, are dropped.
        divisor = config.tokenizer.divisor
        vocab_size = (vocab_size + config.tokenizer.num_pieces) // divisor * divisor
    jobs["adapt"] = _plan_learn("train", config.train, shape, vocab_size, config.vocab_divisor)
    return jobs


def _plan_learn(
    section: str, learn: LearnConfig, shape: LlamaShape, vocab_size: int, vocab_divisor: int
) -> dict[str, Any]:
    from megatron_cpt.planning import plan_job

    try:
        return plan_job(learn, shape, vocab_size, vocab_divisor, learn.num_processes)
    except ConfigError as caught:
        raise ConfigError(f"{section}: {caught}") from None


def _plan_train(config: TrainConfig, nproc: int | None) -> dict[str, Any]:
    from megatron_cpt.planning import plan_job
    from megatron_cpt.tokenizer import load_tokenizer

    if config.shape is not None:
        shape = config.shape
    else:
        assert config.initial_checkpoint is not None  # a rule of the configuration
        shape, _ = _read_model(config.initial_checkpoint)
    parallel = config.parallel
    one_copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = nproc or _world_size(one_copy)
    job = plan_job(config, shape, load_tokenizer(config.tokenizer).vocab_size, config.vocab_divisor, world_size)
    return {**job, "stages": _plan_data(config)}


def _plan_data(config: TrainConfig) -> list[dict[str, Any]] | None:
    """What is read in each stage; None while a dataset is not yet built or packed."""
    from megatron_cpt.data import IndexedDataset, is_packed, manifest_path, open_plan
    from megatron_cpt.data.stages import describe_order

    if not all(manifest_path(source.prefix).exists() for source in config.data.train):
        return None
    packed = [IndexedDataset(source.prefix) for source in config.data.train if source.packing == "best_fit"]
    if not all(is_packed(dataset, config.batch.seq_length) for dataset in packed):
        return None
    opened = open_plan(config.data, config.batch.seq_length, config.seed)
    num_samples = config.train_steps * config.batch.global_batch_size
    opened.require(num_samples)
    return describe_order(opened.order, num_samples)


def _world_size(otherwise: int) -> int:
    text = os.environ.get("WORLD_SIZE", str(otherwise))
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"the variable WORLD_SIZE is {text!r}, expected a number from 1; unset it or give --nproc")
    return int(text)


def _read_model(path: str) -> tuple[LlamaShape, int]:
    from megatron_cpt.checkpoint import read_shape

    return read_shape(path)


def render(value: dict[str, Any], resolved: Resolved[RunConfig] | Resolved[TrainConfig]) -> Any:
    """The plan for a person: the resolved configuration and one table for each job."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(resolved.dump()), Text(f"config hash {value['config_hash']}")]
    for name, job in value["jobs"].items():
        parts += [Text(""), _facts_table(name, job), _memory_table(job["memory"])]
        if "stages" in job:
            parts.append(
                _stages_table(job["stages"])
                if job["stages"]
                else Text("data: not all datasets are built and packed yet")
            )
    return Group(*parts)


def _facts_table(name: str, job: dict[str, Any]) -> Any:
    from rich.table import Table

    layout, tokens, flops, vocabulary = job["layout"], job["tokens"], job["flops_per_token"], job["vocabulary"]
    table = Table(title=f"job: {name}", title_justify="left", show_header=False, box=None)
    stages = layout["pipeline_layout"] or f"all {layout['layers_per_stage'][0]} layers"
    rows = {
        "parameters": f"{job['parameters']['total']:,}",
        "vocabulary": f"{vocabulary['vocab_size']:,} (padded to {vocabulary['padded_vocab_size']:,})",
        "layout": f"{layout['name']}, {layout['world_size']} processes; stages: {stages}",
        "micro-batches": f"{layout['num_micro_batches']} a step; pipeline idle {layout['bubble']:.1%}",
        "tokens": f"{tokens['per_step']:,} a step, {tokens['total']:,} in {tokens['steps']:,} steps",
        "work": f"{flops['causal'] / 1e6:,.1f} MFLOP a token (attention in full: {flops['non_causal'] / 1e6:,.1f})",
    }
    for label, text in rows.items():
        table.add_row(label, text)
    return table


def _memory_table(memory: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="")
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "total")
    table.add_column("memory of a rank, MiB")
    for part in parts:
        table.add_column(part, justify="right")
    for rank in memory:
        sizes = [f"{rank[f'{part}_bytes'] / 2**20:,.1f}" for part in parts]
        table.add_row(f"pipeline stage {rank['pipeline_rank']}", *sizes)
    return table


def _stages_table(stages: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="")
    for column in ("stage", "source"):
        table.add_column(column)
    for column in ("share", "samples", "tokens", "epochs"):
        table.add_column(column, justify="right")
    for stage in stages:
        table.add_row(stage["name"] or "whole run", "", "", f"{stage['samples']:,}", f"{stage['tokens']:,}", "")
        for name, facts in stage["sources"].items():
            start, end = facts["share"]
            share = f"{start:.2%}" if start == end else f"{start:.2%} to {end:.2%}"
            table.add_row("", name, share, f"{facts['samples']:,}", f"{facts['tokens']:,}", f"{facts['epochs']:.3f}")
    return table
