"""The surgery plan: which old rows make each new row of the embedding and of the head, on disk."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError

from megatron_cpt.config.folders import new_folder
from megatron_cpt.config.manifest import (
    MANIFEST,
    read_json,
    read_manifest,
    sha256_file,
    write_json_atomic,
    write_manifest,
)
from megatron_cpt.errors import InputError
from megatron_cpt.surgery.methods import make_mix
from megatron_cpt.surgery.row_mix import RowMix
from megatron_cpt.tokenizer import VocabMap
from megatron_cpt.tokenizer.vocab_map import Origin

FACTS = "plan.json"
MATRICES = "plan.safetensors"
TOKENIZER = "tokenizer"
_ORIGINS: tuple[str, ...] = get_args(Origin)
_FIELDS = ("old_size", "new_size", "old_sha256", "new_sha256", "method_embedding", "method_head")


@dataclass(frozen=True, eq=False)
class SurgeryPlan:
    """How both vocabulary matrices of a model are remade; `origins[new_id]` says what each row is.

    `old_sha256` and `new_sha256` are the hashes of the two tokenizers' model files.
    """

    old_size: int
    new_size: int
    old_sha256: str
    new_sha256: str
    method_embedding: str
    method_head: str
    embedding: RowMix
    head: RowMix
    origins: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Sizes, hashes, methods, and the number of rows of each origin."""
        counts = Counter(self.origins)
        rows = {origin: counts[origin] for origin in _ORIGINS}
        return {**{field: getattr(self, field) for field in _FIELDS}, "rows": rows}

    def save(self, folder: str | Path, tokenizer_folder: str | Path | None = None) -> None:
        """Write the plan to a new folder: plan.json, plan.safetensors, and the manifest last.

        Args:
            folder: new or empty.
            tokenizer_folder: the new tokenizer; a copy of it makes the plan complete in itself.

        Raises:
            InputError: `folder` is taken.
        """
        tensors = {"origins": torch.tensor([_ORIGINS.index(origin) for origin in self.origins], dtype=torch.uint8)}
        for name, mix in (("embedding", self.embedding), ("head", self.head)):
            tensors |= {f"{name}.indptr": mix.indptr, f"{name}.indices": mix.indices, f"{name}.weights": mix.weights}
        with new_folder(Path(folder), InputError) as staged:
            write_json_atomic(staged / FACTS, self.facts())
            (staged / MATRICES).write_bytes(safetensors.torch.save(tensors))
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
            embedding, head = (
                RowMix(facts["old_size"], *(tensors[f"{name}.{part}"] for part in ("indptr", "indices", "weights")))
                for name in ("embedding", "head")
            )
            origins = tuple(_ORIGINS[code] for code in tensors["origins"].tolist())
            stated = {field: facts[field] for field in _FIELDS}
            plan = cls(embedding=embedding, head=head, origins=origins, **stated)
        except (KeyError, IndexError, SafetensorError) as caught:
            raise InputError(f"{folder} holds a plan of another format ({caught!r}): make the plan again") from None
        if {plan.embedding.num_new_rows, plan.head.num_new_rows, len(origins)} != {plan.new_size}:
            raise InputError(f"{folder} has matrices of other sizes than {plan.new_size} rows: make the plan again")
        return plan

    def row(self, new_id: int) -> dict[str, Any]:
        """What one new row is: its origin, and the old ids and weights for both matrices."""
        if not 0 <= new_id < self.new_size:
            raise InputError(f"row {new_id} is not in the plan: expected 0 to {self.new_size - 1}")
        described: dict[str, Any] = {"id": new_id, "origin": self.origins[new_id]}
        for name, mix in (("embedding", self.embedding), ("head", self.head)):
            old_ids, weights = mix.row(new_id)
            described[name] = {"old_ids": old_ids, "weights": weights}
        return described


def plan_surgery(vocab_map: VocabMap, method_embedding: str = "mean", method_head: str = "mean") -> SurgeryPlan:
    """Plan how the two vocabulary matrices follow a change of vocabulary; no model is needed.

    Args:
        vocab_map: where each new id comes from.
        method_embedding: name of the method for rows of new pieces in the embedding; see `METHODS`.
        method_head: the same for the head.

    Raises:
        ConfigError: a method is unknown.
    """
    return SurgeryPlan(
        vocab_map.old_size,
        vocab_map.new_size,
        vocab_map.old_sha256,
        vocab_map.new_sha256,
        method_embedding,
        method_head,
        make_mix(method_embedding, vocab_map),
        make_mix(method_head, vocab_map),
        tuple(entry.origin for entry in vocab_map.entries),
    )
