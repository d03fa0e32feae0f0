"""megatron-core loads what we write, and we read what megatron-core saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint import LlamaForward, convert, open_hf, show, verify, write_checkpoint_manifest
from megatron_cpt.checkpoint.execute import Journal, execute
from megatron_cpt.checkpoint.torch_dist import lay_out_torch_dist

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "grouped": {},
    "tied_and_scaled": {"tied_embeddings": True, "head_dim": 4, "rope_scaling": {"factor": 8.0}, "rope_theta": 1000.0},
}
LAYOUTS = {"grouped": ["stacked", "single_layers", "gate_apart"], "tied_and_scaled": ["stacked"]}
VOCAB_SIZE, PADDED = 133, 192
LENGTH = 400


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, make_model) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    cases = {}
    for name, changes in CASES.items():
        here = folder / name
        reader = open_hf(make_model(here / "hf", VOCAB_SIZE, **changes))
        dtypes = {name: reader.dtype(name) for name in reader.names()}
        # tables in several chunks, cut across the padding
        layout = lay_out_torch_dist(reader, dtypes, PADDED, block_bytes=5_000)
        (here / "torch_dist").mkdir()
        execute(reader, layout, here / "torch_dist", Journal(here / "torch_dist", "key"), 2)
        layout.finish(here / "torch_dist")
        write_checkpoint_manifest(here / "torch_dist", reader.llama, VOCAB_SIZE, PADDED, None, {})
        torch.save(
            torch.randint(0, VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(1)), here / "tokens.pt"
        )
        cases[name] = {
            "shape": reader.llama.model_dump(),
            "vocab_size": VOCAB_SIZE,
            "padded_vocab_size": PADDED,
            "layouts": LAYOUTS[name],
        }
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("megatron_job.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True, timeout=120)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_megatron_core_loads_what_we_write(job: Path, name: str) -> None:
    tokens, logits = torch.load(job / name / "tokens.pt"), torch.load(job / name / "loaded_logits.pt")
    ours = LlamaForward(job / name / "hf").logits(tokens)
    assert ours.std() > 0.3
    assert (logits[..., :VOCAB_SIZE] - ours).abs().max() <= 1e-4
    if "tied" not in name:
        assert (logits[..., VOCAB_SIZE:] == 0).all()  # padding rows are zero


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in CASES for layout in LAYOUTS[name]])
def test_we_read_what_megatron_core_saves(job: Path, name: str, layout: str, tmp_path: Path) -> None:
    tokens, logits = torch.load(job / name / "tokens.pt"), torch.load(job / name / "saved_logits.pt")
    assert not torch.allclose(logits, torch.load(job / name / "loaded_logits.pt"), atol=1e-2)  # the weights did change
    saved = job / name / layout
    assert (LlamaForward(saved).logits(tokens) - logits[..., :VOCAB_SIZE]).abs().max() <= 1e-4
    assert show(saved)["step"] == 7
    convert(saved, tmp_path / "hf", "hf")
    verify(saved, tmp_path / "hf")
    assert (LlamaForward(tmp_path / "hf").logits(tokens) - logits[..., :VOCAB_SIZE]).abs().max() <= 1e-4
