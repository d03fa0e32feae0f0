"""How one vocabulary matrix is remade: a mix of old rows, and what is not a short sum of them.

Every row is made on its own, whichever rows are asked for: products of matrices are computed in blocks
that begin at multiples of BLOCK_ROWS, so a tensor-parallel shard is exactly its slice of the whole, and no
product is shared by threads, so their number does not matter either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_cpt.errors import InputError
from megatron_cpt.surgery.random_rows import normal_rows
from megatron_cpt.surgery.row_mix import RowMix
from megatron_cpt.surgery.threads import by_one_thread, in_blocks

BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 512  # of a product that threads make side by side
_ADJUSTMENT = {
    "offset": "offset_D",
    "features": "features_NF",
    "directions": "directions_FD",
    "down": "down_DR",
    "up": "up_RD",
}
_JITTER = 1e-6  # of the mean variance, on the diagonal: tables of fewer rows than columns have no full rank
FillKind = Literal["mean", "normal", "covariance"]
Rule = Literal["clamped", "signed"]


@dataclass(frozen=True, eq=False)
class Fill:
    """Rows made from what all old rows have in common.

    Attributes:
        rows: new row numbers, int64, ascending.
        kind: "mean" of all old rows; "normal": N(0, std); "covariance": N(mean, covariance of the old rows).
        std: standard deviation of "normal".
        seed: of the random kinds; each row draws from (seed, matrix, its number).
        matrix: 0 for the embedding, 1 for the head.
    """

    rows: Tensor
    kind: FillKind
    std: float = 0.0
    seed: int = 0
    matrix: int = 0


@dataclass(frozen=True, eq=False)
class SimilarityMix:
    """Rows that draw on every one of many old rows, by the cosine of two vectors.

    row(v) = sum over u of w(v, u) * old_row(u), where w(v, u) = f(cos(v, u)) / sum over u' of f(cos(v, u')).
    The weights are never held: they are made for a block of rows, used and dropped.

    Attributes:
        rows: the new row numbers, int64, ascending (R of them).
        old_rows: the old rows drawn on, int64 (O of them).
        new_vectors_RE: unit vectors of the new rows, float32.
        old_vectors_OE: unit vectors of the old rows, float32.
        rule: f: "clamped" max(0, cos), "signed" cos itself.
    """

    rows: Tensor
    old_rows: Tensor
    new_vectors_RE: Tensor
    old_vectors_OE: Tensor
    rule: Rule

    def weights(self, new_BE: Tensor, old_BE: Tensor) -> Tensor:
        """f of the cosines of some unit vectors: what the sums are taken by, before they are divided."""
        cosines = new_BE @ old_BE.T
        return cosines.clamp(min=0) if self.rule == "clamped" else cosines


@dataclass(frozen=True, eq=False)
class Adjustment:
    """A few numbers for all rows of new pieces together, which calibration finds.

    row(v) <- (1 + scale) * row(v) + offset + features(v) @ directions + (row(v) @ down) @ up

    All float32; F and R may be 0.

    Attributes:
        scale: one number.
        offset_D: added to every new row.
        features_NF: F numbers for each row of `MatrixPlan.new_rows`: what text says of its piece.
        directions_FD: what each feature is a multiple of.
        down_DR: first factor of a map of low rank R.
        up_RD: its second factor.
    """

    scale: float
    offset_D: Tensor
    features_NF: Tensor
    directions_FD: Tensor
    down_DR: Tensor
    up_RD: Tensor

    def apply(self, rows_BD: Tensor, places: Tensor) -> Tensor:
        """Adjust fp32 rows, which stand at `places` among the new rows."""
        device = rows_BD.device
        offset, directions, down, up = (
            part.to(device) for part in (self.offset_D, self.directions_FD, self.down_DR, self.up_RD)
        )
        told = self.features_NF[places].to(device) @ directions
        return rows_BD * (1.0 + self.scale) + offset + told + (rows_BD @ down) @ up


@dataclass(frozen=True, eq=False)
class MatrixPlan:
    """How all rows of one matrix are made; a row is in at most one of `mix`, `similarity` and `fills`.

    Attributes:
        mix: short sums and copies; the rows that others make are empty in it.
        new_rows: numbers of the rows that stand for new pieces, int64: those that `match_norm` and
            `adjustment` are for.
        method: the settings it was made by, as JSON.
        fills: rows made from all old rows' mean or spread.
        similarity: rows made from many old rows.
        match_norm: new rows are scaled to the mean norm of the old rows.
        adjustment: applied to new rows at the end.
        fallback: those of the new rows, int64, ascending, that the method could not make, so that they are the
            mean of old pieces; None where that cannot happen.
    """

    mix: RowMix
    new_rows: Tensor
    method: Mapping[str, Any]
    fills: tuple[Fill, ...] = ()
    similarity: SimilarityMix | None = None
    match_norm: bool = False
    adjustment: Adjustment | None = None
    fallback: Tensor | None = None

    def kept_only(self) -> MatrixPlan:
        """The plan for what accompanies the matrix in an optimizer: kept rows move along, new ones are zero."""
        kept = torch.ones(self.mix.num_new_rows, dtype=torch.bool)
        kept[self.new_rows] = False
        return MatrixPlan(self.mix.only(kept & self.mix.copied()), self.new_rows, {"method": "zero"})

    def describe(self, new_row: int) -> dict[str, Any]:
        """What one row is made of."""
        for fill in self.fills:
            if bool((fill.rows == new_row).any()):
                return {"drawn": fill.kind, "seed": fill.seed} if fill.kind != "mean" else {"drawn": "global mean"}
        if self.similarity is not None and bool((self.similarity.rows == new_row).any()):
            return {"similarity": self.similarity.rule, "old_rows": len(self.similarity.old_rows)}
        old_ids, weights = self.mix.row(new_row)
        fell_back = self.fallback is not None and bool((self.fallback == new_row).any())
        return {"old_ids": old_ids, "weights": weights} | ({"fallback": "mean of pieces"} if fell_back else {})

    def tensors(self) -> dict[str, Tensor]:
        """Everything but `method`, as named tensors."""
        found = {"indptr": self.mix.indptr, "indices": self.mix.indices, "weights": self.mix.weights}
        found |= {"new_rows": self.new_rows}
        for number, fill in enumerate(self.fills):
            kind = get_args(FillKind).index(fill.kind)
            found[f"fill{number}.rows"] = fill.rows
            found[f"fill{number}.facts"] = torch.tensor([kind, fill.seed, fill.matrix], dtype=torch.int64)
            found[f"fill{number}.std"] = torch.tensor([fill.std], dtype=torch.float64)
        if self.similarity is not None:
            made = self.similarity
            found |= {"similarity.rows": made.rows, "similarity.old_rows": made.old_rows}
            found |= {"similarity.new_vectors": made.new_vectors_RE, "similarity.old_vectors": made.old_vectors_OE}
            found["similarity.rule"] = torch.tensor([get_args(Rule).index(made.rule)], dtype=torch.int64)
        if self.fallback is not None:
            found["fallback"] = self.fallback
        if self.adjustment is not None:
            last = self.adjustment
            found["adjustment.scale"] = torch.tensor([last.scale], dtype=torch.float64)
            found |= {f"adjustment.{part}": getattr(last, name) for part, name in _ADJUSTMENT.items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], old_size: int, method: Mapping[str, Any]) -> MatrixPlan:
        """What `tensors` gave, and the settings.

        Raises:
            InputError: the tensors do not make a plan.
        """
        mix = RowMix(old_size, *(tensors[part] for part in ("indptr", "indices", "weights")))
        fills: list[Fill] = []
        while f"fill{len(fills)}.rows" in tensors:
            kind, seed, matrix = tensors[f"fill{len(fills)}.facts"].tolist()
            std = float(tensors[f"fill{len(fills)}.std"])
            fills.append(Fill(tensors[f"fill{len(fills)}.rows"], get_args(FillKind)[kind], std, seed, matrix))
        similarity = adjustment = None
        if "similarity.rows" in tensors:
            names = ("rows", "old_rows", "new_vectors", "old_vectors")
            rows, old_rows, new, old = (tensors[f"similarity.{name}"] for name in names)
            similarity = SimilarityMix(rows, old_rows, new, old, get_args(Rule)[int(tensors["similarity.rule"])])
        if "adjustment.scale" in tensors:
            numbers = {name: tensors[f"adjustment.{part}"] for part, name in _ADJUSTMENT.items()}
            adjustment = Adjustment(float(tensors["adjustment.scale"]), **numbers)
        match_norm = bool(method.get("match_norm", False))
        fallback = tensors.get("fallback")
        plan = cls(mix, tensors["new_rows"], method, tuple(fills), similarity, match_norm, adjustment, fallback)
        plan.check()
        return plan

    def check(self) -> None:
        """Raise InputError where row numbers are out of range or shapes do not fit each other."""
        made = self.similarity
        made_rows = [self.new_rows, *(fill.rows for fill in self.fills), *([] if made is None else [made.rows])]
        sound = all(rows.dtype == torch.int64 and rows.ndim == 1 for rows in made_rows) and all(
            bool(((rows >= 0) & (rows < self.mix.num_new_rows)).all() and (rows.diff() > 0).all()) for rows in made_rows
        )
        others = torch.cat(made_rows[1:]) if len(made_rows) > 1 else torch.empty(0, dtype=torch.int64)
        sound = sound and len(others.unique()) == len(others) and not bool(self.mix.indptr.diff()[others].any())
        if made is not None:
            sound = sound and (made.new_vectors_RE.shape[0], made.old_vectors_OE.shape[0]) == (
                len(made.rows),
                len(made.old_rows),
            )
            sound = sound and bool(((made.old_rows >= 0) & (made.old_rows < self.mix.num_old_rows)).all())
        if self.adjustment is not None:
            last = self.adjustment
            width, rank = last.down_DR.shape
            features = len(last.directions_FD)
            sound = sound and last.offset_D.shape == (width,) and last.directions_FD.shape == (features, width)
            sound = sound and last.up_RD.shape == (rank, width) and len(last.features_NF) == len(self.new_rows)
            sound = sound and last.features_NF.shape[1] == features
        if not sound:
            raise InputError("a plan's rows are out of range, made twice, or of shapes that do not fit; make it again")


@dataclass
class RowMaker:
    """Makes the rows of a matrix by its plan from the old table, which stays where it is.

    Args:
        plan: how.
        old_VD: the old table, any floating dtype and device; rows from the old true size on are never used.

    Raises:
        CheckpointError: the table has fewer rows than the plan draws from.
    """

    plan: MatrixPlan
    old_VD: Tensor
    _block: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.plan.mix.check_table(self.old_VD)
        adjustment = self.plan.adjustment
        if adjustment is not None and adjustment.offset_D.shape[0] != self.old_VD.shape[1]:
            raise InputError(
                f"the plan was calibrated on a model of width {adjustment.offset_D.shape[0]}, this one has "
                f"{self.old_VD.shape[1]}: plan for this model"
            )

    @property
    def num_rows(self) -> int:
        """W, the number of rows the plan makes."""
        return self.plan.mix.num_new_rows

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), of the old table's dtype and on its device; copies keep every bit.

        What is returned may be kept for the next call: do not change it in place.
        """
        parts = []
        for first in range(start // BLOCK_ROWS * BLOCK_ROWS, min(stop, self.num_rows), BLOCK_ROWS):
            if self._block is None or self._block[0] != first:
                self._block = (first, self._made(first, min(first + BLOCK_ROWS, self.num_rows)))
            parts.append(self._block[1][max(0, start - first) : max(0, stop - first)])
        return parts[0] if len(parts) == 1 else torch.cat([self.old_VD[:0], *parts])

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, BLOCK_ROWS at a time."""
        for start in range(0, self.num_rows, BLOCK_ROWS):
            yield self.rows(start, min(start + BLOCK_ROWS, self.num_rows))

    def _made(self, start: int, stop: int) -> Tensor:
        plan, device = self.plan, self.old_VD.device
        finished = plan.mix.apply(self.old_VD, slice(start, stop))
        if not (plan.fills or plan.similarity is not None or plan.match_norm or plan.adjustment is not None):
            return finished
        wide = finished.float()
        touched = torch.zeros(stop - start, dtype=torch.bool)
        for rows, made in self._wide_parts(start, stop):
            wide[(rows - start).to(device)] = made
            touched[rows - start] = True
        new = _inside(plan.new_rows, start, stop) - start
        if len(new) and (plan.match_norm or plan.adjustment is not None):
            touched[new] = True
            wide[new.to(device)] = self._polished(self._sums(wide, new, start), new + start)
        touched = touched.to(device)
        finished[touched] = wide[touched].to(finished.dtype)
        return finished

    def _sums(self, wide: Tensor, new: Tensor, start: int) -> Tensor:
        """New rows in fp32, before they were rounded to the table's dtype."""
        summed = self.plan.mix.indptr.diff()[new + start] > 0
        rows = wide[new.to(wide.device)]
        if bool(summed.any()):
            rows[summed.to(wide.device)] = self.plan.mix.mixed(self.old_VD, new[summed] + start)
        return rows

    def _wide_parts(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(row numbers, fp32 rows) of fills and similarities inside [start, stop)."""
        for fill in self.plan.fills:
            rows = _inside(fill.rows, start, stop)
            if len(rows):
                yield rows, self._filled(fill, rows)
        similarity = self.plan.similarity
        if similarity is not None:
            rows = _inside(similarity.rows, start, stop)
            if len(rows):
                yield rows, self._similar(similarity, torch.searchsorted(similarity.rows, rows))

    def _filled(self, fill: Fill, rows: Tensor) -> Tensor:
        width, device = self.old_VD.shape[1], self.old_VD.device
        if fill.kind == "mean":
            return self._mean.float().expand(len(rows), width)
        drawn = normal_rows(fill.seed, fill.matrix, rows.tolist(), width).to(device)
        if fill.kind == "normal":
            return drawn * fill.std
        spread = self._spread.split(_BLOCK_COLUMNS)
        return self._mean.float() + torch.cat(list(in_blocks(lambda rows: drawn @ rows.T, spread)), dim=1)

    def _similar(self, made: SimilarityMix, places: Tensor) -> Tensor:
        device = self.old_VD.device
        vectors_BE = made.new_vectors_RE[places].to(device)
        total = torch.zeros(len(places), self.old_VD.shape[1], device=device)
        weight_sum = torch.zeros(len(places), 1, device=device)

        def part(span: slice) -> tuple[Tensor, Tensor]:
            weights = made.weights(vectors_BE, made.old_vectors_OE[span].to(device))
            rows = self.old_VD.index_select(0, made.old_rows[span].to(device)).float()
            return weights @ rows, weights.sum(1, keepdim=True)

        step = 4 * BLOCK_ROWS
        spans = (slice(first, first + step) for first in range(0, len(made.old_rows), step))
        for rows, sums in in_blocks(part, spans):
            total += rows
            weight_sum += sums
        lost = made.rows[places[(weight_sum == 0).flatten().cpu()]].tolist()
        if lost:
            raise InputError(f"rows {lost[:5]} of the plan are like no old row (weights sum to 0): make the plan again")
        return total / weight_sum

    def _polished(self, rows_BD: Tensor, new_rows: Tensor) -> Tensor:
        with by_one_thread():
            if self.plan.match_norm:
                norm = rows_BD.norm(dim=1, keepdim=True)
                rows_BD = torch.where(norm > 0, rows_BD * (self._norm / norm), rows_BD)
            if self.plan.adjustment is None:
                return rows_BD
            return self.plan.adjustment.apply(rows_BD, torch.searchsorted(self.plan.new_rows, new_rows))

    def _old_blocks(self) -> Iterator[Tensor]:
        """The old rows in fp32, without padding."""
        size = self.plan.mix.num_old_rows
        for first in range(0, size, BLOCK_ROWS):
            yield self.old_VD[first : min(first + BLOCK_ROWS, size)].float()

    @cached_property
    def _mean(self) -> Tensor:
        """Mean of the old rows, float64."""
        with by_one_thread():
            sums = torch.stack([block.sum(0, dtype=torch.float64) for block in self._old_blocks()])
            return sums.sum(0) / self.plan.mix.num_old_rows

    @cached_property
    def _norm(self) -> float:
        """Mean norm of the old rows."""
        norms = (float(block.norm(dim=1).sum(dtype=torch.float64)) for block in self._old_blocks())
        return sum(norms) / self.plan.mix.num_old_rows

    @cached_property
    def _spread(self) -> Tensor:
        """L with L @ L.T the covariance of the old rows (Hewitt 2021), float32."""
        width, mean = self.old_VD.shape[1], self._mean.float()

        def columns(span: slice) -> Tensor:
            total = torch.zeros(width, len(range(width)[span]), dtype=torch.float64, device=mean.device)
            for block in self._old_blocks():
                total += (block - mean).T @ (block - mean)[:, span]
            return total

        spans = (slice(first, first + _BLOCK_COLUMNS) for first in range(0, width, _BLOCK_COLUMNS))
        product = torch.cat(list(in_blocks(columns, spans)), dim=1) / self.plan.mix.num_old_rows
        product.diagonal().add_(_JITTER * product.diagonal().mean() + 1e-30)
        (factor,) = in_blocks(torch.linalg.cholesky, [product])
        return factor.float()


def _inside(rows: Tensor, start: int, stop: int) -> Tensor:
    """Those of the ascending row numbers that lie in [start, stop)."""
    first, last = torch.searchsorted(rows, torch.tensor([start, stop]))
    return rows[first:last]
