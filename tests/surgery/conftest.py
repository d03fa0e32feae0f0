"""A base tokenizer, its extension, the map between them, and tiny models of any kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatron_cpt.tokenizer import VocabMap, extend_tokenizer, train_tokenizer

ENGLISH = "the river runs past a quiet town and nobody asks where it goes in winter".split()
JAPANESE = "静かな 川が 町を 流れて いる 冬の 朝 光が 窓から 差し込む 日本語".split()


@pytest.fixture(scope="session")
def old_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 330 ids."""
    draw = random.Random(1)
    folder = tmp_path_factory.mktemp("surgery") / "old"
    train_tokenizer([" ".join(draw.choices(ENGLISH, k=9)) for _ in range(200)], 330, folder)
    return folder


@pytest.fixture(scope="session")
def new_tokenizer(tmp_path_factory: pytest.TempPathFactory, old_tokenizer: Path) -> Path:
    """The old one with some 60 Japanese pieces."""
    draw = random.Random(2)
    folder = tmp_path_factory.mktemp("surgery") / "new"
    lines = ["".join(draw.choices(JAPANESE, k=9)) for _ in range(200)]
    extend_tokenizer(old_tokenizer, lines, 70, "ja", 8, folder)
    return folder


@pytest.fixture(scope="session")
def vocab_map(new_tokenizer: Path) -> VocabMap:
    """From old to new."""
    return VocabMap.load(new_tokenizer)


Make = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> Make:
    """Writes a random Llama with transformers; returns its folder."""

    def make(
        vocab_size: int, tied: bool = False, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB"
    ) -> Path:
        torch.manual_seed(vocab_size)
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
        folder = tmp_path / f"model_{vocab_size}_{tied}_{max_shard_size}"
        transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make
