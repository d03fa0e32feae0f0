"""A model as it will be after surgery, before anything is written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.checkpoint.reader import ModelReader
from megatron_cpt.checkpoint.tokenizer_files import recorded_tokenizer
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.matrix import RowMaker
from megatron_cpt.surgery.plan import SurgeryPlan


def check_starts_from(plan: SurgeryPlan, base: Path) -> str | None:
    """The tokenizer that a checkpoint records, which has to be the one that the plan starts from; None: none.

    Raises:
        CheckpointError: it is another.
    """
    recorded = recorded_tokenizer(base)
    if recorded is not None and recorded != plan.old_sha256:
        already = " (it is the one that the plan leads to: this checkpoint is extended)"
        raise CheckpointError(
            f"the tokenizer of {base} ({recorded[:12]}) is not the one the plan starts from "
            f"({plan.old_sha256[:12]}){already if recorded == plan.new_sha256 else ''}: plan again with this model's "
            "tokenizer"
        )
    return recorded


def check_one_table(plan: SurgeryPlan, base: Path) -> None:
    """Check that a plan makes both matrices alike, as a tied model has one.

    Raises:
        CheckpointError: it does not.
    """
    ours, theirs = plan.embedding.tensors(), plan.head.tensors()
    if not (ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)):
        raise CheckpointError(
            f"{base} ties its head to its embedding, yet the plan makes the one by {plan.embedding.method['method']!r} "
            f"and the other by {plan.head.method['method']!r}: plan with one method, and the same options, for both"
        )


class PlannedReader:
    """The tensors of a base model with the vocabulary rows of a plan (a `ModelReader`).

    Args:
        reader: the base.
        plan: made for the base's vocabulary.

    Raises:
        CheckpointError: the base has another tokenizer than the plan starts from, or fewer rows.
    """

    def __init__(self, reader: ModelReader, plan: SurgeryPlan) -> None:
        check_starts_from(plan, reader.folder)
        if reader.vocab_size < plan.old_size:
            raise CheckpointError(
                f"{reader.folder} has {reader.vocab_size} vocabulary rows, the plan starts from {plan.old_size}: "
                "plan again with this model's tokenizer"
            )
        self.folder, self.llama, self.vocab_size = reader.folder, reader.llama, plan.new_size
        self._reader = reader
        self._plans = {EMBEDDING: plan.embedding, HEAD: plan.head}
        self._makers: dict[str, RowMaker] = {}

    def names(self) -> list[str]:
        """Hugging Face names of all tensors, in the order of a forward pass."""
        return self._reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor after surgery."""
        shape = self._reader.shape(name)
        return (self.vocab_size, *shape[1:]) if name in self._plans else shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return self._reader.dtype(name)

    def read(self, name: str) -> Tensor:
        """A whole tensor, contiguous."""
        return self.read_rows(name, 0, self.vocab_size) if name in self._plans else self._reader.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor's first dimension."""
        if name not in self._plans:
            return self._reader.read_rows(name, start, stop)
        if name not in self._makers:
            self._makers[name] = RowMaker(self._plans[name], self._reader.read(name))
        return self._makers[name].rows(start, stop)
