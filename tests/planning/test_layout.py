"""Layouts: what is refused and why, what is proposed instead, how layers are split."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.schema import BatchConfig, LlamaShape, ParallelConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.planning import Layout, check_layout, pipeline_layout_string, split_layers
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import install_engine

SHAPE = {
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 8,
}
SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "sp": "sequence_parallel",
    "layers": "num_layers_per_stage",
}


def check(
    world_size: int,
    shape: dict[str, int] | None = None,
    divisor: int = 128,
    seq: int = 64,
    gb: int = 8,
    **parallel: Any,
) -> Layout:
    settings = {SHORT.get(key, key): value for key, value in parallel.items()}
    return check_layout(
        LlamaShape.model_validate({**SHAPE, **(shape or {})}),
        250,
        divisor,
        ParallelConfig.model_validate(settings),
        BatchConfig(seq_length=seq, micro_batch_size=1, global_batch_size=gb),
        world_size,
    )


def test_what_follows_from_a_layout() -> None:
    layout = check(16, tp=2, pp=4, vpp=2, sp=True, overlap_p2p=True)
    assert (layout.name, layout.world_size, layout.data_size) == ("TP2-PP4-VPP2-DP2", 16, 2)
    assert (layout.num_micro_batches, layout.padded_vocab_size) == (4, 256)
    assert layout.pipeline_layout == "Et|t|t|t|t|t|t|tL"
    assert layout.bubble == 3 / 8
    assert check(1).pipeline_layout is None


def test_rows_are_padded_until_every_rank_has_as_many() -> None:
    assert check(2, tp=2, divisor=255).padded_vocab_size % 510 == 0
    assert check(1, divisor=255).padded_vocab_size % 255 == 0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            dict(world_size=3, tp=3),
            "does not divide num_attention_heads=8, num_query_groups=4, ffn_hidden_size=176; .* 2$",
        ),
        (dict(world_size=8, tp=8), "=8 does not divide num_query_groups=4; the nearest that .* is 4$"),
        (
            dict(world_size=1, shape={"hidden_size": 66}),
            "=8 does not divide hidden_size=66, .* the nearest hidden_size is 64$",
        ),
        (dict(world_size=1, sp=True), "sequence_parallel needs tensor_model_parallel_size > 1"),
        (dict(world_size=4, tp=4, sp=True, seq=63), "cuts seq_length=63 into .*=4 parts; .* seq_length=64$"),
        (
            dict(world_size=1, shape={"max_position_embeddings": 63}),
            "batch.seq_length=64 is longer than the model's max_position_embeddings=63; shorten it$",
        ),
        (dict(world_size=9, pp=9), "makes 9 stages for num_layers=8; the largest .* is 8$"),
        (dict(world_size=4, pp=4, vpp=3), "=4 x virtual=3 makes 12 stages for num_layers=8; .* is 2$"),
        (dict(world_size=1, vpp=2), "=2 needs pipeline_model_parallel_size >= 2, got 1"),
        (dict(world_size=2, pp=2, vpp=1), "=1 interleaves nothing"),
        (dict(world_size=2, pp=2, vpp=2), "interleaving over pipeline_model_parallel_size=2 needs overlap_p2p=true"),
        (dict(world_size=4, pp=4, vpp=2, gb=6), "divisible by pipeline_model_parallel_size=4, got 6; .*_size=8$"),
        (dict(world_size=4, pp=4, overlap_p2p=True), "overlap_p2p needs the interleaved schedule"),
        (dict(world_size=2, pp=2, layers=(8,)), "has 1 entries, expected 2"),
        (dict(world_size=2, pp=2, layers=(3, 3)), r"=\[3, 3\] sums to 6, expected num_layers=8; .* is \[4, 4\]$"),
        (dict(world_size=3, pp=3, layers=(4, 0, 4)), "has an empty stage in the middle"),
        (dict(world_size=2, overlap_param_gather=True), "overlap_param_gather needs overlap_grad_reduce"),
        (dict(world_size=6, pp=4), "world size 6 is not a multiple of tensor x pipeline = 1 x 4 = 4; .* is 8$"),
        (dict(world_size=3), r"global_batch_size=8 is not .* 1 x 3 = 3 times a whole number; .* works is 9$"),
        (dict(world_size=1, shape={"num_query_groups": 3}), "num_query_groups=3 does not divide .*=8; .* is 2$"),
        (dict(world_size=1, shape={"head_dim": 7}), "head_dim=7 is odd, .* use 8$"),
    ],
)
def test_impossible_layouts_say_which_divisor_fails(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(**settings)
    assert re.search(reason, str(caught.value), re.MULTILINE), str(caught.value)


def test_each_problem_has_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        check(5, tp=3, overlap_p2p=True)
    assert str(caught.value).splitlines()[0] == "this layout has 3 problems:"
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("tensor", range(1, 17))
def test_a_proposed_tensor_size_works(tensor: int) -> None:
    try:
        check(tensor, tp=tensor, divisor=240)
    except ConfigError as caught:
        proposed = int(re.findall(r"the nearest .* is (\d+)", str(caught))[0])
        check(proposed, tp=proposed, divisor=240)


@pytest.mark.parametrize(
    "settings", [dict(pp=2, layers=(0, 8)), dict(pp=2, layers=(8, 0)), dict(pp=2, vpp=2, overlap_p2p=True)]
)
def test_rare_but_possible_layouts(settings: dict[str, Any]) -> None:
    assert sum(check(2, **settings).layers_per_stage) == 8


def test_layers_that_do_not_divide_leave_room_for_the_head() -> None:
    assert check(3, shape={"num_layers": 7}, pp=3).layers_per_stage == (2, 3, 2)
    assert check(2, pp=2).layers_per_stage == (4, 4)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(0, 8))
def test_no_split_is_faster(num_layers: int, num_stages: int, head: float) -> None:
    """Against every split there is."""
    if num_layers < num_stages:
        with pytest.raises(ConfigError, match=f"use at most {num_layers}"):
            split_layers(num_layers, num_stages, head)
        return

    def slowest(split: tuple[int, ...]) -> float:
        return max(*split[:-1], split[-1] + head) if num_stages > 1 else num_layers + head

    split = split_layers(num_layers, num_stages, head)
    borders = itertools.combinations(range(1, num_layers), num_stages - 1)
    every = [tuple(b - a for a, b in itertools.pairwise((0, *cut, num_layers))) for cut in borders]
    assert len(split) == num_stages and sum(split) == num_layers and min(split) >= 1
    assert slowest(split) == min(slowest(other) for other in every)


@pytest.mark.parametrize("layers", [(1, 1), (3, 1), (0, 4, 0), (2, 2, 1, 3)])
def test_megatron_core_reads_the_layout_string(layers: tuple[int, ...]) -> None:
    install_engine(current_device().type)
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(pipeline_layout_string(layers))
    assert [stage.count(LayerType.decoder) for stage in stages] == list(layers)
    PipelineParallelLayerLayout(stages, len(layers)).validate_layer_layout(sum(layers), 0)
