"""Costs of a vocabulary, by hand."""

from __future__ import annotations

from megatron_cpt.planning import tensor_parallel_fit, vocabulary_costs
from megatron_cpt.reporting.tokenizer_report import usual_shapes


def test_fit() -> None:
    even, odd = tensor_parallel_fit(39_040, [8, 3], 128, 4096)
    assert even == {
        "tensor_model_parallel_size": 8,
        "divides": True,
        "padded_vocab_size": 39_040,
        "padded_rows": 0,
        "rows": 4880,
        "logits_bytes": 4096 * 4880 * 4,
    }
    assert (odd["divides"], odd["padded_vocab_size"], odd["rows"]) == (False, 39_168, 13_056)
    (lone,) = tensor_parallel_fit(32_001, [4], 1, 1)
    assert (lone["padded_vocab_size"], lone["padded_rows"], lone["divides"]) == (32_004, 3, False)


def test_costs_of_llama_2() -> None:
    """Against the published sizes: 6,738,415,616 parameters with 32,000 ids, both tables untied."""
    small, large = usual_shapes().values()
    cost = vocabulary_costs(small, 32_000, 4096)
    assert cost["parameters"] == 2 * 32_000 * 4096
    assert cost["parameter_share"] == 2 * 32_000 * 4096 / 6_738_415_616
    assert vocabulary_costs(small, 40_000, 4096)["flops_per_token"] - cost["flops_per_token"] == 6 * 8_000 * 4096
    assert vocabulary_costs(large, 32_000, 4096)["parameter_share"] == 2 * 32_000 * 8192 / 68_976_648_192
