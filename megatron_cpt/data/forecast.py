"""What each stage will read of each source, as far as it is known before all datasets are built."""

from __future__ import annotations

from typing import Any

from megatron_cpt.config.manifest import sha256_bytes
from megatron_cpt.config.schema import DataSource, TrainDataConfig
from megatron_cpt.data.indexed import IndexedDataset, manifest_path
from megatron_cpt.data.packing import is_packed
from megatron_cpt.data.sampler import open_plan
from megatron_cpt.data.stages import Order, SourceFacts, describe_order
from megatron_cpt.data.windows import open_windows

_UNKNOWN = 1 << 40  # stands for the number of windows of a source of which nothing is known


def forecast(
    data: TrainDataConfig, seq_length: int, seed: int, num_samples: int, tokenizer_sha256: str | None = None
) -> dict[str, Any]:
    """The sources and stages of a plan.

    Shares, and the samples that follow from them, need no dataset. Epochs need the size of a source: that of its
    dataset, else the `tokens` that the configuration expects, else they are not known; neither is then where sources
    that are read in turn by their sizes change over.

    Args:
        data: sources and stages.
        seq_length: S, tokens of a sample.
        seed: of the order.
        num_samples: of the run.
        tokenizer_sha256: of the job's tokenizer; None: it is not there yet, and no dataset is compared with it.

    Returns:
        `sources`: for each its `name`, `prefix`, `language`, `samples` of an epoch (None: not known), `known_from`
        ("dataset", "dataset, not packed yet", "tokens in the configuration", None), `epochs` in the whole run, and
        `max_epochs`; `stages`: as `describe_order`, with None for what is not known.

    Raises:
        DataError: a dataset, also one of the validation, of another tokenizer; what `SamplePlan` refuses, where all is
            built; else what `Order` refuses by the sizes that are known.
    """
    if tokenizer_sha256 is not None:
        for prefix in [*(source.prefix for source in data.train), *(held.prefix for held in data.validation)]:
            if manifest_path(prefix).exists():
                IndexedDataset(prefix).check_tokenizer(tokenizer_sha256)
    known = [_samples(source, seq_length) for source in data.train]
    if all(origin == "dataset" for _, origin in known):
        order = open_plan(data, seq_length, seed).order
    else:
        facts = [_facts(source, *size) for source, size in zip(data.train, known, strict=True)]
        order = Order(facts, data.stages, seq_length, seed)
    order.require(num_samples)
    stages = describe_order(order, num_samples)
    unsure = _unsure_turns(data, [samples is None for samples, _ in known])
    for number, (stage, compiled) in enumerate(zip(stages, order.stages, strict=True)):
        for row, source in zip(stage["sources"], compiled.sources, strict=True):
            if (number, row["name"]) in unsure:
                row.update(samples=None, tokens=None, epochs=None)
            elif known[source][0] is None:
                row["epochs"] = None
    open_to_doubt = {name for _, name in unsure}
    read = order.counts(num_samples)
    sources = [
        {
            "name": source.title,
            "prefix": source.prefix,
            "language": source.language,
            "samples": samples,
            "known_from": origin,
            "epochs": None if samples is None or source.title in open_to_doubt else count / samples,
            "max_epochs": source.max_epochs,
        }
        for source, (samples, origin), count in zip(data.train, known, read, strict=True)
    ]
    return {"sources": sources, "stages": stages}


def _unsure_turns(data: TrainDataConfig, is_unknown: list[bool]) -> set[tuple[int, str]]:
    """Stage and name of the sources that are read in turn by sizes of which one is not known."""
    unknown = {source.title for source, is_so in zip(data.train, is_unknown, strict=True) if is_so}
    return {
        (number, name)
        for number, stage in enumerate(data.stages)
        for share in stage.shares
        if share.in_turn and share.parts is None and unknown & set(share.sources)
        for name in share.sources
    }


def _samples(source: DataSource, seq_length: int) -> tuple[int | None, str | None]:
    """Samples of one epoch of a source, and where that is known from."""
    if manifest_path(source.prefix).exists():
        dataset = IndexedDataset(source.prefix)
        if source.packing == "best_fit" and not is_packed(dataset, seq_length):
            return _full(dataset.num_tokens, seq_length), "dataset, not packed yet"
        return len(open_windows(dataset, seq_length, source.packing)), "dataset"
    if source.tokens is not None:
        return _full(source.tokens, seq_length), "tokens in the configuration"
    return None, None


def _full(tokens: int, seq_length: int) -> int:
    """Samples of so many tokens: all full but the last one."""
    return max(1, -(-(tokens - 1) // seq_length))


def _facts(source: DataSource, samples: int | None, origin: str | None) -> SourceFacts:
    # A bound on epochs is held against a size that somebody vouches for; packing adds some padding to a dataset's.
    bound = source.max_epochs if origin in ("dataset", "tokens in the configuration") else None
    content = sha256_bytes(source.title.encode())  # decides which samples, and not how many
    return SourceFacts(
        source.title, content, samples or _UNKNOWN, source.language, source.weight, bound, source.packing
    )
