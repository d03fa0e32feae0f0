"""What becomes of a folder's files: which are written, which are links, what is never touched or left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import convert, open_hf, tables, verify
from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.errors import CheckpointError, TokenizerError, VerificationError
from megatron_cpt.surgery import SurgeryPlan, apply_surgery, plan_surgery, undo_surgery
from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer
from tests.data.killed import in_child

Make = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINKED_FROM = 200  # bytes: models of tests are small


@pytest.fixture
def plan(vocab_map: VocabMap) -> SurgeryPlan:
    return plan_surgery(vocab_map)


@pytest.fixture
def replacement(vocab_map: VocabMap) -> SurgeryPlan:
    """A plan that drops 40 old pieces, moves the others, and repeats one."""
    entries = list(vocab_map.entries)
    for id in range(290, 330):
        entries[id] = Entry("new", None, (id % 7 + 3, id % 5 + 260))
    entries[300], entries[280] = entries[280], entries[300]
    return plan_surgery(VocabMap(*_facts(vocab_map), tuple(entries)))


def _facts(vocab_map: VocabMap) -> tuple[int, int, str, str]:
    return vocab_map.old_size, vocab_map.new_size, vocab_map.old_sha256, vocab_map.new_sha256


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_only_files_with_a_table_are_written(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SMALL_FILE_BYTES", LINKED_FROM)
    source = make_model(plan.old_size, max_shard_size="20KB")
    (source / "LICENSE").write_text("free" * 100)
    (source / "README.md").write_text("short")
    (source / "pytorch_model.bin").write_bytes(b"old rows")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5]}')
    before = hashes(source)
    facts = apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    assert hashes(source) == before
    made = tmp_path / "made"
    index, old_index = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (made, source))
    assert index["weight_map"] == old_index["weight_map"]
    assert index["metadata"]["total_size"] == facts["bytes"]
    written = {index["weight_map"][name] for name in (EMBEDDING, HEAD)}
    files = set(index["weight_map"].values())
    assert len(files) > len(written) and (facts["files"], facts["files_carried"]) == (2, len(files) - 2)
    for name in files:
        assert (made / name).samefile(source / name) == (name not in written)
        with safe_open(source / name, "pt") as old, safe_open(made / name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
    assert (made / "LICENSE").samefile(source / "LICENSE")
    assert not (made / "README.md").samefile(source / "README.md")  # somebody may edit it
    assert not (made / "pytorch_model.bin").exists()
    assert json.loads((made / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "eos_token_id": [2, 5],
        "bos_token_id": 1,
    }
    # The digest is the one that a reader of everything finds.
    convert(made, tmp_path / "torch_dist", "torch_dist")
    assert verify(made, tmp_path / "torch_dist")["weights_sha256"] == facts["weights_sha256"]
    monkeypatch.setattr(tables.os, "link", _no_links)
    assert apply_surgery(plan, source, tmp_path / "copied", new_tokenizer)["weights_sha256"] == facts["weights_sha256"]
    assert not any((tmp_path / "copied" / name).samefile(source / name) for name in files)
    assert hashes(tmp_path / "copied") == hashes(made)


def _no_links(source: Path, target: Path) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_constants_and_a_second_copy_of_a_tied_table(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    """Old exports carry `inv_freq`, some tied ones a head; transformers must find the new rows in both."""
    source = make_model(plan.old_size, tied=True)
    held = load_file(source / "model.safetensors")
    held |= {HEAD: held[EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(4.0)}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    facts = apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    new = load_file(tmp_path / "made" / "model.safetensors")
    assert new.keys() == held.keys() and new[HEAD].shape[0] == plan.new_size
    assert torch.equal(new[HEAD], new[EMBEDDING]) and torch.equal(new[EMBEDDING][:330], held[EMBEDDING])
    convert(tmp_path / "made", tmp_path / "torch_dist", "torch_dist")
    assert verify(tmp_path / "made", tmp_path / "torch_dist")["weights_sha256"] == facts["weights_sha256"]


def test_padding_on_request(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    source = make_model(plan.old_size)
    facts = apply_surgery(plan, source, tmp_path / "made", new_tokenizer, divisor=256)
    assert facts["padded_vocab_size"] == 512 > plan.new_size
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.config.vocab_size == 512 and (made.lm_head.weight[plan.new_size :] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_undo(
    replacement: SurgeryPlan,
    make_model: Make,
    old_tokenizer: Path,
    new_tokenizer: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    tied: bool,
) -> None:
    """Bit for bit, padding rows and odd numbers included; the record holds what no new row repeats."""
    source = make_model(replacement.old_size + 6, tied, dtype, "20KB")
    held = load_file(next(path for path in source.glob("*.safetensors") if EMBEDDING in load_file(path)))
    assert len(held) == 1, "the table has a file of its own"
    held[EMBEDDING][295, :2] = torch.tensor([-0.0, 1e-40]).to(dtype)
    held[EMBEDDING][334] = 0
    path = next(path for path in source.glob("*.safetensors") if EMBEDDING in load_file(path))
    save_file(held, path, {"format": "pt"})
    facts = apply_surgery(replacement, source, tmp_path / "made", new_tokenizer)
    removed = load_file(tmp_path / "made" / "surgery" / "removed_rows.safetensors")
    assert removed[f"{EMBEDDING}.ids"].tolist() == [*range(290, 334), 335]  # 334 is padding of zeros
    undo_surgery(replacement, tmp_path / "made", tmp_path / "back", old_tokenizer)
    old, back = open_hf(source), open_hf(tmp_path / "back")
    for name in old.names():
        assert torch.equal(_bits(old.read(name)), _bits(back.read(name))), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")]
    assert configs[0] == configs[1] and facts["removed"] == len(replacement.removed())
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (old_tokenizer / "tokenizer.model").read_bytes()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def test_a_tokenizer_is_named_by_its_file_too(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """A file of another name goes along alone, under the name that loaders look for."""
    (tmp_path / "files").mkdir()
    for folder, name in (
        (old_tokenizer, "old.model"),
        (new_tokenizer, "new.model"),
        (old_tokenizer, "tokenizer.model"),
    ):
        shutil.copy(folder / "tokenizer.model", tmp_path / "files" / name)
    apply_surgery(plan, make_model(plan.old_size), tmp_path / "made", tmp_path / "files" / "new.model")
    assert load_tokenizer(tmp_path / "made").sha256 == plan.new_sha256
    for number, file in enumerate((tmp_path / "files" / "old.model", old_tokenizer / "tokenizer.model")):
        undo_surgery(plan, tmp_path / "made", tmp_path / str(number), file)
        assert load_tokenizer(tmp_path / str(number)).sha256 == plan.old_sha256
        assert (tmp_path / str(number) / "tokenizer_config.json").exists() == bool(number)


def test_folders_inside_one_another(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    source = make_model(plan.old_size)
    (tmp_path / "link").symlink_to(source)
    for destination in (source / "made", tmp_path / "link" / "made"):
        with pytest.raises(CheckpointError, match="one inside the other"):
            apply_surgery(plan, source, destination, new_tokenizer)
    with pytest.raises(CheckpointError, match="already holds files"):
        apply_surgery(plan, source, tmp_path, new_tokenizer)
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    with pytest.raises(CheckpointError, match="one inside the other"):
        undo_surgery(plan, tmp_path / "made", tmp_path / "made" / "back")
    assert not (source / "made").exists() and not (tmp_path / "made" / "back").exists()


def test_undo_refuses_what_it_cannot_prove(
    replacement: SurgeryPlan, plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    source, made, back = make_model(replacement.old_size), tmp_path / "made", tmp_path / "back"
    apply_surgery(replacement, source, made, new_tokenizer)
    trained = shutil.copytree(made, tmp_path / "trained")
    held = load_file(trained / "model.safetensors")
    held[HEAD][7, 3] += 1
    save_file(held, trained / "model.safetensors", {"format": "pt"})
    bare = shutil.copytree(made, tmp_path / "bare")
    (bare / "surgery" / "removed_rows.safetensors").unlink()
    cases = [
        (plan, made, None, CheckpointError, "made by another plan"),
        (replacement, trained, None, VerificationError, "its rows were changed"),
        (replacement, bare, None, CheckpointError, "missing or was changed"),
        (replacement, source, None, CheckpointError, "manifest.json is missing"),
        (replacement, made, new_tokenizer, TokenizerError, "not the tokenizer that the plan starts from"),
    ]
    for used, folder, tokenizer, error, message in cases:
        with pytest.raises(error, match=message):
            undo_surgery(used, folder, back, tokenizer)
        assert not back.exists()


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_that_are_no_numbers(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path, name: str
) -> None:
    source = make_model(plan.old_size + 3)
    held = load_file(source / "model.safetensors")
    held[name][17, 5], held[name][29, 0] = float("nan"), float("inf")
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"2 of {plan.old_size} rows of {name} hold NaN.* id 17"):
        apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    held[name][[17, 29]] = 0.0
    held[name][plan.old_size] = float("nan")  # padding: of no use, and of no harm
    save_file(held, source / "model.safetensors", {"format": "pt"})
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    assert open_hf(tmp_path / "made").read(name).isfinite().all()


def test_an_extended_model_is_not_extended_again(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    apply_surgery(plan, make_model(plan.old_size), tmp_path / "made", new_tokenizer)
    with pytest.raises(CheckpointError, match="this checkpoint is extended"):
        apply_surgery(plan, tmp_path / "made", tmp_path / "again", new_tokenizer)


def test_killed_half_way(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    """Nothing that can be loaded is left, and the same command then goes through."""
    source = make_model(plan.old_size, max_shard_size="20KB")
    before = hashes(source)
    for calls in (1, 8):
        left = [calls]

        def count(done: int, total: int, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        killed = partial(apply_surgery, plan, source, tmp_path / "made", new_tokenizer, count)
        assert in_child(killed) == -signal.SIGKILL
        assert not (tmp_path / "made").exists()
        (staged,) = tmp_path.glob(".made*")
        assert not (staged / "config.json").exists() and not (staged / "manifest.json").exists()
    apply_surgery(plan, source, tmp_path / "made", new_tokenizer)
    assert hashes(source) == before and not list(tmp_path.glob(".made*"))
