"""The order of the data: exact shares, whole epochs, and nothing that could reorder it."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.config.schema import DataSource, Share, Stage, TrainDataConfig
from megatron_cpt.data import Document, IndexedDataset, Place, SamplePlan, build_dataset, open_plan, reference
from megatron_cpt.data.shares import BLOCK
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


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0], [float("nan")], [float("inf")]])
def test_impossible_weights_are_refused(weights: list[float], prefixes: dict[str, str]) -> None:
    sources = [(prefix, "xx", weight) for prefix, weight in zip(prefixes.values(), weights, strict=False)]
    with pytest.raises((DataError), match="weights"):
        SamplePlan(sources, 32, 1)


def test_a_run_without_end_holds_exactly_the_weights(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes)
    for first in (0, 1280, 1280 * 10**9):
        sources = [plan.place(first + number).source for number in range(1280)]
        assert [Counter(sources)[source] for source in range(3)] == [896, 256, 128]
        assert all(6 <= Counter(sources[start : start + 10])[0] <= 8 for start in range(1270))


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
    order = reference.StageOrder(np.array([[7, 7, 0, -1], [2, 2, 0, -1], [1, 1, 0, -1]]), 10, 0, BLOCK)
    for number in [*range(300), 20_000]:
        source, index = order.at(number)
        windows, content = plan.num_windows[source], plan.windows[source].content_hash
        key = reference.derive(reference.derive(plan.seed, int(content[:16], 16)), int(content[16:32], 16))
        assert plan.place(number) == Place(source, index // windows, reference.visit(index, windows, key))
        sample = plan.sample(number)
        assert sample.language == f"language-{'abc'[source]}" and sample.source == source
        wanted = plan.windows[source].window(plan.place(number).window)
        assert np.array_equal(sample.window.tokens_S, wanted.tokens_S)
        assert np.array_equal(sample.window.labels_S, wanted.labels_S)


def test_epochs_counts_the_passes(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes)
    for count in (0, 1, 999, 1000, 2345):
        counted = Counter(plan.place(number).source for number in range(count))
        expected = {plan.datasets[s].prefix: counted[s] / plan.num_windows[s] for s in range(3)}
        assert plan.epochs(count) == expected
    assert plan.epochs(10**15)[prefixes["a"]] == 7 * 10**14 / plan.num_windows[0]


def test_the_order_hash_names_the_samples(prefixes: dict[str, str], tmp_path: Path) -> None:
    plan = plan_of(prefixes)
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefixes['a']}.{ending}", tmp_path / f"moved.{ending}")
    moved = {**prefixes, "a": str(tmp_path / "moved")}
    same = [plan_of(moved), plan_of(prefixes, a=1.4, b=0.4, c=0.2)]
    assert all(other.order_hash(5) == plan.order_hash(5) for other in same)
    others = [
        plan_of(prefixes, seed=2),
        plan_of(prefixes, seq_length=33),
        plan_of(prefixes, a=0.6, b=0.3, c=0.1),
        plan_of(prefixes, b=0.2, a=0.7, c=0.1),
        plan_of({**prefixes, "a": prefixes["b"], "b": prefixes["a"]}),
    ]
    assert len({plan.order_hash(5), *(other.order_hash(5) for other in others)}) == 6
    assert others[2].order_hash(0) == plan.order_hash(0) != others[0].order_hash(0)
    assert len({tuple(p.place(n).window for n in range(50)) for p in (plan, others[0])}) == 2


def test_text_bytes_are_those_of_the_sources_read(prefixes: dict[str, str]) -> None:
    plan = plan_of(prefixes)
    manifests = [IndexedDataset(prefixes[name]).manifest for name in "abc"]
    each = [manifest["text_bytes"] / manifest["tokens"] * 32 for manifest in manifests]
    for first, stop in ((0, 0), (0, 1), (3, 700)):
        expected = sum(each[plan.place(number).source] for number in range(first, stop))
        assert plan.text_bytes(first, stop) == pytest.approx(expected, rel=1e-12)


def test_impossible_plans_are_refused(prefixes: dict[str, str], documents: list[Document], tmp_path: Path) -> None:
    a = IndexedDataset(prefixes["a"])
    assert SamplePlan([(a, "xx", 1.0)], a.num_tokens - 1, 1).num_windows == [1]
    assert SamplePlan([(a, "xx", 1.0)], a.num_tokens - 2, 1).num_windows == [2]
    with pytest.raises(DataError, match="is listed twice"):
        SamplePlan([(a, "xx", 1.0), (prefixes["a"], "xx", 1.0)], 32, 1)
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefixes['a']}.{ending}", tmp_path / f"copy.{ending}")
    with pytest.raises(DataError, match=r"copy holds the same as .*a; list it once"):
        SamplePlan([(a, "xx", 1.0), (tmp_path / "copy", "xx", 1.0)], 32, 1)
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


def test_a_configuration_opens_its_plan(prefixes: dict[str, str]) -> None:
    """Sources are called by the last part of their prefix; a plan comes out of a pickle as it went in."""
    data = TrainDataConfig(
        train=tuple(DataSource(prefix=prefix, language="xx") for prefix in prefixes.values()),
        stages=(
            Stage(name="one", tokens=6400, shares=(Share(sources=("a",), share=1.0),)),
            Stage(name="two", tokens=6400, shares=(Share(sources=("b", "c"), share=(1.0, 2.0)),)),
        ),
    )
    plan = open_plan(data, 32, 1)
    assert plan.num_samples == 400 and [plan.place(n).stage for n in (0, 199, 200, 399)] == [0, 0, 1, 1]
    assert plan.order.counts(400) == [200, 100, 100]
    assert pickle.loads(pickle.dumps(plan)).description == plan.description
    with pytest.raises(DataError, match="the stages hold 12,800 tokens"):
        plan.sample(400)


def test_a_dataset_that_is_built_anew_is_noticed_by_another_process(
    documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    build_dataset(documents[:50], tokenizer, tmp_path / "x", "xx")
    letter = pickle.dumps(SamplePlan([(tmp_path / "x", "xx")], 32, 1))
    build_dataset(documents[:49], tokenizer, tmp_path / "x", "xx", overwrite=True)
    with pytest.raises(DataError, match="was built anew while it was being read"):
        pickle.loads(letter)
