"""The machine that is measured: its device, its versions, and the clock.

Needs torch alone, as everything in this folder: a machine with a GPU may have nothing else of this project's needs.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
Tensors = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # outputs, gradients
ROOT = Path(__file__).resolve().parents[2]
_FLUSHED_BYTES = 256 << 20  # several times the L2 of any GPU of capability 8.0 to 9.0
_HEAD_START_MS = 1.0  # longer than a step's Python takes to launch its kernels


@dataclass(frozen=True)
class Step(Generic[State]):
    """What is timed.

    Attributes:
        run: the timed part, from what `prepare` made; returns (outputs, gradients), empty where the mode has none.
        prepare: what has to be there before each run, as the forward pass of a timed backward pass; not timed.
    """

    run: Callable[[State], Tensors]
    prepare: Callable[[], State]


@dataclass
class Machine:
    """One device and the facts that stand in every row.

    Attributes:
        dry: a run on the CPU that shows that everything runs; its times say nothing.
        commit: of this repository, as it stands in the rows.
    """

    dry: bool
    commit: str = ""
    facts: dict[str, str] = field(init=False)
    _flushed: Tensor | None = field(init=False, default=None)
    _head_start: int = field(init=False, default=0)
    _compiled: dict[Callable[..., Any], Callable[..., Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.commit = self.commit or commit()
        self.facts = {
            "gpu": platform.machine() + " CPU, dry run" if self.dry else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
            "driver": "" if self.dry else _driver(),
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
        }

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors: bf16; fp16 in a dry run, as Triton's interpreter multiplies bf16 wrongly."""
        return torch.float16 if self.dry else torch.bfloat16

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what torch.compile makes of it; in a dry run its graph is run without a compiler."""
        if function not in self._compiled:
            backend = "eager" if self.dry else "inductor"
            self._compiled[function] = torch.compile(function, dynamic=False, backend=backend)
        return self._compiled[function]

    def synchronize(self) -> None:
        """Waits for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def time(self, step: Step[Any]) -> float:
        """Returns milliseconds of one run, with a cold L2.

        The device is held for a moment before the run begins, so that it does not wait for Python inside it.
        """
        state = step.prepare()
        if self.dry:
            begun = time.perf_counter()
            step.run(state)
            return 1e3 * (time.perf_counter() - begun)
        if self._flushed is None:
            self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=self.device)
            self._head_start = self._cycles(_HEAD_START_MS)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flushed.zero_()
        torch.cuda._sleep(self._head_start)
        begin.record()
        results = step.run(state)
        end.record()
        torch.cuda.synchronize()
        del results, state
        return float(begin.elapsed_time(end))

    def peak_mib(self, step: Step[Any]) -> float | None:
        """Returns how much more memory a run takes than was allocated before it, results included; None on the CPU."""
        if self.dry:
            return None
        state = step.prepare()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = step.run(state)
        torch.cuda.synchronize()
        del results, state
        return float((torch.cuda.max_memory_allocated() - before) / 2**20)

    def free(self) -> None:
        """Gives the allocator's unused memory back, so that one provider's does not stand in another's way."""
        if not self.dry:
            torch.cuda.empty_cache()

    @staticmethod
    def _cycles(milliseconds: float) -> int:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        probe = 10_000_000
        torch.cuda._sleep(probe)
        torch.cuda.synchronize()
        begin.record()
        torch.cuda._sleep(probe)
        end.record()
        torch.cuda.synchronize()
        return int(probe * milliseconds / begin.elapsed_time(end))


class Budget:
    """A share of time. Asked before each piece of work; a piece that has begun ends."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns seconds, negative when they are over."""
        return self._end - time.monotonic()


def version_of(package: str) -> str:
    """Returns the installed version of a package, "" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Returns this repository's commit, with "+" where files differ from it; "unknown" without git's folder."""
    try:
        name = _said("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "+" * bool(changed)


def _driver() -> str:
    try:
        return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
