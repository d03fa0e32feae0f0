"""`megatron-cpt plan`: what a configuration means, before anything is started."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, SetOption, emit
from megatron_cpt.config.loading import Resolved, load_any_config
from megatron_cpt.config.schema import LearnConfig, LlamaShape, RunConfig, TrainConfig, TrainDataConfig
from megatron_cpt.errors import ConfigError, KernelUnsupported

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
    emit(describe(resolved, nproc, is_early=True), as_json, lambda value: render(value, resolved))


def describe(
    resolved: Resolved[RunConfig] | Resolved[TrainConfig], nproc: int | None = None, is_early: bool = False
) -> dict[str, Any]:
    """The plan of a run or a training job, for `plan` and for `--dry-run`.

    Args:
        resolved: a loaded configuration.
        nproc: processes of a training job; None takes WORLD_SIZE, else one copy of the model. A run
            states its own.
        is_early: a training job may name a tokenizer and a base that are not there yet, and what follows from
            them is then None; and any job kernels that run on another machine.

    Returns:
        `config`, `config_hash` and `jobs`: name -> what `planning.plan_job` returns, with `kernels`, why a named one
        cannot run on this machine, or None; of a job whose sources are stated also `sources` and `stages` (see
        `data.forecast`), and of a training job `missing`: what it names and is not there yet, each with `what`,
        `path` and `make`, the command that makes it.

    Raises:
        ConfigError: an impossible layout; KernelUnsupported: a named kernel that cannot run on this machine, unless
            it is early; DataError: an order that cannot be; CheckpointError, TokenizerError: a model or tokenizer
            that the configuration names cannot be read.
    """
    config = resolved.config
    if isinstance(config, RunConfig):
        jobs = _plan_run(config, is_early)
    else:
        jobs = {"train": _plan_train(config, nproc, is_early)}
    return {"config": config.model_dump(mode="json"), "config_hash": resolved.hash, "jobs": jobs}


def _plan_run(config: RunConfig, is_early: bool) -> dict[str, Any]:
    base = config.base
    jobs = {}
    vocab_size = base.vocab_size
    if base.path is None:
        assert base.shape is not None and base.train is not None  # a rule of the configuration
        shape = base.shape
        jobs["base"] = plan_learn("base.train", base.train, shape, vocab_size, config.vocab_divisor, is_early)
    else:
        shape, vocab_size = _read_model(base.path)
    embedding, head = config.surgery.embedding, config.surgery.head
    if shape.tied_embeddings and embedding != head:
        raise ConfigError(
            f"surgery.embedding makes rows by {embedding.method!r} and surgery.head by {head.method!r}, but the base "
            "ties its head to its embedding; give one method, with the same options, for both"
        )
    if config.tokenizer.method == "extend":
        # The most it can become: pieces that the base has already, and a rest of the divisor, are dropped.
        divisor = config.tokenizer.divisor
        vocab_size = (vocab_size + config.tokenizer.num_pieces) // divisor * divisor
    elif config.tokenizer.method == "replace":
        vocab_size = config.tokenizer.vocab_size or vocab_size
    jobs["adapt"] = plan_learn("train", config.train, shape, vocab_size, config.vocab_divisor, is_early)
    if config.train.stages:
        data = config.training_data(os.path.join(config.output, "shards"))
        jobs["adapt"] |= _forecast(data, config.train, config.seed)
    return jobs


def plan_learn(
    section: str, learn: LearnConfig, shape: LlamaShape, vocab_size: int, vocab_divisor: int, is_early: bool = False
) -> dict[str, Any]:
    """The plan of one training job of a run, whose settings stand in `section`; see `describe`.

    Raises:
        ConfigError: an impossible layout; KernelUnsupported: a named kernel that cannot run here, unless it is early.
    """
    from megatron_cpt.planning import plan_job

    kernels = _kernels_obstacle(learn, shape, is_early, f"{section}.")
    try:
        return {**plan_job(learn, shape, vocab_size, vocab_divisor, learn.num_processes), "kernels": kernels}
    except ConfigError as caught:
        raise ConfigError(f"{section}: {caught}") from None


def _kernels_obstacle(
    learn: LearnConfig | TrainConfig, shape: LlamaShape | None, is_early: bool, section: str = ""
) -> str | None:
    """Why a named kernel cannot run on this machine, or None; an error unless it is early."""
    from megatron_cpt.model.kernels import refuse_kernels

    try:
        refuse_kernels(learn.kernels, learn.precision, shape.head_dim if shape else None)
    except KernelUnsupported as caught:
        if is_early:
            return f"{section}{caught}"
        raise KernelUnsupported(f"{section}{caught}") from None
    return None


def _plan_train(config: TrainConfig, nproc: int | None, is_early: bool) -> dict[str, Any]:
    from megatron_cpt.planning import count_tokens
    from megatron_cpt.tokenizer import load_tokenizer

    if nproc is None:
        _world_size(1)  # a variable that is no number is refused, whatever else is there
    missing = _missing(config)
    kernels = _kernels_obstacle(config, config.shape, is_early)
    if is_early and any(each["what"] in ("tokenizer", "base") for each in missing):
        unknown = ("layout", "vocabulary", "parameters", "flops_per_token", "memory")
        job: dict[str, Any] = {**dict.fromkeys(unknown), "tokens": count_tokens(config)}
    else:
        job = _plan_model(config, nproc, is_early)
    is_there = all(each["what"] != "tokenizer" for each in missing)
    sha256 = load_tokenizer(config.tokenizer).sha256 if is_there else None
    return {"kernels": kernels, **job, **_forecast(config.data, config, config.seed, sha256), "missing": missing}


def _plan_model(config: TrainConfig, nproc: int | None, is_early: bool) -> dict[str, Any]:
    from megatron_cpt.planning import plan_job
    from megatron_cpt.tokenizer import load_tokenizer

    if config.shape is not None:
        shape = config.shape
    else:
        assert config.initial_checkpoint is not None  # a rule of the configuration
        shape, _ = _read_model(config.initial_checkpoint)
    kernels = _kernels_obstacle(config, shape, is_early)
    parallel = config.parallel
    one_copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    world_size = nproc or _world_size(one_copy)
    vocab_size = load_tokenizer(config.tokenizer).vocab_size
    return {**plan_job(config, shape, vocab_size, config.vocab_divisor, world_size), "kernels": kernels}


def _forecast(
    data: TrainDataConfig, learn: LearnConfig | TrainConfig, seed: int, tokenizer_sha256: str | None = None
) -> dict[str, Any]:
    from megatron_cpt.data.forecast import forecast

    batch = learn.batch
    num_samples = learn.train_steps * batch.global_batch_size
    return forecast(data, batch.seq_length, seed, num_samples, tokenizer_sha256)


def _missing(config: TrainConfig) -> list[dict[str, str]]:
    """What the job names and is not there, with the command that makes it."""
    found = []
    if not os.path.exists(config.tokenizer):
        make = f"tokenizer extend BASE_MODEL --corpus FILE... --num-pieces N --output {config.tokenizer}"
        found.append(("tokenizer", config.tokenizer, make))
    base = config.initial_checkpoint
    if base is not None and not os.path.exists(base):
        found.append(("base", base, f"surgery apply PLAN BASE_MODEL {base}"))
    build = f"data build FILE... --tokenizer {config.tokenizer} --output"
    for source in config.data.train:
        if not os.path.exists(f"{source.prefix}.manifest.json"):
            make = f"{build} {source.prefix} --language {source.language}"
            found.append((f"dataset {source.title}", source.prefix, make))
    for held in config.data.validation:
        if not os.path.exists(f"{held.prefix}.manifest.json"):
            make = f"{build} {held.prefix} --language {held.language} --held-out SHARE --only-held-out"
            found.append((f"validation {held.language}", held.prefix, make))
    return [{"what": what, "path": path, "make": f"megatron-cpt {make}"} for what, path, make in found]


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
        parts.append(Text(""))
        if job["layout"] is not None:
            parts += [_facts_table(name, job), _memory_table(job["memory"])]
        else:
            parts.append(Text(f"job: {name}\nlayout, memory and work: unknown, tokenizer or base is not there yet"))
        if job["kernels"] is not None:
            parts += [Text(""), Text(f"not on this machine: {job['kernels']}")]
        if "stages" in job:
            parts += [Text(""), _stages_table(job["stages"]), Text(""), _sources_table(job["sources"])]
        if job.get("missing"):
            parts += [Text(""), Text("not there yet:")]
            parts += [Text(f"  {each['what']}: {each['path']}\n    {each['make']}") for each in job["missing"]]
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
        for facts in stage["sources"]:
            start, end = facts["share"]
            share = f"{start:.2%}" if start == end else f"{start:.2%} to {end:.2%}"
            share += ", in turn" if facts["in_turn"] else ""
            counts = [
                _or_unknown(facts[key], form) for key, form in (("samples", ","), ("tokens", ","), ("epochs", ".3f"))
            ]
            table.add_row("", facts["name"], share, *counts)
    return table


def _sources_table(sources: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="")
    table.add_column("source")
    for column in ("samples of an epoch", "epochs in all", "allowed"):
        table.add_column(column, justify="right")
    table.add_column("size known from")
    for source in sources:
        counts = [_or_unknown(source["samples"], ","), _or_unknown(source["epochs"], ".3f")]
        allowed = "any" if source["max_epochs"] is None else f"{source['max_epochs']:g}"
        origin = source["known_from"] or "nothing: not built, and no `tokens` stated"
        table.add_row(source["name"], *counts, allowed, origin)
    return table


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else f"{value:{form}}"
