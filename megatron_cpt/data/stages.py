"""The plan of a run's data, in numbers alone: which source, epoch and window each sample is.

A pure function of (stages, sources, seed, sample number); nothing here opens a dataset. Stages follow each
other; stage k ends at sample floor(tokens of stages 0..k / seq_length). In a stage, every sample belongs to the
source whose turn it is by exact shares (`csrc/stage_order.hpp`: never 2 samples from them, and within 1 at every
border of blocks). A source counts its own samples over all stages: visit v of a source with W windows is of
epoch v // W, which shows every window once, in an order keyed by (seed, content of the source, epoch).
So nothing repeats before its epoch is over, and no other source or share changes what a source shows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_cpt.config.schema import Share, Stage
from megatron_cpt.data import _native
from megatron_cpt.data.shares import CompiledStage, Stream, compile_stage, exact
from megatron_cpt.errors import DataError


@dataclass(frozen=True)
class SourceFacts:
    """What the plan knows of a source.

    Attributes:
        name: what stages call it.
        content: hex SHA-256 that stands for its windows.
        windows: samples in one epoch.
        language: of its text.
        weight: share among the sources it is named with.
        max_epochs: passes that are allowed; None: any number.
        packing: how its documents fill the windows.
    """

    name: str
    content: str
    windows: int
    language: str = ""
    weight: float = 1.0
    max_epochs: float | None = None
    packing: str = "concat"

    @property
    def most_samples(self) -> int | None:
        """How many samples `max_epochs` allows; None: any number."""
        return None if self.max_epochs is None else int(exact(self.max_epochs) * self.windows)


@dataclass(frozen=True)
class Place:
    """Where a sample comes from: source number, epoch of that source, number of its window, stage number."""

    source: int
    epoch: int
    window: int
    stage: int = 0


class Order:
    """The compiled plan.

    Args:
        sources: every source, used or not.
        stages: in their order; none: the weights of all sources hold without end.
        seq_length: S, tokens of a sample.
        seed: 0 to 2^64 - 1.

    Raises:
        DataError: no sources, weights or shares that cannot be, an unknown or ambiguous name, a stage that is
            too short, or a source that passes its `max_epochs`.
    """

    def __init__(self, sources: Sequence[SourceFacts], stages: Sequence[Stage], seq_length: int, seed: int) -> None:
        if seq_length < 1 or not 0 <= seed < 2**64:
            raise DataError(f"seq_length {seq_length} and seed {seed}: expected at least 1, and 0 to 2^64 - 1")
        weights = [source.weight for source in sources]
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"weights {weights[:8]}: expected at least one, all finite numbers above 0")
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.seed = seed
        self.stages = self._compile(stages)
        self._firsts = [stage.first for stage in self.stages]
        self._before = [[0] * len(sources)]  # samples of each source before each stage
        for stage in self.stages[:-1]:
            self._before.append(self._after(len(self._before) - 1, stage.samples))
        keys = [(int(source.content[:16], 16), int(source.content[16:32], 16)) for source in sources]
        self._keys = [_native.derive(_native.derive(seed, one), two) for one, two in keys]
        if self.num_samples is not None:
            self.require(self.num_samples)

    @property
    def num_samples(self) -> int | None:
        """Samples of all stages; None: without end."""
        last = self.stages[-1]
        return last.first + last.samples if last.samples else None

    def place(self, number: int) -> Place:
        """Where sample `number` (from 0) comes from.

        Raises:
            DataError: the plan has no such sample.
        """
        if number < 0:
            raise DataError(f"sample {number}: samples are counted from 0")
        at = bisect_right(self._firsts, number) - 1
        stage = self.stages[at]
        if stage.samples and number >= stage.first + stage.samples:
            self.require(number + 1)
        lane, index = stage.order.at(number - stage.first)
        source = stage.sources[lane]
        visit, windows = self._before[at][source] + index, self.sources[source].windows
        return Place(source, visit // windows, _native.visit(visit, windows, self._keys[source]), at)

    def counts(self, num_samples: int) -> list[int]:
        """Samples of each source among the first `num_samples`."""
        at = max(0, bisect_right(self._firsts, num_samples) - 1)
        return self._after(at, num_samples - self.stages[at].first)

    def require(self, num_samples: int) -> None:
        """Check that a run may read the first `num_samples` samples.

        Raises:
            DataError: the stages end before, or a source passes its `max_epochs`.
        """
        given = self.num_samples
        if given is not None and num_samples > given:
            raise DataError(
                f"the stages hold {given * self.seq_length:,} tokens ({given:,} samples of {self.seq_length:,}), "
                f"asked for was sample {num_samples:,}; give the last stage more tokens or add a stage, which "
                "changes nothing before, or train for fewer steps"
            )
        for source, count in enumerate(self.counts(num_samples)):
            most = self.sources[source].most_samples
            if most is not None and count > most:
                raise DataError(self._exhausted(source, most, count, num_samples))

    def _exhausted(self, source: int, most: int, count: int, num_samples: int) -> str:
        low, high = 0, num_samples  # counts(low) <= most < counts(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.counts(middle)[source] <= most else (low, middle)
        facts, stage = self.sources[source], self.stages[self.place(low).stage]
        where = f"in stage {stage.name!r} " if stage.name else ""
        return (
            f"source {facts.name!r} runs out {where}at token {low * self.seq_length:,}: max_epochs="
            f"{facts.max_epochs:g} of its {facts.windows:,} samples are {most:,}, {num_samples * self.seq_length:,} "
            f"tokens of the plan take {count:,}; give it more text, a smaller share, or max_epochs of at least "
            f"{_up(Fraction(count, facts.windows))}"
        )

    def _after(self, at: int, samples: int) -> list[int]:
        counts = list(self._before[at])
        stage = self.stages[at]
        for source, count in zip(stage.sources, stage.order.counts(samples).tolist(), strict=True):
            counts[source] += count
        return counts

    def _compile(self, stages: Sequence[Stage]) -> tuple[CompiledStage, ...]:
        names = [source.name for source in self.sources]
        if not stages:
            streams = self._split(range(len(self.sources)), Fraction(1), Fraction(1))
            return (compile_stage("", 0, 0, streams, names),)
        compiled = []
        tokens = first = 0
        for stage in stages:
            tokens += stage.tokens
            end = tokens // self.seq_length
            if end == first:
                raise DataError(
                    f"stage {stage.name!r} with {stage.tokens:,} tokens holds no sample of {self.seq_length:,}; "
                    "give it more tokens"
                )
            compiled.append(compile_stage(stage.name, first, end - first, self._streams(stage), names))
            first = end
        return tuple(compiled)

    def _streams(self, stage: Stage) -> list[Stream]:
        """The shares of a stage as fractions of its samples; replay first takes its own."""
        rest = Fraction(1)
        streams = []
        if stage.replay is not None:
            replayed = exact(stage.replay.share)
            rest -= replayed
            streams = self._split([self._find(name, stage) for name in stage.replay.sources], replayed, replayed)
        ends = [share.share if isinstance(share.share, tuple) else (share.share, share.share) for share in stage.shares]
        totals = [sum(exact(end[side]) for end in ends) for side in (0, 1)]
        if not all(totals):
            raise DataError(f"stage {stage.name!r}: all shares are 0 at one end; expected some above 0")
        for share, (start, end) in zip(stage.shares, ends, strict=True):
            numbers = [self._find(name, stage) for name in share.sources]
            moving = rest * exact(start) / totals[0], rest * exact(end) / totals[1]
            streams += [self._in_turn(share, numbers, *moving)] if share.in_turn else self._split(numbers, *moving)
        named = [source for stream in streams for source in stream.sources]
        for source in named:
            if named.count(source) > 1:
                raise DataError(
                    f"stage {stage.name!r} names source {self.sources[source].name!r} twice; name it once and add the "
                    "shares up"
                )
        return [stream for stream in streams if stream.start or stream.end]

    def _find(self, name: str, stage: Stage) -> int:
        found = [number for number, source in enumerate(self.sources) if source.name == name]
        if len(found) != 1:
            names = ", ".join(source.name for source in self.sources)
            raise DataError(f"stage {stage.name!r}: {len(found)} sources are called {name!r}; expected one of {names}")
        return found[0]

    def _split(self, numbers: Sequence[int], start: Fraction, end: Fraction) -> list[Stream]:
        weights = [exact(self.sources[number].weight) for number in numbers]
        total = sum(weights)
        return [
            Stream((number,), start * weight / total, end * weight / total)
            for number, weight in zip(numbers, weights, strict=True)
        ]

    def _in_turn(self, share: Share, numbers: Sequence[int], start: Fraction, end: Fraction) -> Stream:
        sizes = [Fraction(self.sources[number].windows) for number in numbers]
        parts = sizes if share.parts is None else [exact(part) for part in share.parts]
        total = sum(parts)
        return Stream(tuple(numbers), start, end, tuple(part / total for part in parts))


def _up(value: Fraction) -> str:
    return f"{-(-value * 1000 // 1) / 1000:g}"


def describe_order(order: Order, num_samples: int) -> list[dict[str, Any]]:
    """The stages of a plan: samples and tokens of each, and what each source has in it.

    `share` is of the samples at the start and at the end of the stage; of sources `in_turn` each has it in its turn.

    Args:
        order: the plan.
        num_samples: of the run; what a stage without end is described for.
    """
    stages = []
    for stage in order.stages:
        samples = stage.samples or num_samples
        counts = stage.order.counts(samples).tolist()
        sources = [
            {
                "name": order.sources[source].name,
                "share": [int(lane[0]) / stage.unit, int(lane[1]) / stage.unit],
                "in_turn": int(lane[2]) > 0 or int(lane[3]) >= 0,
                "samples": count,
                "tokens": count * order.seq_length,
                "epochs": count / order.sources[source].windows,
            }
            for source, lane, count in zip(stage.sources, stage.lanes, counts, strict=True)
        ]
        tokens = samples * order.seq_length
        stages.append(
            {"name": stage.name, "first": stage.first, "samples": samples, "tokens": tokens, "sources": sources}
        )
    return stages
