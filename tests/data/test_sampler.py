"""The order of the data: exact shares, whole epochs, and nothing that could reorder it."""

from __future__ import annotations

import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import Document, IndexedDataset, SamplePlan, build_dataset, reference
from megatron_cpt.data.sampler import BLOCK, quotas
from megatron_cpt.errors import DataError

SOURCES = {"a": 0.7, "b": 0.2, "c": 0.1}


@pytest.fixture(scope="module")
def prefixes(documents: list[Document], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three datasets of different sizes."""
    folder = tmp_path_factory.mktemp("sampler")
    parts = {"a": documents[:60], "b": documents[60:100], "c": documents[100:]}
    for name, part in parts.items():
        build_dataset(part, tokenizer, folder / name, f"language-{name}")
    return {name: str(folder / name) for name in parts}


def plan_of(prefixes: dict[str, str], seq_length: int = 32, seed: int = 1, **weights: float) -> SamplePlan:
    return SamplePlan(
        [(prefixes[name], f"language-{name}", weight) for name, weight in (weights or SOURCES).items()],
        seq_length,
        seed,
    )


@given(weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_quotas_are_the_shares_rounded_by_largest_remainder(weights: list[int]) -> None:
    counts = quotas([float(weight) for weight in weights])
    shares = [Fraction(weight * BLOCK, sum(weights)) for weight in weights]
    assert sum(counts) == BLOCK and min(counts) >= 1
    if min(shares) >= 1:
        assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))
        up = [share % 1 for count, share in zip(counts, shares, strict=True) if count > share]
        down = [share % 1 for count, share in zip(counts, shares, strict=True) if count <= share]
        assert min(up, default=Fraction(1)) >= max(down, default=Fraction(0)) - Fraction(1, 10**6)


def test_small_weights_get_one_sample_of_each_block() -> None:
    assert quotas([1.0, 1e-9]) == [999, 1]
    assert quotas([1e-9] * 3 + [5.0, 5.0]) == [1, 1, 1, 498, 499]
    assert quotas([1.0] * 1000) == [1] * 1000
    assert quotas([0.9, 0.1]) == [900, 100]


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf")], [1.0] * 1001])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights"):
        quotas(weights)


def test_every_block_holds_exactly_the_quotas(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes)
    orders = []
    for block in (0, 1, 2, 10**9):
        sources = [plan.place(block * BLOCK + slot).source for slot in range(BLOCK)]
        assert [Counter(sources)[source] for source in range(3)] == plan.quotas == [700, 200, 100]
        orders.append(tuple(sources))
        thirds = [Counter(sources[start : start + 250])[0] for start in range(0, BLOCK, 250)]
        assert min(thirds) > 130, "the sources of a block are not mixed"
    assert len(set(orders)) == 4


def test_every_epoch_visits_every_window_once_in_another_order(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes)
    places = [plan.place(number) for number in range(2000)]
    for source, windows in enumerate(plan.num_windows):
        epochs: dict[int, list[int]] = {}
        for place in places:
            if place.source == source:
                epochs.setdefault(place.epoch, []).append(place.window)
        whole = [tuple(order) for order in epochs.values() if len(order) == windows]
        assert len(whole) >= 2 and len(epochs) - len(whole) <= 4
        assert all(sorted(order) == list(range(windows)) for order in whole)
        assert all(order != tuple(range(windows)) for order in whole) and len(set(whole)) == len(whole)


def test_an_epoch_reads_the_whole_stream(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes, a=1.0)
    dataset, length = plan.datasets[0], plan.seq_length
    read = np.zeros(dataset.num_tokens, int)
    for number in range(plan.num_windows[0]):
        start = plan.place(number).window * length
        window = plan.sample(number).window
        span = dataset.stream[start : min(start + length, dataset.num_tokens - 1)]
        assert np.array_equal(window.tokens_S[: len(span)], span)
        read[start + 1 : start + len(span) + 1] += 1
    assert read[0] == 0 and (read[1:] == 1).all()


def test_the_order_is_that_of_the_plain_python_rules(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes, seed=2**64 - 1)
    keys = [reference.derive(plan.seed, purpose) for purpose in range(4)]
    for number in [*range(300), 10**12]:
        sources, indices = reference.locate(np.array([number]), np.array(plan.quotas), keys[0])
        source, windows = int(sources[0]), plan.num_windows[int(sources[0])]
        place = plan.place(number)
        assert (place.source, place.epoch) == (source, int(indices[0]) // windows)
        assert place.window == reference.visit(indices, windows, keys[1 + source])[0]
        assert plan.sample(number).language == f"language-{'abc'[source]}"


def test_a_longer_run_and_other_weights_keep_the_order_of_a_source(prefixes: dict[str, str]) -> None:
    """A plan knows no length, and the visits of one source do not depend on the others."""
    plan, other = plan_of(prefixes), plan_of(prefixes, a=0.5, b=0.25, c=0.25)

    def visits(plan: SamplePlan, count: int) -> list[tuple[int, int]]:
        blocks = [plan.place(number) for number in range(4 * BLOCK)]
        own = sorted((place.epoch, place.window) for place in blocks if place.source == 0)
        return [visit for visit in own if visit[0] < count]

    whole_epochs = 4 * 500 // plan.num_windows[0]
    assert visits(plan, whole_epochs) == visits(other, whole_epochs)
    late_first = [plan.place(number) for number in reversed(range(500))][::-1]
    assert late_first == [plan_of(prefixes).place(number) for number in range(500)]


def test_epochs_counts_the_passes(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes)
    for count in (0, 1, 999, 1000, 2345):
        counted = Counter(plan.place(number).source for number in range(count))
        expected = {plan.datasets[s].prefix: counted[s] / plan.num_windows[s] for s in range(3)}
        assert plan.epochs(count) == expected
    assert plan.epochs(10**15)[prefixes["a"]] == 7 * 10**14 / plan.num_windows[0]


def test_the_state_hash_names_the_order(prefixes: dict[str, str], tmp_path: Path) -> None:
    plan = plan_of(prefixes)
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefixes['a']}.{ending}", tmp_path / f"moved.{ending}")
    moved = {**prefixes, "a": str(tmp_path / "moved")}
    assert plan_of(moved).state_hash == plan.state_hash == plan_of(prefixes, a=1.4, b=0.4, c=0.2).state_hash
    others = [
        plan_of(prefixes, seed=2),
        plan_of(prefixes, seq_length=33),
        plan_of(prefixes, a=0.6, b=0.3, c=0.1),
        plan_of(prefixes, b=0.2, a=0.7, c=0.1),
        plan_of({**prefixes, "a": prefixes["b"], "b": prefixes["a"]}),
    ]
    assert len({plan.state_hash, *(other.state_hash for other in others)}) == 6
    assert len({tuple(p.place(n).window for n in range(50)) for p in (plan, others[0])}) == 2


def test_bytes_per_token_is_the_mean_over_the_mixture(prefixes: dict[str, str]) -> None:
    manifests = [IndexedDataset(prefixes[name]).manifest for name in "abc"]
    expected = sum(w * m["text_bytes"] / m["tokens"] for w, m in zip((0.7, 0.2, 0.1), manifests, strict=True))
    assert plan_of(prefixes).bytes_per_token == pytest.approx(expected, rel=1e-12)


def test_impossible_plans_are_refused(prefixes: dict[str, str], documents: list[Document], tmp_path: Path) -> None:
    a = IndexedDataset(prefixes["a"])
    assert SamplePlan([(a, "xx", 1.0)], a.num_tokens - 1, 1).num_windows == [1]
    assert SamplePlan([(a, "xx", 1.0)], a.num_tokens - 2, 1).num_windows == [2]
    with pytest.raises(DataError, match="is listed twice"):
        SamplePlan([(a, "xx", 1.0), (prefixes["a"], "xx", 1.0)], 32, 1)
    with pytest.raises(DataError, match="counted from 0"):
        plan_of(prefixes).sample(-1)
    for seq_length, seed in ((0, 1), (32, -1), (32, 2**64)):
        with pytest.raises(DataError, match="seq_length"):
            SamplePlan([(a, "xx", 1.0)], seq_length, seed)
    with pytest.raises(DataError, match="is missing"):
        SamplePlan([(tmp_path / "nothing", "xx", 1.0)], 32, 1)


def test_sources_of_two_tokenizers_are_refused(
    prefixes: dict[str, str], documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b"\x9a\x06\x00")
    build_dataset(documents, other, tmp_path / "x", "xx")
    with pytest.raises(DataError, match="built with different tokenizers"):
        SamplePlan([(prefixes["a"], "xx", 0.5), (tmp_path / "x", "xx", 0.5)], 32, 1)
