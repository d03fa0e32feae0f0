"""Orthogonal matching pursuit against the textbook's loop in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_cpt.config.surgery import parse_method
from megatron_cpt.errors import CheckpointError, TokenizerError
from megatron_cpt.surgery import Inputs, SurgeryPlan, plan_surgery
from megatron_cpt.surgery.methods import pursuit
from megatron_cpt.surgery.methods.pursuit import matching_pursuit
from megatron_cpt.tokenizer import VocabMap, load_tokenizer

Make = Callable[..., Path]


def textbook(target: np.ndarray, atoms: np.ndarray, steps: int) -> tuple[list[int], np.ndarray]:
    """One atom after the other, the least squares from the start each time."""
    chosen: list[int] = []
    left, weights = target, np.empty(0)
    directions = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    while len(chosen) < steps and np.linalg.norm(left) > 1e-5 * np.linalg.norm(target):
        cosines = np.abs(directions @ left)
        cosines[chosen] = -1
        chosen.append(int(cosines.argmax()))
        weights = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - weights @ atoms[chosen]
    return chosen, weights


def atoms_and_targets(width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.rand(90, 1, generator=generator) * 5 + 0.1  # long atoms must not be preferred
    return torch.randn(90, width, generator=generator) * lengths, torch.randn(40, width, generator=generator)


@pytest.mark.parametrize("steps", [1, 6, 64])
def test_against_the_textbook(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pursuit, "_BLOCK_ELEMENTS", 24 * 64 * 7)  # several blocks, the last one short
    atoms, targets = atoms_and_targets()
    made = list(matching_pursuit(targets, atoms, steps))
    assert len(made) == 40
    for target, (places, weights) in zip(targets.double().numpy(), made, strict=True):
        chosen, truth = textbook(target, atoms.double().numpy(), min(steps, 24))
        assert np.asarray(places).tolist() == chosen
        assert np.abs(weights - truth).max() <= 1e-5 * (1 + np.abs(truth).max())


def test_when_nothing_is_left() -> None:
    """Targets that are few atoms exactly, an atom itself, or nothing; and atoms that say nothing new."""
    atoms, _ = atoms_and_targets()
    atoms[7] = 0
    twice = torch.cat([atoms, 3 * atoms[:20], torch.zeros(1, 24)])
    targets = torch.stack([2 * atoms[3] - 0.5 * atoms[30], -atoms[11], torch.zeros(24), atoms[50]])
    made = [(np.asarray(p).tolist(), np.asarray(w).tolist()) for p, w in matching_pursuit(targets, twice, 24)]
    for (places, weights), target in zip(made, targets, strict=True):
        assert len(set(places)) == len(places) and not {7, 110} & set(places)
        torch.testing.assert_close(torch.tensor(weights) @ twice[places], target, rtol=1e-4, atol=1e-5)
    assert made[1] in [([11], [pytest.approx(-1)]), ([101], [pytest.approx(-1 / 3)])] and made[2] == ([], [])
    assert made[3] == ([50], [pytest.approx(1)])


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pursuit, "_BLOCK_ELEMENTS", 24 * 24 * 5)
    atoms, targets = atoms_and_targets()
    threads, made = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        try:
            made.append([(bytes(p), bytes(w)) for p, w in matching_pursuit(targets, atoms, 12)])  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(threads)
    assert made[0] == made[1] == made[2]


@pytest.fixture
def donor(make_model: Make, vocab_map: VocabMap, new_tokenizer: Path) -> Path:
    """An untied model of the new tokenizer with padded rows."""
    folder = make_model(vocab_map.new_size + 8)
    shutil.copyfile(new_tokenizer / "tokenizer.model", folder / "tokenizer.model")
    return folder


def planned(vocab_map: VocabMap, donor: Path, old: Path, new: Path) -> SurgeryPlan:
    inputs = Inputs(load_tokenizer(old), load_tokenizer(new), lambda files, side: [])
    method = parse_method({"method": "omp", "donor": str(donor), "num_atoms": 5})
    return plan_surgery(vocab_map, method, method, inputs)


def test_each_matrix_by_its_rows(vocab_map: VocabMap, donor: Path, old_tokenizer: Path, new_tokenizer: Path) -> None:
    plan = planned(vocab_map, donor, old_tokenizer, new_tokenizer)
    tensors = safetensors.torch.load_file(donor / "model.safetensors")
    old = load_tokenizer(old_tokenizer)
    atoms = [id for id in range(old.vocab_size) if old.kind(id) == "text"]  # the new one extends it: the same ids
    for name, tensor in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        table = tensors[tensor].double().numpy()
        assert plan.matrix(name).method["atoms"] == len(atoms) and plan.matrix(name).method["fallback_rows"] == 0
        for id in plan.head.new_rows.tolist():
            chosen, weights = textbook(table[id], table[atoms], 5)
            made = plan.row(id)[name]
            assert made["old_ids"] == [atoms[place] for place in chosen]
            assert made["weights"] == pytest.approx(weights.tolist(), abs=1e-5)
    assert plan.row(vocab_map.new_size - 1)["head"] != plan.row(vocab_map.new_size - 1)["embedding"]


def test_tied_and_partial_donors(
    make_model: Make, vocab_map: VocabMap, old_tokenizer: Path, new_tokenizer: Path
) -> None:
    tied = make_model(vocab_map.new_size, tied=True)
    shutil.copyfile(new_tokenizer / "tokenizer.model", tied / "tokenizer.model")
    plan = planned(vocab_map, tied, old_tokenizer, new_tokenizer)
    assert torch.equal(plan.embedding.mix.weights, plan.head.mix.weights)
    # A donor that has none of the new pieces: all fall back, and it is said.
    without = make_model(vocab_map.old_size)
    shutil.copyfile(old_tokenizer / "tokenizer.model", without / "tokenizer.model")
    plan = planned(vocab_map, without, old_tokenizer, new_tokenizer)
    assert plan.facts()["methods"]["head"]["fallback_rows"] == plan.facts()["rows"]["new"]
    assert plan.row(vocab_map.new_size - 1)["head"]["fallback"] == "mean of pieces"


def test_donors_that_do_not_fit(
    make_model: Make, vocab_map: VocabMap, old_tokenizer: Path, new_tokenizer: Path
) -> None:
    small = make_model(vocab_map.old_size - 1)
    with pytest.raises(TokenizerError, match="holds neither tokenizer.model nor tokenizer.json"):
        planned(vocab_map, small, old_tokenizer, new_tokenizer)
    shutil.copyfile(new_tokenizer / "tokenizer.model", small / "tokenizer.model")
    with pytest.raises(CheckpointError, match="name the folder of a model with its own tokenizer"):
        planned(vocab_map, small, old_tokenizer, new_tokenizer)
    atoms, targets = atoms_and_targets()
    targets[3, 3] = float("inf")
    with pytest.raises(CheckpointError, match="row 3 is not finite"):
        list(matching_pursuit(targets, atoms, 3))


def test_memory_is_one_more_table_of_the_atoms():
    atoms_OD = torch.randn(20_000, 1024, generator=torch.Generator().manual_seed(1))
    targets_TD = atoms_OD[:2] + atoms_OD[2:4]
    held = peak_bytes(forget=True)
    rows = list(matching_pursuit(targets_TD, atoms_OD, 2))
    size = atoms_OD.numel() * 4
    assert [set(places.tolist()) for places, _ in rows] == [{0, 2}, {1, 3}]
    assert peak_bytes() - held < 1.5 * size  # the directions, and no copy of the atoms in float64


def peak_bytes(forget: bool = False) -> int:
    """The most memory that this process has held, since it was last asked to `forget`."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
