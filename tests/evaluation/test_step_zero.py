"""The certificate of a surgery, its numbers against transformers, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_cpt.checkpoint import convert, verify
from megatron_cpt.cli.main import main
from megatron_cpt.config.surgery import parse_method
from megatron_cpt.data import Document
from megatron_cpt.errors import CheckpointError, DataError, TokenizerError, VerificationError
from megatron_cpt.evaluation import CERTIFICATE, bits_per_byte, certify, check_certificate
from megatron_cpt.surgery import SurgeryPlan, apply_surgery, plan_surgery
from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer, replace_tokenizer
from tests.surgery.conftest import *  # noqa: F403 - its fixtures
from tests.surgery.conftest import ENGLISH, JAPANESE, Make

TEXTS = {
    "en": [Document("the river runs past a quiet town\nand nobody asks where it goes", "en", "test")],
    "ja": [Document("\u9759\u304b\u306a\u5ddd\u304c\u753a\u3092\u6d41\u308c\u3066\u3044\u308b", "ja", "test")],
}


@pytest.fixture
def plan(vocab_map: VocabMap) -> SurgeryPlan:
    return plan_surgery(vocab_map)


def operated(plan: SurgeryPlan, base: Path, new_tokenizer: Path, folder: Path) -> Path:
    apply_surgery(plan, base, folder, new_tokenizer)
    return folder


def test_the_numbers(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    base = make_model(plan.old_size)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    found = certify(base, made, plan, old_tokenizer, TEXTS, "en", 64)
    assert found["passed"] and found == json.loads((made / CERTIFICATE).read_text()) == check_certificate(made)
    assert found["kept_rows"] == {"compared": 2 * plan.old_size, "different": 0}
    assert found["new_rows"] == {"compared": 2 * (plan.new_size - plan.old_size), "different": 0, "rounded": 0}
    assert found["logits"]["max_abs_diff"] == 0 and found["logits"]["tokens"] > 10
    for language, documents in TEXTS.items():
        after = bits_per_byte(made, documents, 64)["bits_per_byte"]
        assert found["bits_per_byte"][language]["after"] == pytest.approx(after)
    before = bits_per_byte(base, TEXTS["ja"], 64, old_tokenizer)["bits_per_byte"]
    assert found["bits_per_byte"]["ja"]["before"] == pytest.approx(before)

    network, tokenizer = LlamaForCausalLM.from_pretrained(made), AutoTokenizer.from_pretrained(made)
    ids = torch.tensor([[1, *tokenizer(TEXTS["ja"][0].text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        share = network(ids).logits[0].softmax(-1)[:, plan.old_size :].sum(-1).mean()
    assert found["probability_of_new_rows"]["ja"] == pytest.approx(float(share), rel=1e-4)
    head = network.lm_head.weight.detach()[plan.old_size :].norm(dim=1)
    assert found["matrices"]["head"]["norms"]["new"]["50%"] == pytest.approx(float(head.median()), rel=1e-5)


def test_nothing_is_kept(
    vocab_map: VocabMap, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """A control that makes every row anew has no row to compare, and is measured all the same."""
    anew = parse_method({"method": "normal", "copy_kept": False})
    plan = plan_surgery(vocab_map, anew, anew)
    base = make_model(plan.old_size)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    found = certify(base, made, plan, old_tokenizer, TEXTS, "en", 64)
    assert found["passed"] and found["kept_rows"] == {"compared": 0, "different": 0}
    assert found["logits"] == {"max_abs_diff": None, "tokens": 0}
    assert found["new_rows"] == {"compared": 2 * plan.new_size, "different": 0, "rounded": 0}
    after = bits_per_byte(made, TEXTS["en"], 64)["bits_per_byte"]
    assert found["bits_per_byte"]["en"]["after"] == pytest.approx(after)


def test_faults_are_counted(
    vocab_map: VocabMap, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    zero = plan_surgery(vocab_map, parse_method("zero"))
    base = make_model(zero.old_size)
    made = operated(zero, base, new_tokenizer, tmp_path / "made")
    found = certify(base, made, zero, old_tokenizer, TEXTS, "en", 64)
    new = zero.new_size - zero.old_size
    assert found["passed"]
    assert (found["matrices"]["embedding"]["new_zero"], found["matrices"]["embedding"]["new_duplicates"]) == (
        new,
        new - 1,
    )
    assert found["matrices"]["head"]["new_zero"] == 0

    weights = load_file(made / "model.safetensors")
    weights["lm_head.weight"][7, 3] += 1
    weights["lm_head.weight"][-1, 0] = float("nan")
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    found = certify(base, made, zero, old_tokenizer, TEXTS, "en", 64)
    assert not found["passed"] and found["kept_rows"]["different"] == 1 and found["logits"]["max_abs_diff"] > 0
    assert found["matrices"]["head"]["new_not_finite"] == 1
    with pytest.raises(VerificationError, match="1 kept rows differ"):
        check_certificate(made)


def test_a_matrix_of_its_own_rows_beside_one_that_keeps_them(
    vocab_map: VocabMap, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    anew = parse_method({"method": "normal", "copy_kept": False})
    for number, methods in enumerate(((anew, parse_method("mean")), (parse_method("mean"), anew))):
        plan = plan_surgery(vocab_map, *methods)
        base = make_model(plan.old_size)
        made = operated(plan, base, new_tokenizer, tmp_path / str(number))
        found = certify(base, made, plan, old_tokenizer, TEXTS, "en", 64)
        assert found["passed"] and found["kept_rows"]["compared"] == plan.old_size
        assert plan.kept() == {} and len(plan.removed()) == plan.old_size
        share = found["probability_of_new_rows"]["en"]  # new rows of the head: all of them, or but the added ones
        assert share == pytest.approx(1.0, abs=1e-5) if number else 0.0 < share < 0.5


def test_padded_tables(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    base = make_model(plan.old_size)
    apply_surgery(plan, base, tmp_path / "made", new_tokenizer, divisor=128)
    found = certify(base, tmp_path / "made", plan, old_tokenizer, TEXTS, "en", 64)
    assert found["passed"] and found["kept_rows"]["compared"] == 2 * plan.old_size
    assert found["padding_rows"] == {"compared": 2 * (512 - plan.new_size), "different": 0}
    (tmp_path / "plain").mkdir()
    plain = certify(
        base, operated(plan, base, new_tokenizer, tmp_path / "plain" / "made"), plan, old_tokenizer, TEXTS, "en", 64
    )
    assert found["matrices"] == plain["matrices"] and plain["padding_rows"] == {"compared": 0, "different": 0}
    weights = load_file(tmp_path / "made" / "model.safetensors")
    weights["lm_head.weight"][plan.new_size + 3, 5] = 0.1
    save_file(weights, tmp_path / "made" / "model.safetensors", {"format": "pt"})
    assert certify(base, tmp_path / "made", plan, old_tokenizer, TEXTS, "en", 64)["padding_rows"]["different"] == 1
    with pytest.raises(VerificationError, match="1 rows of padding are not zero"):
        check_certificate(tmp_path / "made")


def test_a_replaced_vocabulary(make_model: Make, old_tokenizer: Path, tmp_path: Path) -> None:
    """Its own cut of the source is another; the pieces that it keeps are compared all the same."""
    draw = random.Random(5)
    glued = ["".join(draw.choices(ENGLISH, k=6)) + " " + "".join(draw.choices(JAPANESE, k=6)) for _ in range(200)]
    replace_tokenizer(old_tokenizer, glued, 400, 8, tmp_path / "new")
    plan = plan_surgery(VocabMap.load(tmp_path / "new"))
    old, new, kept = load_tokenizer(old_tokenizer), load_tokenizer(tmp_path / "new"), plan.kept()
    line = "the river runs past a quiet town"
    assert [kept.get(id) for id in new.encode(line)] != old.encode(line)
    texts = {"en": [Document(line, "en", "test")]}
    base = make_model(plan.old_size)
    made = operated(plan, base, tmp_path / "new", tmp_path / "made")
    found = certify(base, made, plan, old_tokenizer, texts, "en", 64)
    assert found["passed"] and found["logits"]["max_abs_diff"] == 0 and found["logits"]["tokens"] > 3
    weights = load_file(made / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] += 0.1  # no row of a table shows it, the logits do
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    found = certify(base, made, plan, old_tokenizer, texts, "en", 64)
    assert not found["passed"] and found["kept_rows"]["different"] == 0 and found["logits"]["max_abs_diff"] > 0


def test_no_piece_of_the_source_is_kept(
    vocab_map: VocabMap, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """Without one there is no proof, which is no pass."""
    entries = [Entry("new", None, (entry[1],)) if entry[0] == "kept" else entry for entry in vocab_map.entries]
    plan = plan_surgery(replace(vocab_map, entries=tuple(entries)))
    base = make_model(plan.old_size)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    with pytest.raises(DataError, match=r"of \d+ tokens of the source text the surgery keeps none"):
        certify(base, made, plan, old_tokenizer, TEXTS, "en", 64)
    assert not (made / CERTIFICATE).exists()


def test_rows_of_another_plan(
    vocab_map: VocabMap, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """The record names the plan; where there is none (a conversion carries none), the rows tell."""
    plan, other = plan_surgery(vocab_map), plan_surgery(vocab_map, parse_method("zero"), parse_method("zero"))
    base = make_model(plan.old_size)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    with pytest.raises(CheckpointError, match="made by another plan"):
        certify(base, made, other, old_tokenizer, TEXTS, "en", 64)
    assert not (made / CERTIFICATE).exists()
    convert(made, tmp_path / "dist", "torch_dist")
    convert(tmp_path / "dist", tmp_path / "hf", "hf", tokenizer=new_tokenizer)
    new = 2 * (plan.new_size - plan.old_size)
    found = certify(base, tmp_path / "hf", other, old_tokenizer, TEXTS, "en", 64)
    assert not found["passed"] and found["new_rows"] == {"compared": new, "different": new, "rounded": 0}
    with pytest.raises(VerificationError, match=f"{new} other rows from the plan's"):
        check_certificate(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["lm_head.weight"][-1] *= 1 + 1e-6
    weights["lm_head.weight"][-2, 0] += 0.1
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    found = certify(base, tmp_path / "hf", plan, old_tokenizer, TEXTS, "en", 64)
    assert not found["passed"] and found["new_rows"] == {"compared": new, "different": 1, "rounded": 1}


def test_tied_and_torch_dist(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    base = make_model(plan.old_size, True)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    convert(made, tmp_path / "dist", "torch_dist")
    shutil.copy(new_tokenizer / "tokenizer.model", tmp_path / "dist")
    found = [certify(base, folder, plan, old_tokenizer, TEXTS, "en", 64) for folder in (made, tmp_path / "dist")]
    assert found[0]["passed"] and list(found[0]["matrices"]) == ["embedding"]
    assert found[0]["bits_per_byte"] == found[1]["bits_per_byte"]


def test_certificates_of_other_models(
    vocab_map: VocabMap, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    plan = plan_surgery(vocab_map)
    base = make_model(plan.old_size)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    with pytest.raises(VerificationError, match="surgery certify"):
        check_certificate(made)
    certify(base, made, plan, old_tokenizer, TEXTS, "en", 64)
    first = plan_surgery(vocab_map, parse_method("first"))
    other = operated(first, base, new_tokenizer, tmp_path / "other")
    shutil.copy(made / CERTIFICATE, other)
    with pytest.raises(VerificationError, match="belongs to other weights"):
        check_certificate(other)
    with pytest.raises(CheckpointError, match="not made by this plan"):
        certify(base, made, replace(plan, new_sha256="0" * 64), old_tokenizer, TEXTS, "en", 64)


def test_the_command(
    plan: SurgeryPlan,
    make_model: Make,
    old_tokenizer: Path,
    new_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_model(plan.old_size)
    shutil.copy(old_tokenizer / "tokenizer.model", base)
    made = operated(plan, base, new_tokenizer, tmp_path / "made")
    plan.save(tmp_path / "plan")
    for language, documents in TEXTS.items():
        (tmp_path / f"{language}.txt").write_text(documents[0].text, encoding="utf-8")
    words = ["surgery", "certify", str(tmp_path / "plan"), str(base), str(made)]
    texts = ["--text", f"en={tmp_path / 'en.txt'}", f"ja={tmp_path / 'ja.txt'}"]
    assert main([*words, *texts, "--source", "en"]) == 0
    shown = capsys.readouterr().out
    assert "0 of" in shown and "probability of new rows" in shown
    assert main([*words, *texts, "--source", "de"]) == 2
    assert "--text de=FILE" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert main([*words, *texts, f"ko={tmp_path / 'empty.txt'}", "--source", "en"]) == 2
    assert f"--text ko={tmp_path / 'empty.txt'} holds no text" in " ".join(capsys.readouterr().err.split())


def test_what_apply_wrote_in_the_legacy_layout(
    plan: SurgeryPlan, make_model: Make, old_tokenizer: Path, new_tokenizer: Path, tmp_path: Path
) -> None:
    """Two ranks, as Megatron leaves them: no manifest, and its arguments state the size of the vocabulary."""
    convert(make_model(plan.old_size), tmp_path / "base", "mp_rank", tp=2, tokenizer=old_tokenizer)
    (tmp_path / "base" / "manifest.json").unlink()
    made = operated(plan, tmp_path / "base", new_tokenizer, tmp_path / "made")
    certificate = certify(tmp_path / "base", made, plan, old_tokenizer, TEXTS, "en", 64, new_tokenizer)
    assert certificate["padding_rows"]["different"] == 0
    verify(made, convert(made, tmp_path / "hf", "hf")["destination"])


def test_what_apply_wrote_in_torch_dist(
    plan: SurgeryPlan,
    make_model: Make,
    old_tokenizer: Path,
    new_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A base without its tokenizer: the plan holds a copy of the new one alone."""
    convert(make_model(plan.old_size), tmp_path / "base", "torch_dist", tokenizer=old_tokenizer)
    plan.save(tmp_path / "plan", new_tokenizer)
    made = operated(plan, tmp_path / "base", new_tokenizer, tmp_path / "made")
    for path in (tmp_path / "base").glob("*token*"):
        path.unlink()
    (tmp_path / "en.txt").write_text(TEXTS["en"][0].text, encoding="utf-8")
    words = ["surgery", "certify", str(tmp_path / "plan"), str(tmp_path / "base"), str(made)]
    words += ["--text", f"en={tmp_path / 'en.txt'}", "--source", "en"]
    assert main(words) == 2
    assert "--old-tokenizer" in capsys.readouterr().err
    assert main([*words, "--old-tokenizer", str(old_tokenizer / "tokenizer.model")]) == 0
    found = check_certificate(made)
    assert found["padding_rows"] == {"compared": 2 * (512 - plan.new_size), "different": 0}
    with pytest.raises(TokenizerError, match="not the old tokenizer of the plan"):
        certify(tmp_path / "base", made, plan, new_tokenizer, TEXTS, "en", 64, new_tokenizer)
