"""`megatron-cpt tokenizer`: train one, extend or replace one, choose its size, measure it, prove it."""

from __future__ import annotations

import typer

from megatron_cpt.cli.tokenizer.convert import convert
from megatron_cpt.cli.tokenizer.making import extend, replace, train
from megatron_cpt.cli.tokenizer.report import report
from megatron_cpt.cli.tokenizer.sweep import sweep
from megatron_cpt.cli.tokenizer.verify import verify

app = typer.Typer(help="Train, extend, replace, measure and verify tokenizers.", no_args_is_help=True)
for command in (train, extend, replace, sweep, convert, verify, report):
    app.command()(command)
