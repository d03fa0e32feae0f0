"""Write a checkpoint whose vocabulary tables have the rows of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.opening import open_tables
from megatron_cpt.checkpoint.tables import NewTable, Progress, Rows, Table, VocabTables
from megatron_cpt.config.folders import check_apart, check_free, new_folder
from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.errors import CheckpointError, TokenizerError
from megatron_cpt.surgery.apply.finish import finish
from megatron_cpt.surgery.apply.record import examine, write_lost
from megatron_cpt.surgery.matrix import MatrixPlan, RowMaker
from megatron_cpt.surgery.plan import SurgeryPlan
from megatron_cpt.surgery.planned import check_one_table, check_starts_from
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

# More unused rows than any padding leaves (a multiple of 128 for 8 tensor-parallel ranks) look like another vocabulary.
_MOST_PADDING = 1024


def apply_surgery(
    plan: SurgeryPlan,
    source: str | Path,
    destination: str | Path,
    tokenizer_folder: str | Path,
    on_progress: Progress | None = None,
    *,
    divisor: int | None = None,
    with_optimizer: bool = True,
) -> dict[str, Any]:
    """Write a checkpoint whose embedding and head have the rows of a plan, in the format of the source.

    Only the files that hold a table are written; the others get a second name (a hard link), or are copied where
    the file system has none. The source is not touched. A tied model has one matrix and keeps one. Rows of the
    source beyond the old vocabulary's true size are padding: they are not used. In memory are one old table (all
    of them for `mp_rank`) and a few blocks of new rows.

    Of an optimizer's state (`torch_dist`), masters are made by the plan from the old masters; the moments of kept
    rows move along, those of new rows are zero.

    Args:
        plan: how the rows are made.
        source: a Hugging Face folder, a `torch_dist` folder, or a legacy folder of `mp_rank_*` files.
        destination: a new or empty folder; it appears when it is complete.
        tokenizer_folder: the new tokenizer, whose files go along to a Hugging Face folder.
        on_progress: called with (bytes done, bytes in all).
        divisor: the tables are padded with zero rows to a multiple of this. None: the checkpoint's own rule; that
            is no padding for Hugging Face, a recorded divisor or 128 for `torch_dist`, and for `mp_rank` that
            times the tensor-parallel size.
        with_optimizer: False leaves an optimizer's state behind.

    Returns:
        Facts: sizes, rows of each origin, padding rows left out, files written and carried, bytes and digest of the
        weights.

    Raises:
        CheckpointError: the source is damaged or holds NaN, the plan was made for another vocabulary, the methods
            differ while the model has one tied matrix, or the padded size does not divide by the tensor-parallel
            size.
        TokenizerError: `tokenizer_folder` is not the plan's new tokenizer.
    """
    source, destination, tokenizer_folder = Path(source), Path(destination), Path(tokenizer_folder)
    check_free(destination, CheckpointError)
    check_apart(source, destination, CheckpointError)
    old = open_tables(source, with_optimizer)
    tokenizer = _new_tokenizer(plan, tokenizer_folder)
    padding = _check_fits(plan, old)
    if old.tied:
        check_one_table(plan, old.folder)
    padded = _padded(plan, old, divisor)
    plans = {table.name: _plan_of(plan, old, table) for table in old.tables}
    lost, tables = examine(old, plans)
    with new_folder(destination, CheckpointError) as folder:
        new = {table.name: NewTable(plan.new_size, padded, _maker(plan, old, table)) for table in old.tables}
        written = old.rewrite(folder, new, on_progress)
        record = {"tables": tables, "removed_sha256": write_lost(folder, old, lost)}
        facts = {
            **plan.facts(),
            "plan_sha256": plan.sha256,
            "tied": old.tied,
            "padding_rows_left_out": padding,
            "padded_vocab_size": padded,
            "divisor": divisor or old.divisor,
            "optimizer": any(table.is_moment for table in old.tables),
        }
        finish(folder, old, plan, tokenizer, facts, record, written)
    return {"source": str(source), "destination": str(destination), "format": old.format, **facts, **written}


def _maker(plan: SurgeryPlan, old: VocabTables, table: Table) -> Callable[[Tensor], Rows]:
    """What makes the rows of a new table from the old one."""
    matrix = _plan_of(plan, old, table)
    weights = next((other for other in old.tables if other.name == table.masters_of), None)
    if weights is None:
        return partial(_rows, matrix)
    kept = torch.tensor(sorted(plan.kept("embedding" if old.tied else table.matrix)), dtype=torch.long)

    def make(masters: Tensor) -> Rows:
        """New rows as the weights have them, for a weight is its master rounded; kept ones as they are."""
        made, rounded = _rows(matrix, masters), _rows(matrix, old.read(weights))

        def rows(start: int, stop: int) -> Tensor:
            inside = kept[(kept >= start) & (kept < stop)] - start
            block = rounded(start, stop).to(masters.dtype)
            block[inside] = made(start, stop)[inside]
            return block

        return rows

    return make


def _rows(matrix: MatrixPlan, old: Tensor) -> Rows:
    """Rows of a new table; those beyond the vocabulary are zero."""
    maker = RowMaker(matrix, old)

    def rows(start: int, stop: int) -> Tensor:
        made = maker.rows(min(start, maker.num_rows), min(stop, maker.num_rows))
        missing = stop - start - len(made)
        return torch.cat([made, made.new_zeros(missing, made.shape[1])]) if missing else made

    return rows


def _plan_of(plan: SurgeryPlan, old: VocabTables, table: Table) -> MatrixPlan:
    matrix = plan.matrix("embedding" if old.tied else table.matrix)
    return matrix.kept_only() if table.is_moment else matrix


def _padded(plan: SurgeryPlan, old: VocabTables, divisor: int | None) -> int:
    divisor = old.divisor if divisor is None else divisor
    padded = padded_vocab_size(plan.new_size, divisor)
    if padded % old.tensor_parallel:
        raise CheckpointError(
            f"the new vocabulary has {padded} rows with --divisor {divisor}, which {old.tensor_parallel} "
            f"tensor-parallel ranks cannot share evenly: give --divisor {math.lcm(divisor, old.tensor_parallel)}"
        )
    return padded


def _new_tokenizer(plan: SurgeryPlan, folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.sha256 != plan.new_sha256:
        raise TokenizerError(
            f"{folder} is not the tokenizer the plan was made for (got {tokenizer.sha256[:12]}, {tokenizer.vocab_size} "
            f"ids; expected {plan.new_sha256[:12]}, {plan.new_size} ids): give the right folder or plan again"
        )
    return tokenizer


def _check_fits(plan: SurgeryPlan, old: VocabTables) -> int:
    """Check that the plan's old vocabulary is the checkpoint's; returns the number of padding rows."""
    recorded = check_starts_from(plan, old.folder)
    rows = {table.num_rows for table in old.tables}
    fewest = min(rows)
    padding = fewest - plan.old_size
    wrong = old.vocab_size not in (None, plan.old_size) or len(rows) > 1
    if wrong or padding < 0 or (recorded is None and padding >= _MOST_PADDING):
        stated = "" if old.vocab_size is None else f" and a vocabulary of {old.vocab_size}"
        raise CheckpointError(
            f"the embedding of {old.folder} has {fewest} rows{stated}, the plan starts from a vocabulary of "
            f"{plan.old_size}: plan again with this model's tokenizer"
        )
    return padding
