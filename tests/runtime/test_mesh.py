"""The world is read as torchrun and Slurm describe it, and a layout that it cannot hold is refused."""

from __future__ import annotations

import pytest

from megatron_cpt.errors import ConfigError
from megatron_cpt.runtime.mesh import World, start_mesh, world_from_environment

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def environment(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_alone() -> None:
    assert world_from_environment() is None


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK=11, WORLD_SIZE=16, LOCAL_RANK=3)
    assert world_from_environment() == World(rank=11, size=16, local_rank=3)


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_PROCID=5, SLURM_NTASKS=8, SLURM_LOCALID=1, MASTER_ADDR="node7")
    assert world_from_environment() == World(rank=5, size=8, local_rank=1)


def test_torchrun_inside_slurm_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=2, RANK=9, WORLD_SIZE=16, LOCAL_RANK=1)
    assert world_from_environment() == World(rank=9, size=16, local_rank=1)


def test_one_slurm_task_or_an_allocation_without_a_task_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=1)
    assert world_from_environment() is None
    monkeypatch.delenv("SLURM_PROCID")
    environment(monkeypatch, SLURM_NTASKS=8)
    assert world_from_environment() is None


def test_slurm_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=2)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set; export it in the batch script: MASTER_ADDR="):
        world_from_environment()


def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="first", WORLD_SIZE=2)
    with pytest.raises(ConfigError, match="the variable RANK is 'first', expected a number"):
        world_from_environment()


@pytest.mark.parametrize(("size", "tensor", "pipeline", "enough"), [(3, 2, 1, 2), (1, 2, 2, 4), (6, 2, 2, 4)])
def test_a_world_that_cannot_hold_the_layout(
    size: int, tensor: int, pipeline: int, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, RANK=0, WORLD_SIZE=size)
    wanted = f"{size} processes cannot hold TP {tensor} x PP {pipeline}.* start {enough} processes"
    with pytest.raises(ConfigError, match=wanted), start_mesh(tensor, pipeline):
        pass
