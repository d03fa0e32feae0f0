"""`megatron-cpt doctor`: what this machine has, and what the package would use of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import typer

from megatron_cpt import __version__
from megatron_cpt.cli.console import JsonOption, emit

app = typer.Typer(help="Show the device, the versions, and which implementation each op would use.")

REQUIRED = ("torch", "megatron-core", "numpy", "safetensors", "sentencepiece", "tokenizers", "pyarrow")
# Distribution -> what is used of it where it is installed.
OPTIONAL = {
    "transformer-engine": "its fused Adam, instead of the plain torch one",
    "apex": "its fused Adam, where transformer-engine is not installed",
    "triton": "kernels of the ops, on NVIDIA GPUs from compute capability 8.0",
    "ray": "data build and data clean on a cluster (--ray)",
    "kenlm": "perplexity as a rule of data clean",
    "fasttext-predict": "language identification as a rule of data clean",
}


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Print device, versions, optional parts, and the implementation of each op with its reason."""
    emit(examine(), as_json, _render)


def examine() -> dict[str, Any]:
    """Everything `doctor` prints, as a dict."""
    import torch

    from megatron_cpt import kernels  # noqa: F401  (importing it registers the ops)
    from megatron_cpt.kernels.dispatch import explain
    from megatron_cpt.runtime.device import current_device

    device = current_device()
    # What a job would ask for: bf16 on an accelerator, fp32 on the CPU; packed documents, which differ in length.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    native = importlib.util.find_spec("megatron_cpt.data._native") is not None
    return {
        "device": {
            "type": device.type,
            "name": device.name,
            "backend": device.backend,
            "memory_bytes": device.memory_bytes,
            "peak_bf16_flops": device.peak_flops,
            "cores": os.cpu_count(),
        },
        "versions": {
            "megatron-cpt": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in REQUIRED},
        },
        "native_core": "built" if native else "missing: install the package again with a C++17 compiler",
        "optional": {name: {"version": _version(name), "brings": text} for name, text in OPTIONAL.items()},
        "ops": explain(device=device.type, dtype=dtype, one_length=False),
        "ops_asked_for": {"device": device.type, "dtype": str(dtype).removeprefix("torch.")},
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _render(value: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    device = Table(title="device", title_justify="left", show_header=False, box=None)
    for name, fact in value["device"].items():
        if fact is not None:
            device.add_row(name, f"{fact / 2**30:.1f} GiB" if name == "memory_bytes" else str(fact))
    versions = Table(title="versions", title_justify="left", show_header=False, box=None)
    for name, version in value["versions"].items():
        versions.add_row(name, version or "MISSING")
    versions.add_row("C++ core", value["native_core"])
    optional = Table(title="optional parts", title_justify="left", show_header=False, box=None)
    for name, part in value["optional"].items():
        optional.add_row(name, part["version"] or "-", part["brings"])
    asked = value["ops_asked_for"]
    ops = Table(
        title=f"ops on {asked['device']} in {asked['dtype']}", title_justify="left", show_header=False, box=None
    )
    for row in value["ops"]:
        ops.add_row(row["op"], row["implementation"], "yes" if row["supported"] else "no", row["reason"])
    return Group(device, "", versions, "", optional, "", ops)
