"""`megatron-cpt data`: from corpus files to samples, one file a command."""

from __future__ import annotations

import typer

from megatron_cpt.cli.data.build import build
from megatron_cpt.cli.data.clean import clean
from megatron_cpt.cli.data.cluster import CommandWithRay
from megatron_cpt.cli.data.indices import indices
from megatron_cpt.cli.data.inspect import inspect, verify
from megatron_cpt.cli.data.pack import pack
from megatron_cpt.cli.data.pairs import pairs
from megatron_cpt.cli.data.remap import remap

app = typer.Typer(help="Clean corpora; build, inspect and verify indexed datasets.", no_args_is_help=True)
for command in (clean, pairs, build, pack, indices, inspect, verify, remap):
    app.command(cls=CommandWithRay if "ray" in command.__annotations__ else None)(command)
