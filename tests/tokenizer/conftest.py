"""Generated English, Japanese and Korean lines, and tokenizers trained on them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from megatron_cpt.tokenizer import TextMixture, extend_tokenizer, replace_tokenizer, train_tokenizer
from megatron_cpt.tokenizer.hf_files import write_hf_files
from megatron_cpt.tokenizer.model_file import ModelFile, Piece, PieceType
from megatron_cpt.tokenizer.training import LLAMA_NORMALIZER, LLAMA_RULES, train_model

ENGLISH = (
    "the river runs past quiet town nobody asks where goes winter morning light house window market bread "
    "children laughing under bridge because station remembers every train that never came back again"
)
JAPANESE = (
    "静かな 川が 町を 流れて いる 冬の 朝 光が 窓から 差し込む 市場で パンを 買う 子供たちは 橋の下で 笑っている "
    "駅は 帰らない 列車を 覚えている 東京 日本語 しかし それは 「本当」 です。 でした、"
)
KOREAN = "조용한 강이 마을을 흐르고 있다 겨울 아침 빛이 창문으로 들어온다 시장에서 빵을 산다 아이들은 웃는다"


def lines_of(words: str, joint: str, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [joint.join(draw.choices(words.split(), k=draw.randint(3, 12))) for _ in range(count)]


@pytest.fixture(scope="session")
def english() -> list[str]:
    """400 lines with digits, runs of spaces and code among the words."""
    lines = lines_of(ENGLISH, " ", 400, seed=1)
    lines[::10] = [f"    if {line[:9]}  ==  {number}:\treturn" for number, line in enumerate(lines[::10])]
    return lines


@pytest.fixture(scope="session")
def japanese() -> list[str]:
    """400 lines."""
    return lines_of(JAPANESE, "", 400, seed=2)


@pytest.fixture(scope="session")
def korean() -> list[str]:
    """200 lines."""
    return lines_of(KOREAN, " ", 200, seed=3)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, english: list[str]) -> Path:
    """An English tokenizer of 450 ids."""
    folder = tmp_path_factory.mktemp("tokenizers") / "base"
    train_tokenizer(english, 450, folder, language="en")
    return folder


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory, base: Path, japanese: list[str]) -> Path:
    """The base with Japanese pieces, its size a multiple of 8."""
    folder = tmp_path_factory.mktemp("tokenizers") / "extended"
    extend_tokenizer(base, japanese, 200, "ja", 8, folder, "ja")
    return folder


@pytest.fixture(scope="session")
def replaced(
    tmp_path_factory: pytest.TempPathFactory, with_runs: Path, english: list[str], japanese: list[str]
) -> Path:
    """A vocabulary of both languages, as large as the base that it replaces."""
    folder = tmp_path_factory.mktemp("tokenizers") / "replaced"
    mixture = TextMixture({"en": english, "ja": japanese}, {"en": 1, "ja": 2})
    replace_tokenizer(with_runs, mixture, 464, 8, folder, "en,ja")
    return folder


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory, english: list[str], japanese: list[str]) -> Path:
    """A Unigram tokenizer of both languages."""
    folder = tmp_path_factory.mktemp("tokenizers") / "unigram"
    train_tokenizer([*english, *japanese], 600, folder, model_type="unigram")
    return folder


Rebuild = Callable[[ModelFile, Sequence[Piece]], bytes]


@pytest.fixture(scope="session")
def rebuild() -> Rebuild:
    """Writes a model file with other pieces and the same settings."""

    def write(model: ModelFile, pieces: Sequence[Piece]) -> bytes:
        empty = replace(model, data=b"")
        listed = empty.with_appended(model.pieces)
        assert model.data.startswith(listed)
        return empty.with_appended(pieces) + model.data[len(listed) :]

    return write


@pytest.fixture(scope="session")
def with_runs(tmp_path_factory: pytest.TempPathFactory, english: list[str], rebuild: Rebuild) -> Path:
    """An English tokenizer whose runs of 2 to 16 spaces all score -1e9 and have low ids, as Llama 2's."""
    folder = tmp_path_factory.mktemp("tokenizers") / "with_runs"
    folder.mkdir()
    rules = replace(LLAMA_RULES, allow_whitespace_only_pieces=False)
    model = train_model(english, 450, rules, LLAMA_NORMALIZER, 0.9995).model
    lengths = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15)
    runs = [Piece("\u2581" * length, -1e9, PieceType.NORMAL) for length in lengths]
    (folder / "tokenizer.model").write_bytes(rebuild(model, [*model.pieces[:259], *runs, *model.pieces[259:]]))
    write_hf_files(folder)
    return folder


@pytest.fixture
def byte_level(tmp_path: Path, english: list[str]) -> Path:
    """A byte-level BPE with special tokens, as Llama 3's: a folder without tokenizer.model."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(english, trainer)
    made.enable_truncation(4)
    folder = tmp_path / "byte_level"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
