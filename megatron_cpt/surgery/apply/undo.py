"""Give back the checkpoint that a surgery was applied to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.hf_tables import HFTables
from megatron_cpt.checkpoint.manifest import KIND, write_checkpoint_manifest
from megatron_cpt.checkpoint.opening import open_tables
from megatron_cpt.checkpoint.reader import raw_bytes
from megatron_cpt.checkpoint.tables import NewTable, Progress, Rows
from megatron_cpt.checkpoint.tokenizer_files import copy_tokenizer, tokenizer_sha256
from megatron_cpt.config.folders import check_apart, check_free, new_folder
from megatron_cpt.config.manifest import MANIFEST, read_manifest, write_json_atomic
from megatron_cpt.errors import CheckpointError, TokenizerError, VerificationError
from megatron_cpt.surgery.apply.finish import GENERATION, carry_documents
from megatron_cpt.surgery.apply.record import Restorer, check_made_by, read_lost
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.plan import SurgeryPlan


def undo_surgery(
    plan: SurgeryPlan,
    source: str | Path,
    destination: str | Path,
    tokenizer: str | Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint as it was before `apply_surgery`, bit for bit.

    Kept rows come from the new tables, the others from the record that lies in the checkpoint. Each table is
    hashed while it is written and compared with the hash of the old one.

    Args:
        plan: the plan that was applied.
        source: what `apply_surgery` wrote.
        destination: a new or empty folder; it appears when it is complete.
        tokenizer: folder or file of the old tokenizer, to go along; None: none goes along.
        on_progress: called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the source is not what this plan led to, or its record is gone.
        TokenizerError: the tokenizer is not the old one.
        VerificationError: the rows are no longer those of the surgery.
    """
    source, destination = Path(source), Path(destination)
    check_free(destination, CheckpointError)
    check_apart(source, destination, CheckpointError)
    record = _record(plan, source)
    if tokenizer is not None and tokenizer_sha256(Path(tokenizer)) != plan.old_sha256:
        raise TokenizerError(
            f"{tokenizer} is not the tokenizer that the plan starts from ({plan.old_sha256[:12]}): give that "
            "one, or none"
        )
    new = open_tables(source)
    tables = record["tables"]
    if {table.name for table in new.tables} != tables.keys():
        raise CheckpointError(f"{source} holds other tables than its record names; it was changed: bring back a copy")
    restored = {}
    for table in new.tables:
        matrix = plan.matrix("embedding" if new.tied else table.matrix)
        lost = read_lost(source, table.name, record["removed_sha256"])
        restored[table.name] = _Restored(matrix, lost, tables[table.name]["rows"])
    with new_folder(destination, CheckpointError) as folder:
        wanted = {name: NewTable(plan.old_size, made.num_rows, made.make) for name, made in restored.items()}
        written = new.rewrite(folder, wanted, on_progress)
        for name, made in restored.items():
            if made.digest.hexdigest() != tables[name]["sha256"]:
                raise VerificationError(
                    f"{source}: the old rows of {name} cannot be had of it, its rows were changed after the surgery; "
                    "take the old checkpoint itself"
                )
        if isinstance(new, HFTables):
            _finish_folder(folder, new, record)
        copy_tokenizer(None if tokenizer is None else Path(tokenizer), folder)
        if record["manifest"] is not None:
            write_json_atomic(folder / MANIFEST, record["manifest"])
        elif isinstance(new, HFTables):
            rows = max(made.num_rows for made in restored.values())
            stated = {"format": "hf", "weights_sha256": written["weights_sha256"]}
            write_checkpoint_manifest(folder, new.reader.llama, rows, rows, plan.old_sha256, {}, **stated)
    return {"source": str(source), "destination": str(destination), "format": new.format, **written}


class _Restored:
    """The rows of an old table, hashed as they are asked for, in ascending order."""

    def __init__(self, plan: MatrixPlan, lost: tuple[Tensor, Tensor] | None, num_rows: int) -> None:
        self.plan, self.lost, self.num_rows = plan, lost, num_rows
        self.digest = hashlib.sha256()

    def make(self, new: Tensor) -> Rows:
        """Rows from the new table."""
        restorer = Restorer(self.plan, new, self.lost)
        self.digest = hashlib.sha256()

        def rows(start: int, stop: int) -> Tensor:
            made = restorer.rows(start, stop)
            self.digest.update(raw_bytes(made))
            return made

        return rows


def _record(plan: SurgeryPlan, source: Path) -> dict[str, Any]:
    manifest = read_manifest(source / MANIFEST, KIND, CheckpointError)
    surgery = manifest.get("surgery")
    if not isinstance(surgery, dict) or "undo" not in surgery:
        raise CheckpointError(
            f"{source} holds no record of a surgery, or was trained since; undo is for what `surgery apply` wrote"
        )
    check_made_by(plan, surgery, source)
    record: dict[str, Any] = surgery["undo"]
    return record


def _finish_folder(folder: Path, new: HFTables, record: dict[str, Any]) -> None:
    carry_documents(new.folder, folder)
    if record["generation_config"] is not None:
        write_json_atomic(folder / GENERATION, record["generation_config"])
    write_json_atomic(folder / CONFIG, record["config"])
