"""megatron-core itself loads what we write, each rank its slices and the layout transformers' logits; we read its own.

Three proofs share one job. Each rank of a layout is pretended in one process, where megatron-core loads that rank's
part; it has to be the slices of the Hugging Face tensors, bit for bit. Small layouts run for real, in processes that
talk to each other. And what megatron-core saves in each of its forms is read. All models, formats and layouts are run
for real by benchmarks/bench_convert_layouts.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import (
    LlamaForward,
    convert,
    open_hf,
    read_shape,
    show,
    verify,
    write_checkpoint_manifest,
)
from megatron_cpt.checkpoint.convert import Format
from megatron_cpt.checkpoint.execute import Journal, execute
from megatron_cpt.checkpoint.manifest import SEALS
from megatron_cpt.checkpoint.torch_dist import lay_out_torch_dist
from megatron_cpt.config.manifest import read_json
from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.errors import CheckpointError
from tests.checkpoint.llama_kinds import KINDS, VOCAB_SIZE, random_tokens, relative_error, transformers_logits
from tests.checkpoint.megatron_slices import Layout, rank_slices

ROOT = Path(__file__).resolve().parents[2]
STORED = [kind for kind in ("torch_dist", "mp_rank") if kind in get_args(Format)]
LAYOUTS = [Layout(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2, 4)]
LAYOUTS += [Layout(tensor, pipeline, 2) for tensor in (1, 2, 4) for pipeline in (2, 4)]
FEW = [Layout(), Layout(2, 2), Layout(4, 4), Layout(1, 2, 2)]
GROUPED, TIED = "llama-3.1", "llama-3.2"
# What cuts differently: one model at every layout, and others where all ways of cutting meet.
SLICED = [("torch_dist", name, layout) for name in KINDS for layout in [*FEW, Layout(1, 4, 2)]]
SLICED += [("torch_dist", GROUPED, layout) for layout in LAYOUTS if layout not in [*FEW, Layout(1, 4, 2)]]
SLICED += [("mp_rank", name, layout) for name in (GROUPED, TIED) for layout in FEW]
REAL = [("torch_dist", name, Layout()) for name in KINDS] + [("mp_rank", name, Layout()) for name in (GROUPED, TIED)]
REAL += [(kind, GROUPED, layout) for kind in STORED for layout in (Layout(2, 2), Layout(1, 2, 2))]
LENGTH = 400
SCALED = [name for name, changes in KINDS.items() if "rope_scaling" in changes]
SHALLOW = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
LONG = 8192 + 200  # beyond the length from which the scaled models were extended
TOLERANCE = 1e-5
VOCABULARIES = (250, 43_176, 43_177, 65_537)
TENSOR_SIZES = (1, 2, 4, 8)
NARROW = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "head_dim": 2, "num_query_groups": 8}
POISON = 7.0
# Models that megatron-core changes and saves on one rank, and the forms in which it does.
WHOLE = {
    "grouped": {},
    "tied_and_scaled": {"tied_embeddings": True, "head_dim": 4, "rope_scaling": {"factor": 8.0}, "rope_theta": 1000.0},
}
SAVED_FORMS = {"grouped": ["stacked", "single_layers", "gate_apart"], "tied_and_scaled": ["stacked"]}
PADDED = 192


def stored(hf: Path, folder: Path, kind: str, layout: Layout) -> tuple[Path, int]:
    """Convert unless it was; the folder and its padded vocabulary size. A torch_dist folder serves every layout."""
    arguments: dict[str, Any] = {}
    folder = folder / kind
    if kind == "mp_rank":
        folder /= layout.name
        arguments = {"tp": layout.tensor, "pp": layout.pipeline, "vpp": layout.virtual or 1, "spec": "local"}
    if not folder.exists():
        convert(hf, folder, kind, **arguments)
    return folder, read_json(folder / "manifest.json", CheckpointError)["padded_vocab_size"]


class Job:
    """The cases of the one job, and what it found."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cases = folder, []

    def add(
        self, hf: Path, kind: str, layout: Layout, name: str, tokens: Path | None = None, padded: int | None = None
    ) -> None:
        folder, padded_size = stored(hf, hf.parent, kind, layout)
        self.cases.append(
            {
                "folder": str(folder),
                "kind": kind,
                "shape": read_shape(hf)[0].model_dump(),
                "padded_vocab_size": padded or padded_size,
                "layout": [layout.tensor, layout.pipeline, layout.virtual],
                "tokens": str(tokens) if tokens else None,
                "output": str(self.folder / f"{kind}-{layout.name}-{name}.pt"),
            }
        )

    def run(self, timeout_seconds: float | None = 300) -> None:
        (self.folder / "cases.json").write_text(json.dumps(self.cases))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.checkpoint.layouts_job", str(self.folder)]
        subprocess.run(command, env=environment, check=True, timeout=timeout_seconds)

    def output(self, kind: str, layout: Layout, name: str) -> Any:
        return torch.load(self.folder / f"{kind}-{layout.name}-{name}.pt")


def write_whole(folder: Path, make_model: Any) -> None:
    cases = {}
    for name, changes in WHOLE.items():
        here = folder / name
        reader = open_hf(make_model(here / "hf", VOCAB_SIZE, **changes))
        dtypes = {name: reader.dtype(name) for name in reader.names()}
        # tables in several chunks, cut across the padding
        layout = lay_out_torch_dist(reader, dtypes, PADDED, chunk_bytes=5_000)
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
            "layouts": SAVED_FORMS[name],
        }
    (folder / "cases.json").write_text(json.dumps(cases))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, make_model) -> Job:
    folder = tmp_path_factory.mktemp("layouts")
    job = Job(folder)
    short, long = folder / "short.pt", folder / "long.pt"
    torch.save(random_tokens(2, LENGTH), short)
    torch.save(random_tokens(1, LONG), long)
    for name, changes in KINDS.items():
        make_model(folder / name / "hf", VOCAB_SIZE, **changes)
    for kind, name, layout in SLICED:
        job.add(folder / name / "hf", kind, layout, name)
    for kind, name, layout in REAL:
        job.add(folder / name / "hf", kind, layout, f"{name}-short", short)
    for name in SCALED:
        hf = make_model(folder / f"{name}-shallow" / "hf", VOCAB_SIZE, **{**KINDS[name], **SHALLOW})
        job.add(hf, "torch_dist", Layout(), f"{name}-long", long)
    for vocab_size in VOCABULARIES:
        hf = make_model(folder / str(vocab_size) / "hf", vocab_size, **NARROW)
        for kind in STORED:
            for tensor in TENSOR_SIZES:
                job.add(hf, kind, Layout(tensor), f"{vocab_size}")
        for tensor in TENSOR_SIZES:  # padded as Megatron-LM pads, which knows the layout
            padded = padded_vocab_size(vocab_size, 128 * tensor)
            job.add(hf, "torch_dist", Layout(tensor), f"{vocab_size}-by-layout", padded=padded)
    write_whole(folder / "whole", make_model)
    job.run()
    return job


def hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_ranks(found: list[list[dict[str, torch.Tensor]]], hf: Path, padded: int, layout: Layout) -> None:
    """Every chunk of every rank holds its slices and nothing else."""
    weights, (shape, _) = hf_weights(hf), read_shape(hf)
    assert len(found) == layout.world_size
    for rank, chunks in enumerate(found):
        wanted = rank_slices(weights, shape, padded, layout, rank)
        assert len(chunks) == len(wanted)
        for got, slices in zip(chunks, wanted, strict=True):
            assert got.keys() == slices.keys()
            for name, slice in slices.items():
                assert torch.equal(got[name], slice), f"{layout.name} rank {rank}: {name}"


@pytest.mark.parametrize(("kind", "name", "layout"), SLICED, ids=lambda value: getattr(value, "name", value))
def test_every_rank_gets_its_slices(kind: str, name: str, layout: Layout, job: Job) -> None:
    hf = job.folder / name / "hf"
    _, padded = stored(hf, hf.parent, kind, layout)
    check_ranks(job.output(kind, layout, name), hf, padded, layout)


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_transformers(name: str, job: Job) -> None:
    expected = transformers_logits(job.folder / name / "hf", random_tokens(2, LENGTH))
    assert expected.std() > 1
    for kind, layout in [(kind, layout) for kind, real, layout in REAL if real == name]:
        found = job.output(kind, layout, f"{name}-short")
        error = relative_error(found[..., :VOCAB_SIZE], expected)
        print(f"{name}, {kind}, {layout.name}: {error:.1e}")
        assert error <= TOLERANCE
        assert not found[..., VOCAB_SIZE:].any()  # of the padding, whose rows are zero


@pytest.mark.parametrize("name", SCALED)
def test_logits_at_long_positions(name: str, job: Job) -> None:
    folder, tokens = job.folder / f"{name}-shallow" / "hf", random_tokens(1, LONG)
    expected = transformers_logits(folder, tokens)
    found = job.output("torch_dist", Layout(), f"{name}-long")[..., :VOCAB_SIZE]
    whole, beyond = relative_error(found, expected), relative_error(found[:, 8192:], expected[:, 8192:])
    print(f"{name}, {LONG} tokens: {whole:.1e}, beyond 8192: {beyond:.1e}")
    assert max(whole, beyond) <= TOLERANCE
    # a forgotten scaling would be seen
    rope = {"rope_type": "default", "rope_theta": read_shape(folder)[0].rope_theta}
    unscaled = transformers_logits(folder, tokens, rope_parameters=rope)
    assert relative_error(unscaled[:, 8192:], expected[:, 8192:]) > 1000 * TOLERANCE


@pytest.mark.parametrize("tensor", TENSOR_SIZES)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_any_vocabulary_at_any_tensor_parallel_size(vocab_size: int, tensor: int, job: Job) -> None:
    hf, layout = job.folder / str(vocab_size) / "hf", Layout(tensor)
    for kind in STORED:
        check_ranks(job.output(kind, layout, f"{vocab_size}"), hf, stored(hf, hf.parent, kind, layout)[1], layout)
    padded = padded_vocab_size(vocab_size, 128 * tensor)
    check_ranks(job.output("torch_dist", layout, f"{vocab_size}-by-layout"), hf, padded, layout)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_a_vocabulary_comes_back_bit_for_bit(vocab_size: int, kind: str, job: Job, tmp_path: Path) -> None:
    hf = job.folder / str(vocab_size) / "hf"
    folders = [stored(hf, hf.parent, kind, Layout(tensor))[0] for tensor in TENSOR_SIZES]
    for number, folder in enumerate(dict.fromkeys(folders)):
        convert(folder, tmp_path / str(number), "hf")
        before, after = hf_weights(hf), hf_weights(tmp_path / str(number))
        assert before.keys() == after.keys() and len(after["lm_head.weight"]) == vocab_size
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert read_shape(tmp_path / str(number)) == read_shape(hf)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_no_padded_row_reaches_hf(vocab_size: int, kind: str, make_model, tmp_path: Path) -> None:
    """Also where training has filled the padding: a model of the padded size, then declared the smaller one."""
    for layout in [Layout(tensor) for tensor in TENSOR_SIZES] if kind == "mp_rank" else [Layout()]:
        here = tmp_path / layout.name
        hf = make_model(here / "hf", padded_vocab_size(vocab_size, 128), **NARROW)
        for file in hf.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
                tensors[name][vocab_size:] = POISON
            save_file(tensors, file)
        folder, padded = stored(hf, here, kind, layout)
        assert padded >= padded_vocab_size(vocab_size, 128)
        manifest = read_json(folder / "manifest.json", CheckpointError)
        manifest = {name: value for name, value in manifest.items() if name not in (*SEALS, "weights_sha256")}
        (folder / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": vocab_size}))
        convert(folder, here / "back", "hf")
        for name, tensor in hf_weights(here / "back").items():
            assert not (tensor == POISON).any(), name
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                assert len(tensor) == vocab_size


@pytest.fixture(scope="module")
def whole(job: Job) -> Path:
    return job.folder / "whole"


@pytest.mark.parametrize("name", WHOLE)
def test_megatron_core_loads_what_we_write(whole: Path, name: str) -> None:
    tokens, logits = torch.load(whole / name / "tokens.pt"), torch.load(whole / name / "loaded_logits.pt")
    ours = LlamaForward(whole / name / "hf").logits(tokens)
    assert ours.std() > 0.3
    assert (logits[..., :VOCAB_SIZE] - ours).abs().max() <= 1e-4
    if "tied" not in name:
        assert (logits[..., VOCAB_SIZE:] == 0).all()  # padding rows are zero


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in WHOLE for layout in SAVED_FORMS[name]])
def test_we_read_what_megatron_core_saves(whole: Path, name: str, layout: str, tmp_path: Path) -> None:
    tokens, logits = torch.load(whole / name / "tokens.pt"), torch.load(whole / name / "saved_logits.pt")
    before = torch.load(whole / name / "loaded_logits.pt")
    assert not torch.allclose(logits, before, atol=1e-2)  # the weights did change
    saved = whole / name / layout
    assert (LlamaForward(saved).logits(tokens) - logits[..., :VOCAB_SIZE]).abs().max() <= 1e-4
    assert show(saved)["step"] == 7
    convert(saved, tmp_path / "hf", "hf")
    verify(saved, tmp_path / "hf")
    assert (LlamaForward(tmp_path / "hf").logits(tokens) - logits[..., :VOCAB_SIZE]).abs().max() <= 1e-4
