"""The mesh: which rank holds which part of the model and of the data.

`start_mesh` reads the world from torchrun's or Slurm's variables, opens the process groups through
megatron-core, and returns the plain numbers that everything else works with.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from megatron_cpt.errors import ConfigError
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import install_engine, parallel_state


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Mesh:
    """Coordinates of this rank in the TP x PP x DP mesh, and the groups that collectives use."""

    world: World
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    virtual_size: int | None
    data_size: int
    data_rank: int
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    @property
    def layout(self) -> str:
        """The layout in short, for people: "TP2 x PP2 x DP1"."""
        virtual = f" x VPP{self.virtual_size}" if self.virtual_size else ""
        return f"TP{self.tensor_size} x PP{self.pipeline_size}{virtual} x DP{self.data_size}"


def world_from_environment() -> World | None:
    """The world that torchrun's, else Slurm's variables describe; None when nobody started this process as a rank.

    Under Slurm without torchrun the rendezvous address must be exported by the batch script
    (`MASTER_ADDR`, `MASTER_PORT`).

    Raises:
        ConfigError: Slurm started several tasks and there is no address, or a variable is no number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return World(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK"))
    if "SLURM_PROCID" in env and _number("SLURM_NTASKS") > 1:
        if "MASTER_ADDR" not in env:
            raise ConfigError(
                "started by Slurm with several tasks but MASTER_ADDR is not set; export it in the batch script: "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n1)"
            )
        return World(_number("SLURM_PROCID"), _number("SLURM_NTASKS"), _number("SLURM_LOCALID"))
    return None


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise ConfigError(f"the variable {name} is {text!r}, expected a number from 0; unset it or start with torchrun")
    return int(text)


@contextmanager
def start_mesh(
    tensor_size: int = 1, pipeline_size: int = 1, virtual_size: int | None = None, *, timeout_minutes: float = 30.0
) -> Iterator[Mesh]:
    """Open the process groups of a layout and close them on exit.

    Args:
        tensor_size: ranks that share each matrix.
        pipeline_size: stages of layers.
        virtual_size: chunks of layers a stage holds (interleaved schedule), or None.
        timeout_minutes: after which a collective that never completes fails.

    Raises:
        ConfigError: the world cannot hold the layout.
    """
    world = world_from_environment() or World()
    model_size = tensor_size * pipeline_size
    if world.size % model_size:
        raise ConfigError(
            f"{world.size} processes cannot hold TP {tensor_size} x PP {pipeline_size}, which needs a multiple of "
            f"{model_size}; start {max(1, world.size // model_size) * model_size} processes"
        )
    device = current_device()
    device.activate()
    install_engine(device.type)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group(
        device.backend,
        rank=world.rank,
        world_size=world.size,
        store=dist.HashStore() if world.size == 1 else None,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=device.torch_device() if device.type == "cuda" else None,
    )
    state = parallel_state()
    try:
        state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=pipeline_size,
            virtual_pipeline_model_parallel_size=virtual_size,
        )
        yield Mesh(
            world=world,
            tensor_size=tensor_size,
            tensor_rank=state.get_tensor_model_parallel_rank(),
            pipeline_size=pipeline_size,
            pipeline_rank=state.get_pipeline_model_parallel_rank(),
            virtual_size=virtual_size,
            data_size=state.get_data_parallel_world_size(),
            data_rank=state.get_data_parallel_rank(),
            tensor_group=state.get_tensor_model_parallel_group(),
            pipeline_group=state.get_pipeline_model_parallel_group(),
            data_group=state.get_data_parallel_group(),
        )
    finally:
        state.destroy_model_parallel()
        dist.destroy_process_group()
