"""Rules between settings, which no single field can state. Those of a layout are in `planning.layout`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from megatron_cpt.config.schema import LearnConfig, LlamaShape, RunConfig, Stage, TrainConfig
from megatron_cpt.errors import ConfigError


def check_rules(config: RunConfig | TrainConfig, name: str) -> None:
    """Check what several settings mean together.

    Raises:
        ConfigError: one line for each broken rule, `name` being the document's.
    """
    problems = list(_run_problems(config) if isinstance(config, RunConfig) else _train_problems(config))
    if problems:
        header = f"{name} has {len(problems)} problems:\n  " if len(problems) > 1 else ""
        raise ConfigError(header + "\n  ".join(problems))


def _run_problems(config: RunConfig) -> Iterator[str]:
    data, base = config.data, config.base
    if data.builtin is not None and (data.source is not None or data.target is not None):
        yield "data: got builtin and also source or target, expected one of the two ways; set data.builtin=null"
    if data.builtin is None and (data.source is None or data.target is None):
        missing = [name for name in ("source", "target") if getattr(data, name) is None]
        wanted = " and ".join(f"--set data.{name}=FILE" for name in missing)
        yield f"data: got no {' and no '.join(missing)} text; give {wanted}, or --set data.builtin=world"
    if data.source_language == data.target_language:
        yield f"data: source_language and target_language are both {data.source_language!r}; expected two languages"
    if base.path is None and (base.shape is None or base.train is None):
        yield "base: got neither a path nor both shape and train; give --set base.path=HF_FOLDER, or shape and train"
    if base.path is not None and (base.shape is not None or base.train is not None):
        yield (
            "base: got a path and also shape or train, expected one of the two ways; "
            "give --set base.shape=null --set base.train=null"
        )
    if config.surgery.problem is not None and config.tokenizer.method != "none":
        yield f"surgery: {config.surgery.problem}"
    if base.train is not None:
        yield from _learn_problems("base.train", base.train, base.shape)
    yield from _learn_problems("train", config.train, base.shape)
    yield from _text_problems(config)


def _text_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the names of texts, and with stages that call them."""
    source, target = config.data.texts()
    for side, named in (("source", source), ("target", target)):
        if not named:
            yield f"data.{side}: got no text, expected at least one name with files"
    both = source.keys() & target.keys() if config.data.source_language != config.data.target_language else ()
    for name in sorted(both):
        yield f"data: got the name {name!r} in source and in target, expected names of their own; change one of them"
    if not config.train.stages:
        return
    if config.train.replay is not None:
        yield (
            f"train: got stages and also replay={config.train.replay:g}, expected one of the two ways; a stage has a "
            "replay of its own: give --set train.replay=null"
        )
    yield from _stage_problems("train.stages", config.train.stages, [*source, *target], "the texts", config.train)


def _train_problems(config: TrainConfig) -> Iterator[str]:
    if config.shape is None and config.initial_checkpoint is None:
        yield "shape: got neither a shape nor an initial_checkpoint; give one of them"
    if not config.data.train:
        yield "data.train: got no dataset, expected at least one {prefix, language, weight}"
    scored = [source.language for source in config.data.validation]
    for language in sorted({language for language in scored if scored.count(language) > 1}):
        yield (
            f"data.validation: got {scored.count(language)} sets of language {language!r}, expected one of each "
            "language, which names its score; put them into one dataset or give them different names"
        )
    if config.data.stages:
        titles = [source.title for source in config.data.train]
        for title in sorted({title for title in titles if titles.count(title) > 1}):
            yield f"data.train: got {titles.count(title)} sources called {title!r}, expected one; give each a name"
        yield from _stage_problems("data.stages", config.data.stages, titles, "data.train", config)
    yield from _learn_problems("", config, config.shape)


def _stage_problems(
    section: str, stages: Sequence[Stage], titles: Sequence[str], holder: str, learn: LearnConfig | TrainConfig
) -> Iterator[str]:
    """What is wrong with stages of sources that are called `titles`, which stand in `holder`."""
    for number, stage in enumerate(stages):
        path = f"{section}.{number}"
        named = [name for share in stage.shares for name in share.sources]
        named += stage.replay.sources if stage.replay else ()
        for name in dict.fromkeys(named):
            if name not in titles:
                near = difflib.get_close_matches(name, titles, n=1) or titles
                yield f"{path}: got source {name!r}, expected one of {holder}; did you mean {' or '.join(near)}?"
            if named.count(name) > 1:
                yield f"{path}: got source {name!r} {named.count(name)} times, expected once; add its shares up"
        for place, share in enumerate(stage.shares):
            if share.parts is not None and (not share.in_turn or len(share.parts) != len(share.sources)):
                yield (
                    f"{path}.shares.{place}.parts: got {len(share.parts)} parts for {len(share.sources)} sources with "
                    f"in_turn={str(share.in_turn).lower()}, expected one part for each source in turn"
                )
        ends = [share.share if isinstance(share.share, tuple) else (share.share, share.share) for share in stage.shares]
        if not (sum(start for start, _ in ends) and sum(end for _, end in ends)) or not all(map(sum, ends)):
            yield f"{path}.shares: got a share that is always 0, or nothing but zeros at one end; expected more than 0"
    given = sum(stage.tokens for stage in stages)
    wanted = learn.train_steps * learn.batch.global_batch_size * learn.batch.seq_length
    if given < wanted:
        yield (
            f"{section}: got {given:,} tokens in all, expected at least train_steps * global_batch_size * "
            f"seq_length = {wanted:,}; give the last stage more tokens or lower train_steps"
        )


def _learn_problems(path: str, learn: LearnConfig | TrainConfig, shape: LlamaShape | None) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    optimizer = learn.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"{prefix}optimizer.min_learning_rate: got {optimizer.min_learning_rate:g}, expected at most "
            f"{prefix}optimizer.learning_rate = {optimizer.learning_rate:g}; lower it"
        )
    if optimizer.warmup_steps > learn.train_steps:
        yield (
            f"{prefix}optimizer.warmup_steps: got {optimizer.warmup_steps}, expected at most "
            f"{prefix}train_steps = {learn.train_steps}; lower it"
        )
    if learn.kernels.cross_entropy_logits == "fp16" and learn.precision == "fp32":
        yield (
            f"{prefix}kernels.cross_entropy_logits: got fp16 with {prefix}precision fp32, expected no narrower logits "
            "than the weights; use model"
        )
    if shape is not None and learn.batch.seq_length > shape.max_position_embeddings:
        yield (
            f"{prefix}batch.seq_length: got {learn.batch.seq_length}, expected at most the shape's "
            f"max_position_embeddings = {shape.max_position_embeddings}; change one of them"
        )
