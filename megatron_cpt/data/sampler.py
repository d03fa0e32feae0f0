"""The order of the data as a pure function of (stages, sources, seed, sample number).

There are no index files and no state: to resume at sample i is to ask for sample i. The order knows
nothing of ranks, micro-batches or the number of steps, so none of them can change it. `stages.Order` says which
source, epoch and window a sample is; here the windows are those of datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from megatron_cpt.config.schema import Stage, TrainDataConfig
from megatron_cpt.data import lineage
from megatron_cpt.data.indexed import IndexedDataset
from megatron_cpt.data.stages import Order, Place, SourceFacts
from megatron_cpt.data.windows import Packing, Sample, open_windows
from megatron_cpt.errors import DataError


class Source(NamedTuple):
    """A dataset of a plan.

    Attributes:
        dataset: the dataset or its prefix.
        language: of its text.
        weight: share of the samples, relative to the sources it is named with.
        name: what stages call it; empty: the last part of its prefix.
        max_epochs: passes that are allowed; None: any number.
        packing: how its documents fill the samples, see `open_windows`.
    """

    dataset: str | Path | IndexedDataset
    language: str
    weight: float = 1.0
    name: str = ""
    max_epochs: float | None = None
    packing: Packing = "concat"


class SamplePlan:
    """A fixed sequence of samples from datasets: endless without stages, else ending with the last one.

    An epoch of a source visits each of its windows (`open_windows`) once. A plan may be sent to another process
    (pickle): datasets are opened again there and have to be the same.

    Args:
        sources: `Source`s, or tuples of their leading fields.
        seq_length: S, tokens of a sample.
        seed: 0 to 2^64 - 1.
        stages: mixtures that follow each other; none: the weights hold without end.

    Raises:
        DataError: a dataset that cannot be read, holds no prediction or is there twice, datasets of different
            tokenizers, or what `Order` refuses.
    """

    def __init__(
        self, sources: Sequence[Source | tuple[Any, ...]], seq_length: int, seed: int, stages: Sequence[Stage] = ()
    ) -> None:
        given = [Source(*source) for source in sources]
        self.datasets = [
            source.dataset if isinstance(source.dataset, IndexedDataset) else IndexedDataset(source.dataset)
            for source in given
        ]
        self._sources = [source._replace(dataset=ds) for source, ds in zip(given, self.datasets, strict=True)]
        self._check()
        self.stages = tuple(stages)
        self.languages = [source.language for source in given]
        self.windows = [
            open_windows(dataset, seq_length, source.packing)
            for source, dataset in zip(given, self.datasets, strict=True)
        ]
        facts = [
            SourceFacts(
                source.name or Path(windows.dataset.prefix).name,
                windows.content_hash,
                len(windows),
                source.language,
                source.weight,
                source.max_epochs,
                source.packing,
            )
            for source, windows in zip(given, self.windows, strict=True)
        ]
        self.order = Order(facts, self.stages, seq_length, seed)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _reopen, (self._sources, self.seq_length, self.seed, self.stages, self.description)

    def _check(self) -> None:
        hashes = [dataset.content_hash for dataset in self.datasets]
        for number, dataset in enumerate(self.datasets):
            first = self.datasets[hashes.index(hashes[number])]
            if first is not dataset:
                same = "is listed twice" if first.prefix == dataset.prefix else f"holds the same as {first.prefix}"
                raise DataError(f"{dataset.prefix} {same}; list it once with the sum of the weights")
            first = self.datasets[0]
            if dataset.manifest.get("tokenizer_sha256") != first.manifest.get("tokenizer_sha256"):
                raise DataError(
                    f"{dataset.prefix} and {first.prefix} were built with different tokenizers; build them with one"
                )

    @property
    def seq_length(self) -> int:
        """S, tokens of a sample."""
        return self.order.seq_length

    @property
    def seed(self) -> int:
        """What the permutations are keyed with."""
        return self.order.seed

    @property
    def num_windows(self) -> list[int]:
        """Samples of one epoch of each source."""
        return [len(windows) for windows in self.windows]

    @property
    def num_samples(self) -> int | None:
        """Samples of all stages; None: without end."""
        return self.order.num_samples

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer behind all sources."""
        return self.datasets[0].vocab_size

    @cached_property
    def description(self) -> dict[str, Any]:
        """Everything that decides the order, as JSON; see `lineage`."""
        return lineage.description(self.order)

    def order_hash(self, num_samples: int) -> str:
        """Identity of the first `num_samples` samples: with an equal one, they are the same samples."""
        return lineage.order_hash(self.description, num_samples)

    def require(self, num_samples: int) -> None:
        """Check that a run may read `num_samples` samples; raises as `Order.require` does."""
        self.order.require(num_samples)

    def place(self, number: int) -> Place:
        """Where sample `number` (from 0) comes from; raises as `Order.place` does."""
        return self.order.place(number)

    def sample(self, number: int) -> Sample:
        """Sample `number` (from 0), the same on every rank and in every run.

        Raises:
            DataError: the plan has no such sample, or the dataset holds an id that is not of its vocabulary.
        """
        place = self.order.place(number)
        return Sample(self.windows[place.source].window(place.window), place.source, self.languages[place.source])

    def text_bytes(self, first: int, stop: int) -> float:
        """Bytes of text that samples first..stop-1 stand for, by the mean bytes per token of each source.

        bos and eos are tokens without text; padding counts as if it were filled.
        """
        counts = zip(self.order.counts(first), self.order.counts(stop), strict=True)
        each = [float(dataset.manifest["bytes_per_token"]) * self.seq_length for dataset in self.datasets]
        return sum((after - before) * size for (before, after), size in zip(counts, each, strict=True))

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often the first `num_samples` samples pass through each source: prefix -> passes."""
        return {
            windows.dataset.prefix: count / len(windows)
            for windows, count in zip(self.windows, self.order.counts(num_samples), strict=True)
        }


def open_plan(data: TrainDataConfig, seq_length: int, seed: int) -> SamplePlan:
    """The plan that a configuration states; raises as `SamplePlan` does."""
    sources = [
        Source(source.prefix, source.language, source.weight, source.title, source.max_epochs, source.packing)
        for source in data.train
    ]
    return SamplePlan(sources, seq_length, seed, data.stages)


def _reopen(
    sources: Sequence[Source], seq_length: int, seed: int, stages: Sequence[Stage], description: dict[str, Any]
) -> SamplePlan:
    plan = SamplePlan(sources, seq_length, seed, stages)
    if plan.description != description:
        raise DataError("a dataset was built anew while it was being read; start the job again")
    return plan
