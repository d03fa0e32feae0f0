"""What a run says while it trains: a status line, `metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megatron_cpt.errors import InputError

METRICS = "metrics.jsonl"


class MetricsLog:
    """Writes the metrics of one run; only rank 0 holds one.

    `metrics.jsonl` is the source of truth: one JSON object a line, training records with `loss`,
    validation records with `validation`. A resumed run first drops what lies after its checkpoint; a
    run that begins again drops everything.
    """

    def __init__(self, output: Path, train_steps: int, resumed_step: int) -> None:
        self.path = output / METRICS
        self.train_steps = train_steps
        _drop_after(self.path, resumed_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=resumed_step + 1)
        self._first_step = resumed_step
        self.begin()

    def begin(self) -> None:
        """Count the time that is left from here on: the first step begins."""
        self._started = time.monotonic()

    def training(self, record: dict[str, Any]) -> None:
        """Write one training record and print the status line."""
        self._write(record)
        elapsed = time.monotonic() - self._started
        done = record["step"] - self._first_step
        eta = elapsed / done * (self.train_steps - record["step"])
        print(
            f"step {record['step']:>{len(str(self.train_steps))}}/{self.train_steps} | loss {record['loss']:7.4f} | "
            f"LR {record['learning_rate']:.2e} | grad {record['grad_norm']:6.3f} | "
            f"{_short(record['tokens_per_second'])} tokens/s | {_short(record['bytes_per_second'])} bytes/s | "
            f"MFU {record['mfu']:5.1%} | ETA {_clock(eta)}",
            flush=True,
        )

    def validation(self, step: int, scores: dict[str, dict[str, float]]) -> None:
        """Write one validation record and print bits per byte of each language."""
        self._write({"step": step, "validation": scores})
        line = " | ".join(f"{language} {score['bits_per_byte']:.4f}" for language, score in scores.items())
        print(f"step {step:>{len(str(self.train_steps))}}/{self.train_steps} | bits per byte | {line}", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in _scalars(record):
            self._board.add_scalar(name, value, record["step"])


def read_metrics(output: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All complete records of a run's `metrics.jsonl`, in order; a last line that was cut off is none.

    Raises:
        InputError: a line is not a record.
    """
    path = Path(output) / METRICS
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return [_record(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.endswith(b"\n")]


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as caught:
        raise InputError(f"{place} is not valid JSON ({caught}); remove this line") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{place} is not the record of a step; remove this line")
    return record


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_metrics(path.parent) if step and record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif key != "step" and isinstance(value, (int, float)):
            found.append((prefix + key, float(value)))
    return found


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:5.2f}M"
    return f"{value / 1e3:5.1f}k" if value >= 1e3 else f"{value:6.0f}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
