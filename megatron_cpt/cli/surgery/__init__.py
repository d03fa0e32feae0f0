"""`megatron-cpt surgery`: plan how vocabulary rows are made, make them, prove what was left alone."""

from __future__ import annotations

import typer

from megatron_cpt.cli.surgery.calibrate import calibrate
from megatron_cpt.cli.surgery.certify import certify
from megatron_cpt.cli.surgery.compare import compare
from megatron_cpt.cli.surgery.plans import apply, plan, show, undo

app = typer.Typer(help="Fit a model's embedding and head to another vocabulary.", no_args_is_help=True)
for command in (plan, calibrate, show, apply, certify, undo, compare):
    app.command()(command)
