"""Orthogonal matching pursuit: a donor says of which pieces a new one is the sum, the base gives their rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.checkpoint import EMBEDDING, HEAD, open_hf
from megatron_cpt.config.surgery import OmpMethod
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods.rows import Task, numbers
from megatron_cpt.surgery.methods.similarity import unit
from megatron_cpt.surgery.row_mix import Row
from megatron_cpt.surgery.threads import in_blocks
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

_BLOCK_ELEMENTS = 1 << 23  # numbers that a thread holds of each kind: correlations, bases, atoms in float64
_FINISHED = 1e-5  # of a target's length: what is left is rounding
_DEPENDENT = 1e-3  # of an atom's length: what it adds to those chosen before


def omp(task: Task, method: OmpMethod) -> MatrixPlan:
    """row(v) = sum over u of c_u * old_row(u), where the donor's row of v is about the sum of c_u * donor_row(u).

    The u are up to `num_atoms` pieces that the old vocabulary and the donor have in common, by their bytes, found
    one by one, c by least squares. The embedding is made by the donor's input rows, the head by its head rows (a
    tied donor's are the same). New pieces that the donor does not have are the mean of their old pieces.

    Source: Goddard and Fernandes Neto 2025 (arXiv 2506.06607); the pursuit: Pati, Rezaiifar and Krishnaprasad 1993.
    Deviates: the next atom is the one of the largest cosine with what is left, not of the largest product, which
    prefers long rows; pieces are matched by bytes, so that vocabularies of different families share all they have.

    Raises:
        CheckpointError: donor and old vocabulary share no piece, or the donor's tokenizer has ids without rows.
    """
    donor = Path(method.donor)
    reader, tokenizer = open_hf(donor), load_tokenizer(donor)
    if reader.vocab_size < tokenizer.vocab_size:
        raise CheckpointError(
            f"the donor {donor} has {reader.vocab_size} rows and a tokenizer of {tokenizer.vocab_size} ids: name the "
            "folder of a model with its own tokenizer"
        )
    ids = _by_bytes(tokenizer)
    atoms = [(ids[data], old) for data, old in _by_bytes(task.inputs.old).items() if data in ids]
    if not atoms:
        raise CheckpointError(
            f"the donor {donor} and the old vocabulary share no piece: name a donor that shares some with both"
        )
    spelt = ((id, task.inputs.new.piece_bytes(id)) for id in task.new_rows)
    targets = [(id, ids[data]) for id, data in spelt if data is not None and data in ids]
    name = HEAD if task.matrix == 1 and not reader.llama.tied_embeddings else EMBEDDING
    rows = reader.read_rows(name, 0, tokenizer.vocab_size)
    atoms_OD = rows[numbers([donor_id for donor_id, _ in atoms])].float()
    targets_TD = rows[numbers([donor_id for _, donor_id in targets])].float()
    sources = numbers([old for _, old in atoms]).numpy()
    found = matching_pursuit(targets_TD, atoms_OD, method.num_atoms)
    made: dict[int, Row] = {
        id: (sources[places], weights) for (id, _), (places, weights) in zip(targets, found, strict=True)
    }
    return task.plan_or_fall_back(made, {"atoms": len(atoms)})


def matching_pursuit(targets_TD: Tensor, atoms_OD: Tensor, num_atoms: int) -> Iterator[Row]:
    """Each target as a sum of few atoms.

    Greedy: the atom whose cosine with what is left is largest, then what is left of the target beside all
    atoms chosen so far. It ends after `num_atoms`, or when nothing is left, or when the next atom is nearly a
    sum of those chosen. The coefficients are those of least squares, in float64. An atom of zeros is never
    chosen.

    Cost: 2 * T * O * D operations for each atom that is looked for.

    Args:
        targets_TD: float32.
        atoms_OD: float32.
        num_atoms: at most so many for each target.

    Yields:
        (places of the atoms in the order they were chosen, coefficients), in the order of the targets.

    Raises:
        CheckpointError: a row is not finite.
    """
    unit(targets_TD)  # for the check, before there are directions to hold beside it
    directions_OD = unit(atoms_OD)
    lengths = torch.cat([block_BD.double().norm(dim=1) for block_BD in atoms_OD.split(1024)])
    steps = min(num_atoms, *atoms_OD.shape)

    def block(targets_BD: Tensor) -> list[Row]:
        chosen, counts = _chosen(targets_BD, directions_OD, steps)
        weights = _least_squares(targets_BD, directions_OD, chosen, counts) / lengths[chosen].clamp(min=1e-30)
        places, shares = chosen.numpy(), weights.float().numpy()
        return [(places[row, :count], shares[row, :count]) for row, count in enumerate(counts.tolist())]

    size = max(1, _BLOCK_ELEMENTS // max(len(atoms_OD), steps * atoms_OD.shape[1]))
    for rows in in_blocks(block, targets_TD.split(size)):
        yield from rows


def _chosen(targets_BD: Tensor, directions_OD: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Places of the atoms for each target in order, and how many of them count."""
    left_BD = targets_BD.clone()
    chosen = torch.zeros(len(targets_BD), steps, dtype=torch.int64)
    counts = torch.zeros(len(targets_BD), dtype=torch.int64)
    basis = torch.zeros(len(targets_BD), steps, targets_BD.shape[1])
    enough = _FINISHED * targets_BD.norm(dim=1)
    going = torch.ones(len(targets_BD), dtype=torch.bool)
    for step in range(steps):
        going &= left_BD.norm(dim=1) > enough
        if not bool(going.any()):
            break
        cosines = (left_BD @ directions_OD.T).abs_()
        cosines.scatter_(1, chosen[:, :step], -1.0)
        best = cosines.argmax(1)
        added = directions_OD[best]
        for _ in range(2):  # once more, against what rounding leaves
            known = basis[:, :step]
            added = added - torch.bmm(torch.bmm(added[:, None], known.mT), known)[:, 0]
        length = added.norm(dim=1, keepdim=True)
        going &= length.flatten() > _DEPENDENT
        added = torch.where(going[:, None], added / length.clamp(min=1e-30), 0.0)
        basis[:, step], chosen[:, step] = added, best
        left_BD -= (left_BD * added).sum(1, keepdim=True) * added
        counts += going
    return chosen, counts


def _least_squares(targets_BD: Tensor, directions_OD: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
    """Coefficients of the chosen unit atoms, float64; 0 beyond the count."""
    used = (torch.arange(chosen.shape[1]) < counts[:, None]).double()
    atoms = directions_OD[chosen].double() * used[..., None]
    gram = torch.bmm(atoms, atoms.mT) + torch.diag_embed(1.0 - used)
    products = torch.bmm(atoms, targets_BD.double()[..., None])
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(products, factor)[..., 0]


def _by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Ids of the text pieces by their bytes; the first, where two have the same."""
    found: dict[bytes, int] = {}
    for id in range(tokenizer.vocab_size):
        data = tokenizer.piece_bytes(id) if tokenizer.kind(id) == "text" else None
        if data is not None:
            found.setdefault(data, id)
    return found
