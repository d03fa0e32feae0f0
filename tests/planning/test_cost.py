"""Parameters, FLOPs and memory against published figures, torch's own counters and each other."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.config.schema import BatchConfig, KernelConfig, LlamaShape, ParallelConfig
from megatron_cpt.planning import (
    check_layout,
    count_parameters,
    estimate_memory,
    flops_per_token,
    rank_parameters,
)
from megatron_cpt.planning.memory import layer_elements_per_token


def shape_of(layers: int, hidden: int, ffn: int, heads: int, groups: int, tied: bool = False) -> LlamaShape:
    return LlamaShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        tied_embeddings=tied,
    )


LLAMA2_7B = shape_of(32, 4096, 11008, 32, 32)
LLAMA2_13B = shape_of(40, 5120, 13824, 40, 40)
LLAMA2_70B = shape_of(80, 8192, 28672, 64, 8)
LLAMA3_8B = shape_of(32, 4096, 14336, 32, 8)
LLAMA32_1B = shape_of(16, 2048, 8192, 32, 8, tied=True)
TINY = shape_of(3, 48, 112, 6, 2)


@pytest.mark.parametrize(
    ("shape", "vocab_size", "published"),
    [
        (LLAMA2_7B, 32000, 6_738_415_616),
        (LLAMA2_13B, 32000, 13_015_864_320),
        (LLAMA2_70B, 32000, 68_976_648_192),
        (LLAMA3_8B, 128256, 8_030_261_248),
        (LLAMA2_70B, 128256, 70_553_706_496),  # Llama 3.1 70B
        (LLAMA32_1B, 128256, 1_235_814_400),
    ],
)
def test_parameters_are_those_of_the_published_models(shape: LlamaShape, vocab_size: int, published: int) -> None:
    assert count_parameters(shape, vocab_size).total == published


def reference_model(shape: LlamaShape, vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_flops_are_what_torch_counts(tied: bool) -> None:
    shape, vocab_size, seq_length, batch = TINY.model_copy(update={"tied_embeddings": tied}), 331, 24, 2
    model = reference_model(shape, vocab_size)
    assert count_parameters(shape, vocab_size).total == sum(weight.numel() for weight in model.parameters())
    with FlopCounterMode(display=False) as counter:
        tokens = torch.randint(vocab_size, (batch, seq_length))
        model(input_ids=tokens, labels=tokens).loss.backward()
    expected = flops_per_token(shape, vocab_size, seq_length, causal=False) * batch * seq_length
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("shape", "vocab_size", "seq_length", "causal", "tokens_per_second", "published"),
    [
        # NVIDIA NeMo 24.12 performance page, H100 fp8, attention counted in full.
        (LLAMA2_7B, 32000, 4096, False, 16934, 780e12),
        (LLAMA2_13B, 32000, 4096, False, 8715, 760e12),
        (LLAMA2_70B, 32000, 4096, False, 1728, 768e12),
        (LLAMA3_8B, 128256, 8192, False, 12273, 711e12),
        (LLAMA2_70B, 128256, 8192, False, 1524, 734e12),
        # Megatron-Bridge 25.11, H100 fp8, causal attention.
        (LLAMA3_8B, 128256, 8192, True, 14451, 744e12),
        (LLAMA2_70B, 128256, 8192, True, 1602, 719e12),
    ],
)
def test_flops_agree_with_published_throughput(
    shape: LlamaShape, vocab_size: int, seq_length: int, causal: bool, tokens_per_second: int, published: float
) -> None:
    assert flops_per_token(shape, vocab_size, seq_length, causal) * tokens_per_second == pytest.approx(
        published, rel=3e-3
    )


@pytest.mark.parametrize(("size", "divisor", "padded"), [(250, 128, 256), (256, 128, 256), (257, 128, 384), (7, 1, 7)])
def test_padded_size(size: int, divisor: int, padded: int) -> None:
    assert padded_vocab_size(size, divisor) == padded


def test_ranks_hold_the_whole_model_between_them() -> None:
    whole = count_parameters(LLAMA2_70B, 43264)
    ranks = rank_parameters(LLAMA2_70B, 43264, (3, 17, 20, 20, 10, 10), 3, 8)
    norms = whole.layer_norms + whole.final_norm  # every tensor-parallel rank holds them
    assert sum(ranks) * 8 == whole.total + 7 * norms


def test_a_tied_head_is_a_copy_on_the_last_stage() -> None:
    table = 128256 * 2048
    assert sum(rank_parameters(LLAMA32_1B, 128256, (16,), 1, 1)) == 1_235_814_400
    assert sum(rank_parameters(LLAMA32_1B, 128256, (8, 8), 2, 1)) == 1_235_814_400 + table


def test_layer_activations_match_what_autograd_keeps() -> None:
    """Against a layer that keeps what fused kernels keep: the inputs of its matrices, q, k, v and the norms."""
    shape, tokens = TINY, 5
    heads, groups, size = shape.num_attention_heads, shape.num_query_groups, shape.head_dim
    kept = {
        "norm input and output, twice": 4 * tokens * shape.hidden_size,
        "q": tokens * heads * size,
        "k and v": 2 * tokens * groups * size,
        "attention output": tokens * heads * size,
        "gate and up": 2 * tokens * shape.ffn_hidden_size,
        "their product": tokens * shape.ffn_hidden_size,
    }
    assert layer_elements_per_token(shape, 1, False) * tokens == sum(kept.values())
    assert layer_elements_per_token(shape, 2, True) * 2 == layer_elements_per_token(shape, 1, False)
    assert layer_elements_per_token(shape, 2, False) > layer_elements_per_token(shape, 2, True)


DEFAULTS = KernelConfig()


def gib(value: int) -> float:
    return value / 2**30


def test_memory_of_a_70b_as_worked_out_by_hand() -> None:
    batch = BatchConfig(seq_length=4096, micro_batch_size=1, global_batch_size=1024)
    parallel = ParallelConfig(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, sequence_parallel=True)
    layout = check_layout(LLAMA2_70B, 43176, 128, parallel, batch, 32)
    first, *_, last = estimate_memory(LLAMA2_70B, layout, parallel, batch, "bf16", KernelConfig())
    # In bf16, before it is added to the fp32 ones: gate and up of one layer, which is more than the table.
    in_flight = 2 * 28672 * 8192 // 8 * 2
    state = first.weights_bytes + first.gradients_bytes - in_flight + first.optimizer_bytes
    assert gib(state) == pytest.approx(36.6, abs=0.1)
    # 20 layers x 4 micro-batches x 4096 tokens x 33.5 D / TP bytes
    assert first.activations_bytes == 80 * 4096 * 33.5 * 8192 / 8
    assert (first.activations_bytes, first.logits_bytes) == (4 * last.activations_bytes, 0)
    assert last.logits_bytes == 4096 * 43264 // 8 * 2


def test_memory_follows_interleaving_recomputation_and_sharding() -> None:
    def first_stage(
        world_size: int, kernels: KernelConfig = DEFAULTS, micro_batch_size: int = 1, **settings: object
    ) -> dict[str, int]:
        batch = BatchConfig(seq_length=4096, micro_batch_size=micro_batch_size, global_batch_size=1024)
        parallel = ParallelConfig.model_validate(
            {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4, "sequence_parallel": True, **settings}
        )
        layout = check_layout(LLAMA2_70B, 43176, 128, parallel, batch, world_size)
        stages = estimate_memory(LLAMA2_70B, layout, parallel, batch, "bf16", kernels)
        return {
            "activations": stages[0].activations_bytes,
            "optimizer": stages[0].optimizer_bytes,
            "logits": stages[-1].logits_bytes,
        }

    plain = first_stage(16)
    interleaved = first_stage(16, virtual_pipeline_model_parallel_size=20)
    assert interleaved["activations"] / plain["activations"] == pytest.approx(1 + 3 / 80, rel=0.01)
    assert first_stage(16, recompute="full")["activations"] < plain["activations"] / 10
    assert first_stage(64)["optimizer"] * 4 == pytest.approx(plain["optimizer"], rel=1e-6)
    assert first_stage(16, KernelConfig(cross_entropy_logits="fp32"))["logits"] == 2 * plain["logits"]
    small = KernelConfig(cross_entropy_budget_mib=1)
    assert plain["logits"] == 4096 * 43264 // 4 * 2
    assert first_stage(16, small)["logits"] == 1 << 20
    # On one rank the head's gradient waits for backward in fp32; all logits of 4096 tokens take less than that.
    alone = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    assert first_stage(16, small, **alone)["logits"] == 4096 * 43264 * 2
    assert first_stage(16, small, 16, **alone)["logits"] == (1 << 20) + 4 * 43264 * 8192
