"""Stages: exact shares at every sample, whole epochs, caps, growth, and the papers' curricula at full size."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.loading import load_config
from megatron_cpt.config.schema import Replay, Share, Stage, TrainConfig
from megatron_cpt.data.lineage import description, order_hash, what_changed
from megatron_cpt.data.shares import BLOCK, largest_remainder
from megatron_cpt.data.stages import Order, Place, SourceFacts, describe_order
from megatron_cpt.errors import ConfigError, DataError

CURRICULA = Path(__file__).parents[2] / "examples" / "curricula"


def source(name: str, windows: int, weight: float = 1.0, max_epochs: float | None = None) -> SourceFacts:
    return SourceFacts(name, hashlib.sha256(name.encode()).hexdigest(), windows, "xx", weight, max_epochs)


def stage(name: str, tokens: int, *shares: tuple[list[str], Any], **options: Any) -> Stage:
    return Stage(
        name=name,
        tokens=tokens,
        shares=tuple(Share(sources=tuple(names), share=share) for names, share in shares),
        **options,
    )


ABC = [source("a", 700), source("b", 90), source("c", 33)]
WARM = stage("warm", 3000, (["a"], 3.0), (["b"], 1.0))
MOVE = stage("move", 5000, (["a"], (3.0, 0.0)), (["b", "c"], (1.0, 4.0)))
LAST = stage("last", 4000, (["c"], 9.0), replay=Replay(sources=("a",), share=0.25))


shares = st.integers(0, 50).map(float)


@given(
    ends=st.lists(st.tuples(shares, shares).filter(any), min_size=1, max_size=9).filter(
        lambda ends: all(sum(side) for side in zip(*ends, strict=True))
    ),
    samples=st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_everywhere(ends: list[tuple[float, float]], samples: int) -> None:
    """Within 1 at every border of blocks and 2 anywhere, whether shares stand still or move."""
    if all(start * sum(e for _, e in ends) == end * sum(s for s, _ in ends) for start, end in ends):
        ends = [(start, start) for start, _ in ends]
    sources = [source(f"s{n}", 10**9) for n in range(len(ends))]
    order = Order(sources, [stage("x", samples, *([[s.name], e] for s, e in zip(sources, ends, strict=True)))], 1, 1)
    block, totals = order.stages[0].block, [sum(Fraction(repr(x)) for x in side) for side in zip(*ends, strict=True)]
    scaled = [(Fraction(repr(start)) / totals[0], Fraction(repr(end)) / totals[1]) for start, end in ends]
    for t in {*range(0, samples + 1, 7), *range(0, samples + 1, block), samples}:
        counts = order.counts(t)
        assert sum(counts) == t
        for count, (start, end) in zip(counts, scaled, strict=True):
            exact = start * t + (end - start) * t * t / (2 * samples)
            assert abs(count - exact) < (1 if t % block == 0 else 2)


def test_sources_are_mixed_evenly_and_not_in_clumps() -> None:
    order = Order([source("a", 9999), source("b", 9999)], [stage("x", 9000, (["a"], 2.0), (["b"], 1.0))], 1, 1)
    places = [order.place(t).source for t in range(9000)]
    assert all(5 <= places[t : t + 9].count(0) <= 7 for t in range(8991))


@given(weights=st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_fine_shares_are_rounded_by_largest_remainder(weights: list[int]) -> None:
    fractions = [Fraction(weight, sum(weights)) for weight in weights]
    counts = largest_remainder(fractions, 1000)
    assert sum(counts) == 1000 and min(counts) >= 1
    wanted = [share * 1000 for share in fractions]
    if min(wanted) >= 1:
        assert all(abs(count - share) < 1 for count, share in zip(counts, wanted, strict=True))
        up = [share % 1 for count, share in zip(counts, wanted, strict=True) if count > share]
        down = [share % 1 for count, share in zip(counts, wanted, strict=True) if count <= share]
        assert min(up, default=Fraction(1)) >= max(down, default=Fraction(0))


def test_small_shares_are_not_lost() -> None:
    assert largest_remainder([Fraction(1, 10**12), 1 - Fraction(1, 10**12)], 1000) == [1, 999]
    with pytest.raises(DataError, match="1001 shares of a whole of 1000"):
        largest_remainder([Fraction(1, 1001)] * 1001, 1000)
    order = Order([source("a", 9, 1e9), source("b", 9, 1e-9)], [], 1, 1)
    assert order.counts(1 << 20)[1] == 1


def test_stages_follow_each_other_and_nothing_repeats_before_an_epoch_is_over() -> None:
    order = Order(ABC, [WARM, MOVE, LAST], 4, 3)
    assert order.num_samples == 3000 and [s.first for s in order.stages] == [0, 750, 2000]
    places = [order.place(t) for t in range(3000)]
    assert [p.stage for p in places] == [0] * 750 + [1] * 1250 + [2] * 1000
    for number, facts in enumerate(ABC):
        visits = [(p.epoch, p.window) for p in places if p.source == number]
        assert [epoch for epoch, _ in visits] == [k // facts.windows for k in range(len(visits))]
        for first in range(0, len(visits), facts.windows):
            epoch = [window for _, window in visits[first : first + facts.windows]]
            assert len(set(epoch)) == len(epoch) and (len(epoch) < 30 or epoch != sorted(epoch))
    assert order.counts(3000) == [Counter(p.source for p in places)[s] for s in range(3)]
    assert [order.counts(t) for t in (0, 749, 750, 1999, 2000)] == [
        [sum(p.source == s for p in places[:t]) for s in range(3)] for t in (0, 749, 750, 1999, 2000)
    ]
    assert sum(p.source == 0 for p in places[2000:]) == 250


def test_sources_in_turn_are_read_one_after_another() -> None:
    turns = Share(sources=("b", "c", "a"), share=1.0, in_turn=True, parts=(1.0, 1.0, 2.0))
    mixed = Stage(name="x", tokens=4096, shares=(turns, Share(sources=("d",), share=1.0)))
    order = Order([*ABC, source("d", 500)], [mixed], 1, 1)
    places = [order.place(t).source for t in range(4096)]
    turn = [place for place in places if place != 3]
    assert [turn.count(s) for s in (1, 2, 0)] == [512, 512, 1024] and turn == [1] * 512 + [2] * 512 + [0] * 1024
    by_size = mixed.model_copy(update={"shares": (turns.model_copy(update={"parts": None}),)})
    counts = Order(ABC, [by_size], 1, 1).counts(4096)
    block = Order(ABC, [by_size], 1, 1).stages[0].block
    assert all(abs(n - 4096 * facts.windows / 823) <= block for n, facts in zip(counts, ABC, strict=True))
    moving = turns.model_copy(update={"share": (1.0, 3.0)})
    order = Order([*ABC, source("d", 500)], [Stage(name="x", tokens=9000, shares=(moving, mixed.shares[1]))], 1, 1)
    counts, block = order.counts(9000), order.stages[0].block
    whole = sum(counts[:3])
    assert abs(counts[1] - whole / 4) <= block and abs(counts[2] - whole / 4) <= block


def test_an_order_is_of_record() -> None:
    """A change of these values would silently reorder the data of runs that are resumed."""
    places = [Order(ABC, [WARM, MOVE, LAST], 4, 3).place(t) for t in (0, 1, 2, 3, 800, 1500, 2999)]
    assert places == [
        Place(0, 0, 406, 0),
        Place(0, 0, 224, 0),
        Place(0, 0, 156, 0),
        Place(1, 0, 19, 0),
        Place(0, 0, 104, 1),
        Place(1, 4, 42, 1),
        Place(2, 34, 25, 2),
    ]
    assert (
        order_hash(description(Order(ABC, [WARM, MOVE, LAST], 4, 3)), 1000)
        == "364327859ee2b976b6f7d4c3c3a93cff5ff46db3872bac814aaa664dff6d9d8b"
    )


def test_other_sources_and_shares_do_not_change_what_a_source_shows() -> None:
    def visits(order: Order, name: str) -> list[tuple[int, int]]:
        places = [order.place(t) for t in range(2500)]
        return [(p.epoch, p.window) for p in places if order.sources[p.source].name == name][:300]

    alone = visits(Order([ABC[1]], [], 8, 3), "b")
    assert alone == visits(Order(ABC, [stage("x", 99999, (["b"], 0.2), (["c"], 0.8))], 8, 3), "b")
    assert alone == visits(Order([source("new", 7), *reversed(ABC)], [], 8, 3), "b")
    assert alone != visits(Order([ABC[1]], [], 8, 4), "b")


def test_growing_never_changes_what_came_before() -> None:
    """More tokens in the last stage, new stages with new sources, and other shares later."""
    base = Order(ABC, [WARM, LAST], 4, 3)
    more = LAST.model_copy(update={"tokens": 40_000})
    new = stage("new", 5000, (["d"], 1.0), (["a"], 1.0))
    grown = [
        Order(ABC, [WARM, more], 4, 3),
        Order([source("d", 5), *ABC], [WARM, LAST, new], 4, 3),
        Order(ABC, [WARM.model_copy(update={"name": "renamed"}), LAST, MOVE], 4, 3),
    ]
    assert base.num_samples == 1750
    for other in grown:
        assert order_hash(description(other), 1750) == order_hash(description(base), 1750)
        assert what_changed(description(base), description(other), 1750) == ""
        for t in range(1750):
            mine, theirs = base.place(t), other.place(t)
            assert base.sources[mine.source].name == other.sources[theirs.source].name
            assert (mine.epoch, mine.window) == (theirs.epoch, theirs.window)
    assert [Order(ABC, [], 4, 3).place(t) for t in range(100)] == [
        Order(ABC, [stage("x", 4000, (["a"], 1.0), (["b"], 1.0), (["c"], 1.0))], 4, 3).place(t) for t in range(100)
    ]


def test_a_change_of_the_past_has_another_hash_and_is_explained() -> None:
    base = Order(ABC, [WARM, MOVE, LAST], 4, 3)
    shorter, longer = (WARM.model_copy(update={"tokens": tokens}) for tokens in (2996, 3004))
    other_a = [SourceFacts("a", "0" * 64, 700, "xx"), *ABC[1:]]
    smaller = [SourceFacts("a", ABC[0].content, 699, "xx"), *ABC[1:]]
    cases: list[tuple[Order, int, str]] = [
        (Order(ABC, [WARM, MOVE, LAST], 4, 4), 0, "seed was 3 and is now 4"),
        (Order(ABC, [WARM, MOVE, LAST], 5, 3), 0, "seq_length was 4 and is now 5"),
        (
            Order(ABC, [shorter, MOVE, LAST], 4, 3),
            750,
            "'warm', which began at sample 0: it had 750 samples and has 749",
        ),
        (
            Order(ABC, [longer, MOVE, LAST], 4, 3),
            751,
            "'warm', which began at sample 0: it had 750 samples and has 751",
        ),
        (Order(ABC, [WARM], 4, 3), 751, "there were 2 stages in it and are now 1"),
        (
            Order(other_a, [WARM, MOVE, LAST], 4, 3),
            1,
            r"source 'a' has other tokens now \(\w{12} became 000000000000\)",
        ),
        (Order(smaller, [WARM, MOVE, LAST], 4, 3), 1, "source 'a' had 700 samples and has 699"),
        (Order(ABC, [LAST, MOVE, WARM], 4, 3), 1, "'last', which began at sample 0: it was a 0.75, b 0.25 and is now"),
        (Order(ABC, [WARM, MOVE.model_copy(update={"tokens": 6000}), LAST], 4, 3), 751, "it had 1,250 samples and has"),
        (
            Order([source("a", 700, 2.0), ABC[1]], [], 4, 3),
            1,
            "it was a 0.75, b 0.25 and is now a 0.666667, b 0.333333",
        ),
    ]
    for other, samples, reason in cases:
        assert order_hash(description(other), samples) != order_hash(description(base), samples)
        assert re.search(reason, what_changed(description(base), description(other), samples))


def test_a_source_that_runs_out_is_named_with_its_stage_and_token() -> None:
    capped = [source("a", 700, max_epochs=1.5), *ABC[1:]]
    with pytest.raises(DataError) as caught:
        Order(capped, [WARM, MOVE, LAST], 4, 3)
    used = Order(ABC, [WARM, MOVE, LAST], 4, 3)
    wanted = used.counts(3000)[0]
    first = next(t for t in range(3000) if used.counts(t + 1)[0] > 1050)
    assert str(caught.value).startswith(
        f"source 'a' runs out in stage {used.stages[used.place(first).stage].name!r} at token {first * 4:,}: "
        f"max_epochs=1.5 of its 700 samples are 1,050, 12,000 tokens of the plan take {wanted:,}; give it more text"
    )
    enough = float(str(caught.value).rpartition(" ")[2])
    Order([source("a", 700, max_epochs=enough), *ABC[1:]], [WARM, MOVE, LAST], 4, 3)
    endless = Order([source("a", 10, max_epochs=2.0)], [], 4, 3)
    endless.require(20)
    with pytest.raises(DataError, match="source 'a' runs out at token 80"):
        endless.require(21)


def test_there_is_nothing_beyond_the_last_stage() -> None:
    order = Order(ABC, [WARM], 4, 3)
    order.require(750)
    for call in (order.require, order.place):
        with pytest.raises(DataError, match=r"hold 3,000 tokens \(750 samples of 4\), asked for was sample 751"):
            call(751 - (call == order.place))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage("x", 3, (["a"], 1.0))], "stage 'x' with 3 tokens holds no sample of 4"),
        ([stage("x", 400, (["z"], 1.0))], "0 sources are called 'z'; expected one of a, b, c"),
        ([stage("x", 400, (["a"], 1.0), (["a", "b"], 1.0))], "names source 'a' twice"),
        ([stage("x", 400, (["a"], (0.0, 1.0)))], "all shares are 0 at one end"),
        (
            [Stage(name="x", tokens=8, shares=(Share(sources=("a", "b", "c"), share=1.0, in_turn=True),))],
            "2 samples is too short for a, b, c in turn",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(stages: list[Stage], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Order(ABC, stages, 4, 1)


def curriculum(name: str) -> Order:
    """A configuration's order at full size, of sources with the tokens that it states."""
    config = load_config(CURRICULA / name, TrainConfig).config
    length = config.batch.seq_length
    facts = [source(s.title, -(-(s.tokens or 0) // length), s.weight, s.max_epochs) for s in config.data.train]
    order = Order(facts, config.data.stages, length, config.seed)
    order.require(config.train_steps * config.batch.global_batch_size)
    return order


def test_the_curriculum_of_ricoh() -> None:
    """3:1 then 1:3, wiki -> cc100 -> oscar -> oscar -> cc100 -> wiki, one epoch of everything."""
    order = curriculum("ricoh.yaml")
    half = order.stages[1].first
    assert order.num_samples is not None and abs(half - order.num_samples / 2) <= 1
    first, both = order.counts(half), order.counts(order.num_samples)
    assert first[3] == pytest.approx(half * 0.75, abs=1) and both[3] - first[3] == pytest.approx(half * 0.25, abs=2)
    for count, facts in zip(both, order.sources, strict=True):
        assert abs(count - facts.windows) <= 2 * BLOCK
    steps = [0, half // 20, half // 3, half - 1, half, half + half // 3, 2 * half - half // 25, 2 * half - 1]
    japanese = []
    for step in steps:
        near = [order.place(min(max(step + k, 0), 2 * half - 1)).source for k in range(-8, 9)]
        japanese.append({order.sources[s].name for s in near if s != 3} if step not in (half - 1, half) else {"oscar"})
    assert japanese == [{"wiki"}, {"cc100"}, {"cc100"}, {"oscar"}, {"oscar"}, {"oscar"}, {"cc100"}, {"wiki"}]


def test_the_two_stages_of_swallow() -> None:
    order = curriculum("swallow.yaml")
    stages = describe_order(order, 0)
    assert [(facts["name"], round(facts["epochs"], 2)) for facts in stages[0]["sources"]] == [("parallel", 1.0)]
    main = {facts["name"]: facts for facts in stages[1]["sources"]}
    assert {name: round(facts["epochs"], 3) for name, facts in main.items()} == dict.fromkeys(main, 1.0)
    japanese = sum(facts["samples"] for name, facts in main.items() if name not in ("arxiv", "refinedweb"))
    assert japanese / stages[1]["samples"] == pytest.approx(0.9, abs=1e-6)
    assert {order.place(t).stage for t in (0, 195_311)} == {0} and order.place(195_312).stage == 1


def test_wrong_stages_of_a_configuration_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text((CURRICULA / "ricoh.yaml").read_text().replace("[wiki, cc100, oscar]", "[wik, oscar, en]"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, TrainConfig, ["train_steps=20000"])
    message = str(caught.value)
    assert "data.stages.0: got source 'wik', expected one of data.train; did you mean wiki?" in message
    assert "data.stages.0: got source 'en' 2 times, expected once" in message
    assert "got 68,400,000,000 tokens in all, expected at least train_steps * global_batch_size * seq_len" in message
    path.write_text((CURRICULA / "swallow.yaml").read_text().replace("data/cc.2,", "other/cc.1,"))
    with pytest.raises(ConfigError, match=r"data.train: got 2 sources called 'cc.1', expected one"):
        load_config(path, TrainConfig)
    one = (CURRICULA / "swallow.yaml").read_text()
    for share, words in (("[0.0, 0.0]", "a share that is always 0"), ("-1.0", "greater than or equal to 0")):
        path.write_text(one.replace("share: 1.0}", f"share: {share}}}"))
        with pytest.raises(ConfigError, match=words):
            load_config(path, TrainConfig)


def test_a_configuration_with_stages_is_shown_and_loads_back(tmp_path: Path) -> None:
    for name in ("ricoh.yaml", "swallow.yaml"):
        resolved = load_config(CURRICULA / name, TrainConfig)
        (tmp_path / name).write_text(resolved.dump())
        assert load_config(tmp_path / name, TrainConfig).config == resolved.config
