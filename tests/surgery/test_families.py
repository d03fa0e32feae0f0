"""Surgery across families: a model of a SentencePiece vocabulary takes a byte-level one, and the reverse."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_cpt.surgery import SurgeryPlan, plan_surgery
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer, map_vocabularies, train_tokenizer
from megatron_cpt.tokenizer.byte_level import train_byte_level

LINES = [f"the river {number} runs past the quiet town, caf\u00e9 {number * 7} \u9759\u304b" for number in range(60)]


def _expected(
    old: Tokenizer, new: Tokenizer, id: int, rows: dict[bytes, torch.Tensor], table: torch.Tensor
) -> torch.Tensor:
    """By the bytes alone: the row of the same bytes, or the mean over the cut inside a text."""
    data = new.piece_bytes(id)
    if data is None:
        return table[{new.bos_id: old.bos_id, new.eos_id: old.eos_id}[id] or 0]
    if data in rows:
        return rows[data]
    return table[old.encode_bytes(data)].mean(0)


def test_rows_follow_the_bytes(tmp_path: Path) -> None:
    train_tokenizer(LINES, 330, tmp_path / "sentencepiece")
    train_byte_level(LINES, 320, tmp_path / "byte_level")
    both = [load_tokenizer(tmp_path / name) for name in ("sentencepiece", "byte_level")]
    for old, new in (both, both[::-1]):
        plan_surgery(map_vocabularies(old, new)).save(tmp_path / f"plan{new.vocab_size}")
        plan = SurgeryPlan.load(tmp_path / f"plan{new.vocab_size}")
        table = torch.randn(old.vocab_size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        rows = {}
        for id in sorted(range(old.vocab_size), key=lambda id: old.kind(id) != "byte"):  # text after bytes
            if (data := old.piece_bytes(id)) is not None:
                rows[data] = table[id]
        # Both name their specials; only the unknown token is alone, and takes the place of what it is spelt with.
        ids = [id for id in range(new.vocab_size) if id != new.unk_id]
        expected = torch.stack([_expected(old, new, id, rows, table) for id in ids])
        for matrix in (plan.embedding, plan.head):
            torch.testing.assert_close(matrix.mix.apply(table.float())[ids], expected.float())
        assert plan.facts()["rows"]["kept"] > 10
