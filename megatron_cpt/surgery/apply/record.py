"""What a surgery leaves behind so that it can be undone: the rows that no row of the new tables repeats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_cpt.checkpoint.files import new_tensor
from megatron_cpt.checkpoint.hf_writer import Entry, write_shard
from megatron_cpt.checkpoint.reader import WeightsDigest, bits, raw_bytes
from megatron_cpt.checkpoint.tables import Table, VocabTables
from megatron_cpt.config.manifest import sha256_bytes, sha256_file
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.plan import SurgeryPlan

# In a folder of its own: some loaders take every *.safetensors beside config.json for weights.
RECORD = "surgery"
REMOVED = "removed_rows.safetensors"
_IDS, _ROWS = ".ids", ".rows"


def carried_rows(plan: MatrixPlan) -> tuple[Tensor, Tensor]:
    """(new row numbers, old row numbers) of the rows that a plan carries over bit for bit, ascending old rows.

    Of several new rows that repeat an old one, the first.
    """
    copied = plan.mix.copied()
    copied[plan.new_rows] = False
    new_rows = copied.nonzero().flatten()
    old_rows = plan.mix.indices[plan.mix.indptr[new_rows]]
    first = torch.full((plan.mix.num_old_rows,), plan.mix.num_new_rows, dtype=torch.int64)
    first.scatter_reduce_(0, old_rows, new_rows, "amin")
    found = (first < plan.mix.num_new_rows).nonzero().flatten()
    return first[found], found


def check_made_by(plan: SurgeryPlan, surgery: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where a manifest's `surgery` says that a folder was made by another plan."""
    if surgery.get("plan_sha256") != plan.sha256:
        raise CheckpointError(
            f"{folder} was made by another plan (got {plan.sha256[:12]}, expected "
            f"{str(surgery.get('plan_sha256'))[:12]}); give the one that `surgery apply` was given"
        )


def examine(source: VocabTables, plans: Mapping[str, MatrixPlan]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read every table once, before anything is written.

    Args:
        source: the checkpoint.
        plans: of each table by name.

    Returns:
        numbers of the rows of each table that no new row repeats (padding that is all zero is not among them), and
        for the manifest each table's number of rows and the hash of its bytes.

    Raises:
        CheckpointError: a row that may be used holds NaN or infinity.
    """
    lost, tables = {}, {}
    with ThreadPoolExecutor(1) as beside:
        for table in source.tables:
            plan, old = plans[table.name], source.read(table)
            plan.mix.check_table(old)
            sha256 = beside.submit(sha256_bytes, raw_bytes(old))
            _check_finite(source, table, old[: plan.mix.num_old_rows])
            missing = torch.ones(len(old), dtype=torch.bool)
            missing[carried_rows(plan)[1]] = False
            missing[plan.mix.num_old_rows :] = (bits(old[plan.mix.num_old_rows :]) != 0).any(1)
            lost[table.name] = missing.nonzero().flatten()
            tables[table.name] = {"rows": len(old), "sha256": sha256.result()}
    return lost, tables


def _check_finite(source: VocabTables, table: Table, old: Tensor) -> None:
    # Both pass a NaN on; `isfinite` of every element takes ten times as long.
    bad = (~(old.amax(1).isfinite() & old.amin(1).isfinite())).nonzero().flatten()
    if len(bad):
        raise CheckpointError(
            f"{source.folder}: {len(bad)} of {len(old)} rows of {table.name} hold NaN or infinity, the first that "
            f"of id {int(bad[0])}; rows would be made of them: get a sound copy, or mend these rows"
        )


def write_lost(folder: Path, source: VocabTables, lost: Mapping[str, Tensor]) -> str | None:
    """Write the lost rows of all tables to `surgery/` in a new checkpoint; returns the file's hash, None: no rows."""
    if not any(len(ids) for ids in lost.values()):
        return None
    entries: list[Entry] = []
    for table in source.tables:
        ids = lost[table.name]
        entries.append((table.name + _IDS, (len(ids),), torch.int64, partial(torch.clone, ids)))
        rows = partial(_selected, source, table, ids)
        entries.append((table.name + _ROWS, (len(ids), table.width), table.dtype, rows))
    (folder / RECORD).mkdir()
    path = folder / RECORD / REMOVED
    for _ in write_shard(path, entries, WeightsDigest(())):
        pass
    return sha256_file(path)


def _selected(source: VocabTables, table: Table, ids: Tensor) -> Iterator[Tensor]:
    old = source.read(table)
    return (old[block] for block in ids.split(1024)) if len(ids) else iter(())


class Restorer:
    """Makes the rows of an old table from the new one and the lost rows.

    Args:
        plan: the plan that was applied.
        new_WD: the new table.
        lost: numbers of the lost rows, ascending, and the rows; None: nothing was lost.
    """

    def __init__(self, plan: MatrixPlan, new_WD: Tensor, lost: tuple[Tensor, Tensor] | None) -> None:
        self._new_WD = new_WD
        self._new_rows, self._old_rows = carried_rows(plan)
        self._ids, self._lost_RD = lost if lost is not None else (torch.empty(0, dtype=torch.int64), new_WD[:0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Old rows [start, stop); padding that was zero is zero."""
        made = new_tensor((stop - start, self._new_WD.shape[1]), self._new_WD.dtype)
        span = torch.tensor([start, stop])
        first, last = torch.searchsorted(self._old_rows, span).tolist()
        made[self._old_rows[first:last] - start] = self._new_WD[self._new_rows[first:last]]
        first, last = torch.searchsorted(self._ids, span).tolist()
        made[self._ids[first:last] - start] = self._lost_RD[first:last]
        return made


def read_lost(folder: Path, name: str, sha256: str | None) -> tuple[Tensor, Tensor] | None:
    """(ids, rows) that a table lost; None where nothing was. Raises CheckpointError where the file is not the one."""
    if sha256 is None:
        return None
    path = folder / RECORD / REMOVED
    if not path.is_file() or sha256_file(path) != sha256:
        raise CheckpointError(
            f"{path} is missing or was changed, and the rows that surgery removed are only there; bring it back"
        )
    try:
        with safe_open(path, "pt") as held:
            return held.get_tensor(name + _IDS), held.get_tensor(name + _ROWS)
    except SafetensorError as caught:
        raise CheckpointError(
            f"{path} does not hold the rows of {name} ({caught}); bring the right file back"
        ) from None
