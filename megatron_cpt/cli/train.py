"""`megatron-cpt train`: one training job from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, SetOption, emit, stdout_for_results

app = typer.Typer(help="Train one job, starting its processes where nobody else did.")


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="YAML file of a training job.")],
    nproc: Annotated[
        int, typer.Option(min=1, help="Processes to start on this machine (not under torchrun or Slurm).")
    ] = 1,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train, or resume the job that its output folder holds.

    Under torchrun or Slurm this process is one rank; otherwise --nproc ranks are started here.
    """
    from megatron_cpt.cli.plan import describe, render
    from megatron_cpt.config.loading import load_config
    from megatron_cpt.config.schema import TrainConfig

    resolved = load_config(config, TrainConfig, overrides or [])
    if dry_run:
        emit(describe(resolved, nproc), as_json, lambda value: render(value, resolved))
        return
    from megatron_cpt.runtime.mesh import world_from_environment
    from megatron_cpt.training.folder import last_checkpoint
    from megatron_cpt.training.job import prepare, run_job

    world = world_from_environment()
    if world is not None:
        from megatron_cpt.runtime.device import current_device
        from megatron_cpt.runtime.engine import install_engine

        with stdout_for_results(as_json):
            prepare(resolved.config, world.size, world.rank)
            install_engine(current_device().type)
            from megatron_cpt.training.loop import train as train_rank

            train_rank(resolved.config)
        if world.rank != 0:
            return
        folder = last_checkpoint(Path(resolved.config.output))
    else:
        with stdout_for_results(as_json):
            folder = run_job(resolved.config, nproc)
    emit({"checkpoint": str(folder)}, as_json, lambda value: value["checkpoint"])
