"""A model carried over: two matrices remade, everything else bit for bit, judged by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from megatron_cpt.checkpoint import open_hf, read_checkpoint_manifest
from megatron_cpt.errors import CheckpointError, TokenizerError
from megatron_cpt.surgery import MatrixPlan, RowMix, SurgeryPlan, apply_surgery, plan_surgery
from megatron_cpt.tokenizer import VocabMap, load_tokenizer

Make = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def plan(vocab_map: VocabMap) -> SurgeryPlan:
    return plan_surgery(vocab_map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("padding", [0, 54], ids=["exact", "padded"])
def test_every_tensor(
    plan: SurgeryPlan,
    make_model: Make,
    new_tokenizer: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    tied: bool,
    padding: int,
) -> None:
    source = make_model(plan.old_size + padding, tied, dtype, "20KB")
    assert (source / "model.safetensors.index.json").exists(), "the test is of a model in several files"
    progress: list[tuple[int, int]] = []
    facts = apply_surgery(plan, source, tmp_path / "made", new_tokenizer, lambda *state: progress.append(state))
    old, new = open_hf(source), open_hf(tmp_path / "made")
    assert new.names() == old.names() and (HEAD in new.names()) == (not tied)
    for name in new.names():
        before, after = old.read(name), new.read(name)
        assert after.dtype == dtype
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(before, after)
            continue
        assert after.shape == (plan.new_size, 32)
        assert torch.equal(after[: plan.old_size], before[: plan.old_size])
        for id in range(plan.old_size, plan.new_size):
            pieces = plan.row(id)["embedding" if name == EMBEDDING else "head"]["old_ids"]
            mean = before[pieces].double().mean(0)
            plain = before[pieces].float().mean(0).to(dtype).double()
            assert (after[id].double() - mean).abs().max() <= 2 * (plain - mean).abs().max() + 1e-7
    assert facts["padding_rows_left_out"] == padding and facts["tied"] == tied
    assert progress[-1][0] == progress[-1][1] == facts["bytes"]


def test_transformers_loads_it(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    """Logits of old ids on old text do not move at all; new text can be read."""
    source = make_model(plan.old_size + 22)
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert made.config.vocab_size == plan.new_size == len(tokenizer)
    assert (made.config.bos_token_id, made.config.eos_token_id) == (1, 2)
    ids = tokenizer("the river runs past a quiet town", return_tensors="pt").input_ids
    assert int(ids.max()) < plan.old_size
    with torch.no_grad():
        before, after = base(ids).logits, made(ids).logits
    assert torch.equal(before[..., : plan.old_size], after[..., : plan.old_size])
    japanese = tokenizer("静かな川が", return_tensors="pt").input_ids
    assert int(japanese.max()) >= plan.old_size
    assert made(japanese).logits.isfinite().all()


def test_folder(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    source = make_model(plan.old_size)
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    assert load_tokenizer(tmp_path / "made").sha256 == plan.new_sha256
    manifest = read_checkpoint_manifest(tmp_path / "made")
    assert manifest["vocab_size"] == manifest["padded_vocab_size"] == plan.new_size
    assert manifest["tokenizer_sha256"] == plan.new_sha256
    assert manifest["surgery"]["rows"]["new"] == plan.new_size - plan.old_size
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "made"))
    assert {key for key in before if before[key] != after.get(key)} == {"vocab_size"}
    apply_surgery(plan, source, tmp_path / "again", new_tokenizer)
    for path in (tmp_path / "made").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_ids_of_the_config_move_with_the_rows(
    vocab_map: VocabMap, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    """A plan that swaps two kept ids; the end of a text may have several ids."""
    entries = list(vocab_map.entries)
    entries[300], entries[301] = entries[301], entries[300]
    plan = plan_surgery(replace(vocab_map, entries=tuple(entries)))
    source = make_model(plan.old_size)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 301], "pad_token_id": 300}))
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (made["bos_token_id"], made["eos_token_id"], made["pad_token_id"]) == (1, [2, 300], 301)


def test_new_pieces_that_copy_an_old_one_do_not_take_its_place(
    vocab_map: VocabMap, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    """Without byte fallback the old tokenizer reads every new piece as the unknown one."""
    unknown = [entry._replace(old_pieces=(0,)) if entry.origin == "new" else entry for entry in vocab_map.entries]
    plan = plan_surgery(replace(vocab_map, entries=tuple(unknown)))
    source = make_model(plan.old_size)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": [0, 2], "pad_token_id": 0}))
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (made["bos_token_id"], made["eos_token_id"], made["pad_token_id"]) == (1, [0, 2], 0)
    embedding = open_hf(tmp_path / "made").read(EMBEDDING)
    assert torch.equal(embedding[-1], embedding[0])


def test_what_does_not_belong_together(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    source = make_model(plan.old_size)
    other = shutil.copytree(source, tmp_path / "other_tokenizer")
    shutil.copy(new_tokenizer / "tokenizer.model", other)
    recorded = shutil.copytree(source, tmp_path / "recorded")
    (recorded / "manifest.json").write_text(json.dumps({"kind": "checkpoint", "tokenizer_sha256": "0" * 64}))
    tied = make_model(plan.old_size, True)
    first = RowMix.from_rows([([0], [1.0])] * plan.new_size, plan.old_size)
    different = replace(plan, head=MatrixPlan(first, plan.head.new_rows, {"method": "first"}))
    cases = [
        (plan, make_model(plan.old_size - 1), new_tokenizer, CheckpointError, "329 rows"),
        (plan, make_model(plan.old_size + 1024), new_tokenizer, CheckpointError, "1354 rows"),
        (plan, other, new_tokenizer, CheckpointError, "not the one the plan starts from"),
        (plan, recorded, new_tokenizer, CheckpointError, "not the one the plan starts from"),
        (plan, source, old_tokenizer, TokenizerError, "not the tokenizer the plan was made for"),
        (different, tied, new_tokenizer, CheckpointError, "one method, and the same options, for both"),
        (plan, tmp_path / "nothing", new_tokenizer, CheckpointError, "config.json"),
    ]
    for used, folder, tokenizer, error, message in cases:
        with pytest.raises(error, match=message):
            apply_surgery(used, folder, tmp_path / "made", tokenizer)
        assert not (tmp_path / "made").exists()
    apply_surgery(different, source, tmp_path / "made", new_tokenizer)
    assert torch.equal(open_hf(tmp_path / "made").read(HEAD), open_hf(source).read(HEAD)[:1].expand(plan.new_size, -1))
    with pytest.raises(CheckpointError, match="already holds files"):
        apply_surgery(plan, source, tmp_path / "made", new_tokenizer)


def test_a_large_padding_is_believed_when_the_tokenizer_is_the_model_s(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    source = make_model(plan.old_size + 2000)
    shutil.copy(old_tokenizer / "tokenizer.model", source)
    assert apply_surgery(plan, source, tmp_path / "made", new_tokenizer)["padding_rows_left_out"] == 2000
