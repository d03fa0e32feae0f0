"""`make test-gpu` and `make bench-gpu` on a machine without a GPU: both run dry, and say what is missing."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def _make(
    target: str, *arguments: str, python: Path | str = sys.executable, **environment: str
) -> tuple[int, str, str]:
    """Returns the exit code, stdout and stderr of a target; no GPU is visible to it."""
    # A make that runs these tests leaves its own settings in the environment.
    dropped = "TRITON_INTERPRET", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"
    settled = {name: value for name, value in os.environ.items() if name not in dropped}
    settled |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "", **environment}
    command = ["make", "--no-print-directory", target, f"GPU_PYTHON={python}", f"ARGS={' '.join(arguments)}"]
    result = subprocess.run(command, cwd=ROOT, env=settled, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


def _bare_python(folder: Path) -> Path:
    """Returns a Python that has torch, Triton and pytest, and of this project's needs nothing else."""
    absent = "pydantic", "yaml", "megatron", "safetensors", "rich", "typer", "transformers"
    blocked = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    (folder / "sitecustomize.py").write_text(blocked, encoding="utf-8")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


def test_the_tests_for_a_gpu_are_right_and_need_the_kernels_alone(tmp_path: Path) -> None:
    python = _bare_python(tmp_path)
    arguments = "-q", "--basetemp", str(tmp_path / "pytest"), "-p", "no:hypothesispytest"
    code, out, err = _make("test-gpu", *arguments, python=python, MEGATRON_CPT_GPU_TESTS="dry")
    assert code == 0, out + err
    assert " passed" in out and "skipped" not in out


def test_without_a_gpu_nothing_is_measured() -> None:
    code, out, err = _make("bench-gpu")
    assert code != 0 and not out
    said = [line for line in err.splitlines() if not line.startswith("make:")]
    assert said == [
        "bench_kernels: no NVIDIA GPU is visible to torch: run it on a machine with one, or with --dry-run on this CPU"
    ]


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    code, _, err = _make("test-gpu", python=script)
    assert code != 0
    assert "error: test-gpu needs torch, triton, numpy, pytest; install it" in err


def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    table = tmp_path / "dry.csv"
    arguments = "--dry-run", "--minutes", "5", "--output", str(table)
    code, out, err = _make("bench-gpu", *arguments, python=_bare_python(tmp_path))
    assert code == 0, out + err
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["p50_ms"] or row["reason"] for row in rows)
    absent = [row["reason"] for row in rows if row["provider"].startswith("megatron-core")]
    assert absent and all("ModuleNotFoundError" in reason for reason in absent)
    ours = [row for row in rows if row["provider"] == "megatron_cpt"]
    assert not [row["reason"] for row in ours if row["reason"]]
    kernels = {"linear cross-entropy", "attention", "RMSNorm", "RMSNorm with residual", "SwiGLU", "RoPE"}
    assert {row["kernel"] for row in ours if "triton" in row["setting"]} == kernels
    errors = [float(row[name]) for row in ours for name in ("error_output", "error_gradient") if row[name]]
    assert len(errors) >= len(ours) and max(errors) < 0.02
    assert {row["mode"] for row in rows} == {"first", "last", "full", "forward", "backward"}
    note = table.with_suffix(".md").read_text(encoding="utf-8")
    assert "dry run" in note and "| yes |" not in note
