"""What all methods share: which rows are to be made, how the others are kept, and what stands in for a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.config.surgery import Method
from megatron_cpt.surgery.matrix import Fill, MatrixPlan, SimilarityMix
from megatron_cpt.surgery.methods.inputs import Inputs
from megatron_cpt.surgery.row_mix import Row, RowMix
from megatron_cpt.tokenizer import VocabMap


@dataclass(frozen=True)
class Task:
    """One matrix to plan: the map, the method's settings, and 0 for the embedding or 1 for the head."""

    vocab_map: VocabMap
    method: Method
    matrix: int
    given: Inputs | None = None

    @property
    def inputs(self) -> Inputs:
        """Tokenizers and texts."""
        if self.given is None:
            raise ValueError("this method reads texts or pieces: give plan_surgery its Inputs")
        return self.given

    @cached_property
    def new_rows(self) -> list[int]:
        """Numbers of the rows that the method makes; without `copy_kept` all but padding."""
        origins = {"new"} if self.method.copy_kept else {"new", "kept", "byte", "special"}
        return [id for id, entry in enumerate(self.vocab_map.entries) if entry.origin in origins]

    @cached_property
    def shared(self) -> tuple[list[int], list[int]]:
        """(new ids, old ids) of the pieces that both vocabularies have, without bytes and specials."""
        kept = [(id, entry.old_id) for id, entry in enumerate(self.vocab_map.entries) if entry.origin == "kept"]
        return [id for id, _ in kept], [old for _, old in kept if old is not None]

    def cut(self, new_id: int) -> tuple[int, ...]:
        """The old pieces that a new id's surface is made of; its own old id where it is kept."""
        entry = self.vocab_map.entries[new_id]
        return entry.old_pieces if entry.old_id is None else (entry.old_id,)

    def mean_of_pieces(self, new_id: int) -> Row:
        """The mean of the old pieces of a new id's surface."""
        pieces = self.cut(new_id)
        return pieces, [1.0 / len(pieces)] * len(pieces)

    def plan(
        self, rows: Mapping[int, Row], fills: Sequence[Fill] = (), similarity: SimilarityMix | None = None
    ) -> MatrixPlan:
        """A plan of the made rows and copies of the kept ones; a new row that nothing makes is zero."""
        made = set(self.new_rows)

        def row(id: int) -> Row:
            old_id = self.vocab_map.entries[id].old_id
            if id in made:
                return rows.get(id, ((), ()))
            return ((), ()) if old_id is None else ((old_id,), (1.0,))  # without an old id: padding

        mix = RowMix.from_rows(map(row, range(self.vocab_map.new_size)), self.vocab_map.old_size)
        settings = self.method.model_dump(mode="json")
        new_rows = numbers(self.new_rows)
        filled = tuple(fill for fill in fills if len(fill.rows))
        return MatrixPlan(mix, new_rows, settings, filled, similarity, self.method.match_norm)

    def plan_or_fall_back(
        self,
        rows: Mapping[int, Row],
        facts: Mapping[str, Any] = MappingProxyType({}),
        similarity: SimilarityMix | None = None,
    ) -> MatrixPlan:
        """A plan in which new rows that nothing makes are the mean of their old pieces, counted and named.

        Args:
            rows: those that the method could make.
            facts: what there is to say about how they were made; stands with the settings.
            similarity: others that it could make.
        """
        elsewhere = set() if similarity is None else set(similarity.rows.tolist())
        missing = [id for id in self.new_rows if id not in rows and id not in elsewhere]
        plan = self.plan({**rows, **{id: self.mean_of_pieces(id) for id in missing}}, (), similarity)
        method = {**plan.method, "fallback_rows": len(missing), **facts}
        return replace(plan, method=method, fallback=numbers(missing))


def numbers(values: Sequence[int]) -> Tensor:
    """Row numbers as int64."""
    return torch.tensor(values, dtype=torch.int64)
