"""`megatron-cpt tokenizer`: train one, extend one, measure it, prove it."""

from __future__ import annotations

import typer

from megatron_cpt.cli.tokenizer.convert import convert
from megatron_cpt.cli.tokenizer.making import extend, train
from megatron_cpt.cli.tokenizer.report import report
from megatron_cpt.cli.tokenizer.verify import verify

app = typer.Typer(help="Train, extend, measure and verify tokenizers.", no_args_is_help=True)
for command in (train, extend, convert, verify, report):
    app.command()(command)
