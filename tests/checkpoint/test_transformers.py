"""The same weights in transformers: same logits, at long positions too, and both config forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from megatron_cpt.checkpoint import LlamaForward, convert, open_hf, read_blocks, verify
from megatron_cpt.errors import DataError

CASES = {
    "grouped": {},
    "tied": {"tied_embeddings": True, "num_query_groups": 8, "head_dim": 4},
    # At theta 1000 every frequency is touched by the scaling within the length tested.
    "scaled": {"rope_scaling": {"factor": 32.0}, "rope_theta": 1000.0, "head_dim": 16},
}
LENGTH = 1500


def tokens_of(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 133, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", CASES)
def test_logits_through_a_whole_round_trip(name: str, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", **CASES[name])
    convert(source, tmp_path / "stored", "torch_dist")
    convert(tmp_path / "stored", tmp_path / "back", "hf")
    tokens = tokens_of(1, LENGTH)
    expected = reference_logits(source, tokens)
    assert expected.std() > 0.3
    assert (reference_logits(tmp_path / "back", tokens) - expected).abs().max() <= 1e-4
    for folder in (source, tmp_path / "stored"):
        assert (LlamaForward(folder).logits(tokens) - expected).abs().max() <= 1e-4


def test_scaling_is_seen_by_the_test_above(make_model, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "hf", **CASES["scaled"])
    tokens = tokens_of(1, LENGTH)
    expected = reference_logits(folder, tokens)
    config = json.loads((folder / "config.json").read_text())
    config.update(rope_scaling=None, rope_parameters=None)
    (folder / "config.json").write_text(json.dumps(config))
    assert (LlamaForward(folder).logits(tokens) - expected).abs().max() > 1e-2


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=133,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        rope_parameters={**rope, "original_max_position_embeddings": 8192},
        eos_token_id=[7, 9],
    )
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "stored", "torch_dist")
    verify(tmp_path / "hf", tmp_path / "stored")
    convert(tmp_path / "stored", tmp_path / "back", "hf", dtype="float32")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert again.dtype == torch.float32
    assert again.generation_config.eos_token_id == [7, 9]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), again.state_dict()[name]), name
    ours, theirs = config.rope_parameters, again.config.rope_parameters
    assert {key: theirs[key] for key in ours} == ours


def test_documents_do_not_see_each_other(make_model, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "hf")
    tokens = tokens_of(2, 60)
    borders = [0, 1, 18, 60, 60, 77, 94, 120]  # equal lengths, a single token, an empty document
    got = LlamaForward(folder).logits(tokens, torch.tensor(borders, dtype=torch.int32)).flatten(0, 1)
    for start, stop in zip(borders, borders[1:], strict=False):
        if start < stop:
            alone = reference_logits(folder, tokens.flatten()[None, start:stop])[0]
            assert (got[start:stop] - alone).abs().max() <= 1e-4


@pytest.mark.parametrize("cache", [False, True])
def test_token_nats(cache: bool, make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_cpt.checkpoint.reader.BLOCK_BYTES", 32 * 4 * 50)  # three blocks of the vocabulary
    monkeypatch.setattr("megatron_cpt.checkpoint.forward.LOGITS_BLOCK_ELEMENTS", 1000)
    folder = make_model(tmp_path / "hf")
    tokens, labels = tokens_of(3, 40), tokens_of(3, 40, seed=2)
    labels[1, 5:9] = -100
    expected = cross_entropy(
        reference_logits(folder, tokens).double().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    ).view_as(labels)
    assert len(list(read_blocks(open_hf(folder), "lm_head.weight"))) == 3
    forward = LlamaForward(folder, cache=cache)
    for _ in range(2):
        assert (forward.token_nats(tokens, labels) - expected).abs().max() <= 1e-5
    exact = LlamaForward(open_hf(folder), torch.float64).token_nats(tokens, labels)
    assert exact.dtype == torch.float64 and (exact - expected).abs().max() <= 1e-5


def test_a_cached_forward_reads_each_weight_once(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_hf(make_model(tmp_path / "hf"))
    forward = LlamaForward(reader, cache=True)
    first = forward.logits(tokens_of(1, 8))
    monkeypatch.setattr(reader, "read", None)
    monkeypatch.setattr(reader, "read_rows", None)
    assert torch.equal(forward.logits(tokens_of(1, 8)), first)


def test_ids_beyond_the_vocabulary_are_refused(make_model, tmp_path: Path) -> None:
    forward = LlamaForward(make_model(tmp_path / "hf"))
    tokens = torch.tensor([[1, 133]])
    with pytest.raises(DataError, match="vocabulary of 133"):
        forward.logits(tokens)
    with pytest.raises(DataError, match="vocabulary of 133"):
        forward.token_nats(tokens - 1, tokens)
    with pytest.raises(DataError, match="cu_seqlens"):
        forward.logits(tokens - 1, [0, 1])
