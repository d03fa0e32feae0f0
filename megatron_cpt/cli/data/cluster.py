"""Options of the verbs that can work on a Ray cluster."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Threads; default: one a core. With --ray: threads of each file.")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Work on a running Ray cluster: HOST:PORT or ray://HOST:PORT; alone: RAY_ADDRESS or this host's cluster.",
    ),
]
_ADDRESS = re.compile(r"auto|ray://.*|[^/]+:\d+")


class CommandWithRay(TyperCommand):
    """A command whose --ray may stand alone: typer has no options with a value that may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a --ray that no address follows the address "auto"."""
        options = args[: args.index("--")] if "--" in args else args
        behind = [*options[1:], ""]
        alone = {k for k, word in enumerate(options) if word == "--ray" and not _ADDRESS.fullmatch(behind[k])}
        return super().parse_args(ctx, ["--ray=auto" if k in alone else word for k, word in enumerate(args)])
