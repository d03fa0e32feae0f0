"""CLP-Transfer in its three forms against the dense formula in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cpt.config.surgery import parse_method
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery import RowMaker, plan_surgery
from megatron_cpt.surgery.methods import similarity
from megatron_cpt.surgery.methods.similarity import topk_weights, unit
from megatron_cpt.tokenizer import Entry, VocabMap

Make = Callable[..., Path]


@pytest.fixture
def helper(make_model: Make, vocab_map: VocabMap, new_tokenizer: Path) -> Path:
    """A model of the new tokenizer with 24 padded rows, and with its tokenizer."""
    folder = make_model(vocab_map.new_size + 24)
    shutil.copyfile(new_tokenizer / "tokenizer.model", folder / "tokenizer.model")
    return folder


def dense(helper: Path, vocab_map: VocabMap, old_VD: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the new pieces, and how ill-conditioned the sum of each row's weights is."""
    table = safetensors.torch.load_file(helper / "model.safetensors")["model.embed_tokens.weight"].double()
    ids = [id for id, entry in enumerate(vocab_map.entries) if entry.origin == "new"]
    shared = [(id, entry.old_id) for id, entry in enumerate(vocab_map.entries) if entry.origin == "kept"]
    new, old = table[ids], table[[id for id, _ in shared]]
    cosine = (new @ old.T) / (new.norm(dim=1)[:, None] * old.norm(dim=1)[None])
    if form == "topk":
        weights = torch.zeros_like(cosine)
        for row, values in enumerate(cosine):
            best = values.argsort(descending=True)[:7]
            weights[row, best] = (values[best] / 0.3).exp()
    else:
        weights = cosine.clamp(min=0) if form == "clamped" else cosine
    condition = weights.abs().sum(1, keepdim=True) / weights.sum(1, keepdim=True).abs()
    rows = weights / weights.sum(1, keepdim=True) @ old_VD.double()[[old_id for _, old_id in shared]]
    return rows, condition


@pytest.mark.parametrize("form", ["topk", "clamped", "published"])
def test_the_three_forms(form: str, helper: Path, vocab_map: VocabMap) -> None:
    old_VD = torch.randn(vocab_map.old_size, 20, generator=torch.Generator().manual_seed(2))
    method = {"method": "clp", "helper": str(helper), "form": form, "top_k": 7, "temperature": 0.3}
    plan = plan_surgery(vocab_map, parse_method(method), parse_method(method))
    truth, condition = dense(helper, vocab_map, old_VD, form)
    for matrix in (plan.embedding, plan.head):
        made = RowMaker(matrix, old_VD).rows(0, vocab_map.new_size)[matrix.new_rows].double()
        assert ((made - truth).abs() <= 3e-6 * condition * (1 + truth.abs().amax(1, keepdim=True))).all()
        assert matrix.method["fallback_rows"] == 0


def test_tied_helpers_are_the_same(make_model: Make, vocab_map: VocabMap) -> None:
    """Only the input embedding is read, so whether the head has its own rows does not matter."""
    made = []
    for tied in (False, True):
        folder = make_model(vocab_map.new_size, tied=tied)
        table = torch.randn(vocab_map.new_size, 32, generator=torch.Generator().manual_seed(1))
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = table
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        made.append(plan_surgery(vocab_map, parse_method({"method": "clp", "helper": str(folder)})).embedding)
    assert json.dumps(made[0].mix.indices.tolist()) == json.dumps(made[1].mix.indices.tolist())
    assert torch.equal(made[0].mix.weights, made[1].mix.weights)


def test_a_helper_that_says_nothing(make_model: Make, vocab_map: VocabMap) -> None:
    """A row of zeros is no direction: the piece is the mean of its old pieces, and that is stated."""
    folder = make_model(vocab_map.new_size)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    lost = next(id for id, entry in enumerate(vocab_map.entries) if len(entry.old_pieces) > 2)
    tensors["model.embed_tokens.weight"][lost] = 0
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    for form in ("topk", "clamped"):
        method = parse_method({"method": "clp", "helper": str(folder), "form": form})
        plan = plan_surgery(vocab_map, method, method)
        assert plan.facts()["methods"]["head"]["fallback_rows"] == 1
        described = plan.row(lost)["embedding"]
        assert described["fallback"] == "mean of pieces"
        assert described["old_ids"] == list(vocab_map.entries[lost].old_pieces)
        assert "fallback" not in plan.row(lost + 1)["embedding"]


def test_a_piece_that_is_like_no_shared_one(make_model: Make, vocab_map: VocabMap) -> None:
    """Its weights sum to nothing, so it falls back too, and the others do not notice."""
    folder = make_model(vocab_map.new_size)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].abs()
    across, against = vocab_map.new_size - 1, vocab_map.new_size - 2
    table[:, 0] = 0
    table[across] = torch.eye(table.shape[1])[0]
    table[against] = -table[against]
    safetensors.torch.save_file({**tensors, "model.embed_tokens.weight": table}, folder / "model.safetensors")
    for form, lost in (("clamped", [against, across]), ("published", [across])):
        method = parse_method({"method": "clp", "helper": str(folder), "form": form})
        plan = plan_surgery(vocab_map, method, method)
        assert plan.facts()["methods"]["head"]["fallback_rows"] == len(lost)
        for id in (against, across):
            described = plan.row(id)["embedding"]
            assert ("fallback" in described) == (id in lost) != ("similarity" in described)
        old_VD = torch.randn(vocab_map.old_size, 20, generator=torch.Generator().manual_seed(2))
        rows = RowMaker(plan.embedding, old_VD).rows(0, vocab_map.new_size)
        mean = old_VD[list(vocab_map.entries[across].old_pieces)].mean(0)
        torch.testing.assert_close(rows[across], mean)
        assert rows.isfinite().all()


def test_helpers_that_do_not_fit(make_model: Make, helper: Path, vocab_map: VocabMap, old_tokenizer: Path) -> None:
    def plan(folder: Path, of: VocabMap = vocab_map) -> None:
        plan_surgery(of, parse_method({"method": "clp", "helper": str(folder)}))

    with pytest.raises(CheckpointError, match="name a helper that was trained with the new tokenizer"):
        plan(make_model(vocab_map.new_size - 8))
    nothing_shared = VocabMap(4, 1, "old", vocab_map.new_sha256, (Entry("new", None, (1,)),))
    with pytest.raises(CheckpointError, match="share no piece"):
        plan(helper, nothing_shared)
    tensors = safetensors.torch.load_file(helper / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = float("nan")
    safetensors.torch.save_file(tensors, helper / "model.safetensors")
    with pytest.raises(CheckpointError, match="row 7 is not finite"):
        plan(helper)
    shutil.copyfile(old_tokenizer / "tokenizer.model", helper / "tokenizer.model")
    with pytest.raises(CheckpointError, match="has another tokenizer"):
        plan(helper)


class Largest(TorchDispatchMode):
    """Records the most numbers that any tensor held."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK_ELEMENTS", 1 << 16)
    generator = torch.Generator().manual_seed(4)
    new, old = (unit(torch.randn(count, 8, generator=generator)) for count in (3000, 2000))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that all of it happens in this thread, where it is watched
    try:
        with Largest() as largest:
            in_one = list(topk_weights(new, old, 5, 0.1))
    finally:
        torch.set_num_threads(threads)
    assert 2000 * 5 < largest.numbers <= 1 << 16 < len(new) * len(old) // 90
    torch.set_num_threads(2)
    try:
        in_two = list(topk_weights(new, old, 5, 0.1))
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(in_one, in_two, strict=True):
        assert [part.tobytes() for part in left] == [part.tobytes() for part in right]  # type: ignore[union-attr]
