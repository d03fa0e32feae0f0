"""The surgery plan: which old rows make each new row of the embedding and of the head, on disk."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError

from megatron_cpt.checkpoint.reader import WeightsDigest
from megatron_cpt.config.folders import new_folder
from megatron_cpt.config.manifest import (
    MANIFEST,
    read_json,
    read_manifest,
    sha256_file,
    sha256_json,
    write_json_atomic,
    write_manifest,
)
from megatron_cpt.config.surgery import Method, PiecesMethod
from megatron_cpt.errors import InputError
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods import Inputs, make_matrix
from megatron_cpt.tokenizer import VocabMap
from megatron_cpt.tokenizer.vocab_map import Origin

FACTS = "plan.json"
MATRICES = "plan.safetensors"
TOKENIZER = "tokenizer"
_ORIGINS: tuple[str, ...] = get_args(Origin)
_FIELDS = ("old_size", "new_size", "old_sha256", "new_sha256")
_MATRICES = ("embedding", "head")
_DEFAULT = PiecesMethod()


@dataclass(frozen=True, eq=False)
class SurgeryPlan:
    """How both vocabulary matrices of a model are remade; `origins[new_id]` says what each row is.

    `old_sha256` and `new_sha256` are the hashes of the two tokenizers' model files.
    """

    old_size: int
    new_size: int
    old_sha256: str
    new_sha256: str
    embedding: MatrixPlan
    head: MatrixPlan
    origins: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Sizes, hashes, methods, the number of rows of each origin, and of old rows that are left out."""
        counts = Counter(self.origins)
        rows = {origin: counts[origin] for origin in _ORIGINS}
        methods = {name: dict(self.matrix(name).method) for name in _MATRICES}
        stated = {field: getattr(self, field) for field in _FIELDS}
        calibrated = {name: self.matrix(name).adjustment is not None for name in _MATRICES}
        return {
            **stated,
            "methods": methods,
            "calibrated": calibrated,
            "rows": rows,
            "removed": len(self.removed()),
        }

    @cached_property
    def sha256(self) -> str:
        """Identity of the plan: hash of everything that decides a row."""
        digest = WeightsDigest()
        for name in _MATRICES:
            for part, tensor in self.matrix(name).tensors().items():
                digest.update(f"{name}.{part}", tensor.dtype, tuple(tensor.shape), tensor)
        methods = [dict(self.matrix(name).method) for name in _MATRICES]
        stated = [getattr(self, field) for field in _FIELDS]
        return sha256_json([stated, methods, self.origins, digest.hexdigest()])

    def matrix(self, name: str) -> MatrixPlan:
        """The plan of "embedding" or "head"."""
        return self.embedding if name == "embedding" else self.head

    def kept(self, name: str | None = None) -> dict[int, int]:
        """New id -> old id of every row that is carried over as itself.

        Args:
            name: "embedding" or "head"; None: of the rows that both matrices carry over.
        """
        if name is None:
            head = self.kept("head")
            return {new: old for new, old in self.kept("embedding").items() if new in head}
        plan = self.matrix(name)
        carried = plan.mix.copied()
        carried[plan.new_rows] = False  # a method may copy a row too; it stands for another piece there
        ids = torch.nonzero(carried).flatten()
        return dict(zip(ids.tolist(), plan.mix.indices[plan.mix.indptr[ids]].tolist(), strict=True))

    def removed(self) -> list[int]:
        """Old ids whose rows are not carried over in both matrices, ascending."""
        return sorted(set(range(self.old_size)) - set(self.kept().values()))

    def save(self, folder: str | Path, tokenizer_folder: str | Path | None = None) -> None:
        """Write the plan to a new folder: plan.json, plan.safetensors, and the manifest last.

        Args:
            folder: new or empty.
            tokenizer_folder: the new tokenizer; a copy of it makes the plan complete in itself.

        Raises:
            InputError: `folder` is taken.
        """
        tensors = {"origins": torch.tensor([_ORIGINS.index(origin) for origin in self.origins], dtype=torch.uint8)}
        for name in _MATRICES:
            tensors |= {f"{name}.{part}": tensor for part, tensor in self.matrix(name).tensors().items()}
        with new_folder(Path(folder), InputError) as staged:
            write_json_atomic(staged / FACTS, self.facts())
            (staged / MATRICES).write_bytes(safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()}))
            if tokenizer_folder is not None:
                shutil.copytree(tokenizer_folder, staged / TOKENIZER)
            inputs = {"old_tokenizer": self.old_sha256, "new_tokenizer": self.new_sha256}
            outputs = {name: sha256_file(staged / name) for name in (FACTS, MATRICES)}
            write_manifest(staged / MANIFEST, "plan", inputs, outputs=outputs)

    @classmethod
    def load(cls, folder: str | Path) -> SurgeryPlan:
        """Read a plan and check it against its manifest.

        Raises:
            InputError: it is missing, unfinished, damaged, or was changed by hand.
        """
        folder = Path(folder)
        manifest = read_manifest(folder / MANIFEST, "plan")
        for name in (FACTS, MATRICES):
            if not (folder / name).is_file() or sha256_file(folder / name) != manifest.get("outputs", {}).get(name):
                raise InputError(f"{folder / name} is not the file its manifest describes: make the plan again")
        facts = read_json(folder / FACTS)
        try:
            tensors = safetensors.torch.load_file(folder / MATRICES)
            embedding, head = (_matrix(name, tensors, facts) for name in _MATRICES)
            origins = tuple(_ORIGINS[code] for code in tensors["origins"].tolist())
            stated = {field: facts[field] for field in _FIELDS}
            plan = cls(embedding=embedding, head=head, origins=origins, **stated)
        except (KeyError, IndexError, SafetensorError) as caught:
            raise InputError(f"{folder} holds a plan of another format ({caught!r}): make the plan again") from None
        if {plan.embedding.mix.num_new_rows, plan.head.mix.num_new_rows, len(origins)} != {plan.new_size}:
            raise InputError(f"{folder} has matrices of other sizes than {plan.new_size} rows: make the plan again")
        return plan

    def row(self, new_id: int) -> dict[str, Any]:
        """What one new row is: its origin, and what makes it in both matrices."""
        if not 0 <= new_id < self.new_size:
            raise InputError(f"row {new_id} is not in the plan: expected 0 to {self.new_size - 1}")
        made = {name: self.matrix(name).describe(new_id) for name in _MATRICES}
        for name in _MATRICES:
            if self.matrix(name).adjustment is not None and self.origins[new_id] == "new":
                made[name]["then"] = "calibrated"
        return {"id": new_id, "origin": self.origins[new_id], **made}


def _matrix(name: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> MatrixPlan:
    prefix = f"{name}."
    mine = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return MatrixPlan.from_tensors(mine, facts["old_size"], facts["methods"][name])


def plan_surgery(
    vocab_map: VocabMap,
    embedding: Method = _DEFAULT,
    head: Method = _DEFAULT,
    inputs: Inputs | None = None,
) -> SurgeryPlan:
    """Plan how the two vocabulary matrices follow a change of vocabulary; the base model is not needed.

    Args:
        vocab_map: where each new id comes from.
        embedding: how rows of new pieces are made in the embedding; by default the mean of the old pieces.
        head: the same for the head.
        inputs: both tokenizers and a reader of texts, for methods that need them.

    Raises:
        CptError: what a method needs is missing or does not fit.
    """
    return SurgeryPlan(
        vocab_map.old_size,
        vocab_map.new_size,
        vocab_map.old_sha256,
        vocab_map.new_sha256,
        make_matrix(embedding, vocab_map, 0, inputs),
        make_matrix(head, vocab_map, 1, inputs),
        tuple(entry.origin for entry in vocab_map.entries),
    )
