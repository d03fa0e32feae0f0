"""Scores against transformers, against validation during training, and against a model whose answer is known."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import LlamaForCausalLM

from megatron_cpt.checkpoint import LlamaForward, convert, hf_config, hf_shapes, write_hf
from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.cli.main import main
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.data import Document, IndexedDataset, build_dataset
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.evaluation import bits_per_byte, logit_parity, probe_accuracy, score_dataset
from megatron_cpt.runtime.device import Device
from megatron_cpt.tokenizer import load_tokenizer, train_tokenizer
from tests.training.conftest import SHAPE, Tiny, make_tiny, write_documents, write_tokenizer

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random Llama with its tokenizer beside it, in one folder."""
    tiny = make_tiny(tmp_path_factory.mktemp("evaluated"), 256)
    (tiny.hf / "tokenizer.model").write_bytes((tiny.tokenizer / "tokenizer.model").read_bytes())
    return tiny


def transformers_bits_per_byte(model: Tiny, texts: list[str]) -> float:
    """Every document alone, in windows of the packed stream: what `score_dataset` packs together."""
    network = LlamaForCausalLM.from_pretrained(model.hf)
    tokenizer = SentencePieceProcessor(model_file=str(model.hf / "tokenizer.model"))
    rows = [[1, *ids, 2] for ids in tokenizer.encode(texts)]
    stream = [(document, id) for document, row in enumerate(rows) for id in row]
    nats = 0.0
    for start in range(0, len(stream) - 1, SEQ_LENGTH):
        window = stream[start : start + SEQ_LENGTH + 1]
        for document in sorted({number for number, _ in window}):
            ids = torch.tensor([[id for number, id in window if number == document]])
            with torch.no_grad():
                log_probabilities = network(ids[:, :-1]).logits.log_softmax(-1) if ids.shape[1] > 1 else None
            for place, label in enumerate(ids[0, 1:].tolist()):
                if label != 2:
                    nats -= log_probabilities[0, place, label].item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_bits_per_byte_equals_transformers(model: Tiny, tmp_path: Path) -> None:
    documents = write_documents(7, 12)
    score = bits_per_byte(model.hf, documents, SEQ_LENGTH)
    assert score["bits_per_byte"] == pytest.approx(
        transformers_bits_per_byte(model, [d.text for d in documents]), abs=1e-5
    )
    assert score["text_bytes"] == sum(len(document.text.encode()) for document in documents)
    tokens = sum(len(ids) for ids in load_tokenizer(model.hf).encode_batch([d.text for d in documents]))
    assert score["tokens"] == tokens


def test_command_line_gives_the_same(model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = write_documents(7, 12)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    words = ["evaluate", str(model.hf), "--text", f"xx={text}", "--seq-length", str(SEQ_LENGTH), "--json"]
    assert main(words) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["xx"]["bits_per_byte"] == bits_per_byte(model.hf, documents, SEQ_LENGTH)["bits_per_byte"]
    assert main(["evaluate", str(model.hf), "--text", str(text)]) == 2
    assert "expected LANGUAGE=FILE" in capsys.readouterr().err


def test_wrong_words_are_refused_before_anything_is_scored(
    model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_text("abc def\n")
    empty.write_text("\n\n")
    words = ["evaluate", str(model.hf), "--text", f"xx={text}"]
    cases = {
        ("--seq-length", "0"): "--seq-length",
        ("--seq-length", "-3"): "--seq-length",
        ("--seq-length", "65"): "--seq-length 65 is longer than the max_position_embeddings=64",
        ("--text", f"xx={empty}"): f"xx was given already, as {text}",
        ("--text", f"yy={empty}"): f"{empty} holds no text to score",
    }
    for more, message in cases.items():
        assert main([*words, *more]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out
    assert main([*words, "--seq-length", "64"]) == 0


def test_the_accelerator_scores(model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward pass is asked to run on the device of this process, whatever that is."""
    asked: list[tuple[str | None, bool]] = []

    class Elsewhere(LlamaForward):
        def __init__(self, *args: Any, device: torch.device | None = None, **named: Any) -> None:
            asked.append((device and device.type, named.get("cache", False)))
            super().__init__(*args, **named)

    for name in ("bits_per_byte", "parity"):
        module = importlib.import_module(f"megatron_cpt.evaluation.{name}")
        monkeypatch.setattr(module, "LlamaForward", Elsewhere)
        monkeypatch.setattr(module, "current_device", lambda: Device("meta", "elsewhere", "gloo", None, 1))
    score = bits_per_byte(model.hf, write_documents(7, 3), SEQ_LENGTH)
    logits_SV = LlamaForward(model.hf).logits(torch.arange(5)[None])[0]
    proof = {"tokens": torch.arange(5), "positions": torch.tensor([1, 4]), "logits": logits_SV[[1, 4]].contiguous()}
    save_file(proof, tmp_path / "proof.safetensors")
    assert logit_parity(model.hf, tmp_path / "proof.safetensors")["max_abs_diff"] <= 1e-6
    assert asked == [("meta", False), ("meta", False)]  # a device with room for one byte keeps no weights
    assert score["bits_per_byte"] == bits_per_byte(model.hf, write_documents(7, 3), SEQ_LENGTH)["bits_per_byte"]


def test_another_tokenizer_is_refused(model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its size, and by its hash where the size agrees; rows of padding are no reason."""
    text = tmp_path / "text.txt"
    text.write_text("abc def\n")
    words = ["evaluate", str(model.hf), "--text", f"xx={text}", "--seq-length", "32"]
    for size, reason in ((240, "has 256 vocabulary rows but the tokenizer"), (256, "was made for another tokenizer")):
        write_tokenizer(tmp_path / str(size), write_documents(7, 100), size)
        for folder in (model.hf, model.initial):
            assert main(["evaluate", str(folder), *words[2:], "--tokenizer", str(tmp_path / str(size))]) == 2
            printed = capsys.readouterr()
            assert f"error: {folder} {reason}" in printed.err and not printed.out
    assert main([*words, "--tokenizer", str(model.tokenizer)]) == 0
    padded = tmp_path / "padded"
    write_random_hf(SHAPE, 264, 5, padded, 1, 2)
    assert main(["evaluate", str(padded), *words[2:], "--tokenizer", str(model.tokenizer)]) == 2
    (padded / "tokenizer.model").write_bytes((model.tokenizer / "tokenizer.model").read_bytes())
    assert main(["evaluate", str(padded), *words[2:]]) == 0


def test_equals_validation_during_training(model: Tiny) -> None:
    metrics = model.train_many({"scored": {"train_steps": 2, "optimizer": {"warmup_steps": 0}}}, 1)["scored"]
    validations = [record["validation"]["a"]["bits_per_byte"] for record in metrics if "validation" in record]
    checkpoint = model.root / "scored" / "checkpoints" / "iter_0000002"
    dataset = IndexedDataset(model.root / "held")
    for folder, wanted in ((model.initial, validations[0]), (checkpoint, validations[-1])):
        got = score_dataset(LlamaForward(folder), dataset, SEQ_LENGTH, eos_id=2)
        assert got["bits_per_byte"] == pytest.approx(wanted, abs=1e-6)
    assert validations[0] != validations[-1]


def test_a_dataset_without_bos_is_refused(model: Tiny, tmp_path: Path) -> None:
    build_dataset(write_documents(7, 5), model.hf, tmp_path / "bare", "a", append_bos=False)
    with pytest.raises(DataError, match="built without bos"):
        score_dataset(LlamaForward(model.hf), IndexedDataset(tmp_path / "bare"), SEQ_LENGTH, eos_id=2)


def test_logit_parity_sees_a_changed_weight(model: Tiny, tmp_path: Path) -> None:
    if not (model.root / "scored").exists():
        model.train_many({"scored": {"train_steps": 2, "optimizer": {"warmup_steps": 0}}}, 1)
    checkpoint = model.root / "scored" / "checkpoints" / "iter_0000002"
    convert(checkpoint, tmp_path / "hf", "hf", tokenizer=model.tokenizer)
    parity = logit_parity(tmp_path / "hf", checkpoint / "proof.safetensors")
    assert parity["max_abs_diff"] <= 1e-4 and parity["last_position"] == SHAPE.max_position_embeddings - 1
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.3.self_attn.k_proj.weight"][5] += 0.05
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    changed = logit_parity(tmp_path / "hf", checkpoint / "proof.safetensors")
    assert changed["max_abs_diff"] > 1e-4 and not changed["within_bound"] and parity["within_bound"]
    with pytest.raises(CheckpointError, match="does not exist"):
        logit_parity(tmp_path / "hf", tmp_path / "proof.safetensors")


def test_logit_parity_in_bf16_is_bounded_by_the_arithmetic(model: Tiny, tmp_path: Path) -> None:
    settings = {"train_steps": 2, "optimizer": {"warmup_steps": 0}, "precision": "bf16"}
    model.train_many({"bf16": settings}, 1)
    checkpoint = model.root / "bf16" / "checkpoints" / "iter_0000002"
    proof = checkpoint / "proof.safetensors"
    convert(checkpoint, tmp_path / "hf", "hf", tokenizer=model.tokenizer)
    parity = logit_parity(tmp_path / "hf", proof, "bf16")
    print(f"bf16: difference {parity['max_abs_diff']:.1e}, bound {parity['bound']:.1e}")
    assert parity["within_bound"] and 1e-4 < parity["bound"] < 0.2 * parity["max_abs_logit"]
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    gate, up = (f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = 30 * weights[up], weights[gate]
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert not logit_parity(tmp_path / "hf", proof, "bf16")["within_bound"]


def write_successor_model(folder: Path, vocab_size: int, likely: dict[int, int]) -> None:
    """A one-layer Llama without attention or MLP that expects token `likely[t]` after token t."""
    shape = LlamaShape(
        num_layers=1, hidden_size=vocab_size, ffn_hidden_size=2, num_attention_heads=1, num_query_groups=1,
        head_dim=vocab_size + vocab_size % 2,
    )  # fmt: skip
    head = torch.zeros(vocab_size, vocab_size)
    for before, after in likely.items():
        head[after, before] = 1.0
    chosen = {"model.embed_tokens.weight": torch.eye(vocab_size), "lm_head.weight": head}
    entries = []
    for name, size in hf_shapes(shape, vocab_size).items():
        tensor = chosen.get(name, torch.ones(size) if name.endswith("norm.weight") else torch.zeros(size))
        entries.append((name, size, torch.float32, lambda tensor=tensor: tensor))
    write_hf(folder, entries, hf_config(shape, vocab_size, "float32", 1, 2))


def test_probe_counts_the_likeliest_answer(tmp_path: Path) -> None:
    train_tokenizer((text for text in ["abcdefgh " * 20]), 268, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    end, right, wrong = (tokenizer.encode("a" + letter)[-1] for letter in "abc")
    assert len({end, right, wrong}) == 3
    start = tokenizer.encode("a")[-1]
    write_successor_model(tmp_path / "model", tokenizer.vocab_size, {start: right})
    forward = LlamaForward(tmp_path / "model")
    questions = [("a", "b", ["c", "d"]), ("a", "c", ["b", "d"]), ("a", "b", ["c"])]
    found = probe_accuracy(forward, tokenizer, questions)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert found["questions"] == 3 and found["standard_error"] > 0


def test_probe_does_not_depend_on_its_neighbours(model: Tiny) -> None:
    forward, tokenizer = LlamaForward(model.hf), load_tokenizer(model.hf)
    texts = [document.text for document in write_documents(3, 90)]
    questions = [(texts[i], texts[i + 30], [texts[i + 60]]) for i in range(30)]
    alone = [probe_accuracy(forward, tokenizer, [question])["accuracy"] for question in questions[:6]]
    together = probe_accuracy(forward, tokenizer, questions[:6])["accuracy"]
    assert together == pytest.approx(sum(alone) / 6)


def test_documents_do_not_see_each_other(model: Tiny) -> None:
    documents = write_documents(9, 4)
    scores = [bits_per_byte(model.hf, [document], 4096)["nats_per_token"] for document in documents]
    together = bits_per_byte(model.hf, documents, 4096)
    weights = [len(ids) for ids in load_tokenizer(model.hf).encode_batch([d.text for d in documents])]
    mean = sum(s * w for s, w in zip(scores, weights, strict=True)) / sum(weights)
    assert together["nats_per_token"] == pytest.approx(mean, abs=1e-5)
    assert build_dataset([Document("x", "", "")], model.hf, model.root / "one", "")["documents"] == 1
