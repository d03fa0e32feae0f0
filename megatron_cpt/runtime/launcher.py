"""Start the processes of one job on this machine, and never leave one behind.

`torchrun` and Slurm work as well: a process that finds their variables is already a rank. The
launcher is for everyone else, so that `--nproc 2` is all a laptop or one GPU machine needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import megatron_cpt
from megatron_cpt.errors import ConfigError, InputError, TrainingError

GRACE_SECONDS = 10.0
SETTLE_SECONDS = 2.0  # from the first failure on: when one rank fails the others fail with it, and one says why
LAUNCHED = "MEGATRON_CPT_LAUNCHER_PID"
WARNING = re.compile(r"warn|^\[?[WI]\d{4}\b", re.IGNORECASE)  # Python's, and those of torch's C++ ("[W1120 18:30")
ROOT = Path(megatron_cpt.__file__).parents[1]
# `python -m` of a rank, but without the current folder first on its path, where any random.py would be taken
# for the standard library's, and with the package that the launcher itself runs.
START = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]
root, module = sys.argv[1:3]
del sys.argv[1:3]
if root not in sys.path:
    sys.path.insert(0, root)
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def launch(module: str, arguments: Sequence[str], num_processes: int, log_folder: Path) -> None:
    """Run `python -m module arguments...` as `num_processes` ranks and wait for all of them.

    Rank 0 writes to this terminal; what every rank says on standard error is kept in
    `log_folder/rank_<r>.log`. When one rank fails the others are stopped, and the error is that of the
    rank it began with: one that gave a reason, else the first to end.

    Raises:
        InputError: a rank refused its input (exit code 2); the message is the rank's own.
        TrainingError: a rank failed otherwise; the message names the rank, its log and its last words.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", START, str(ROOT), module, *arguments]
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        stack.callback(signal.signal, signal.SIGTERM, previous)
        stack.callback(_stop, processes)
        for rank in range(num_processes):
            log = stack.enter_context(open(_log_path(log_folder, rank), "wb"))
            processes.append(
                subprocess.Popen(
                    command,
                    env=_rank_environment(rank, num_processes, port),
                    stdout=None if rank == 0 else log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                )
            )
        ended = _wait(processes, log_folder)
    failed = [rank for rank in ended if processes[rank].returncode]
    if failed:
        origin = next((rank for rank in failed if _reason(_log_path(log_folder, rank))), failed[0])
        raise _failure(origin, processes[origin].returncode, _log_path(log_folder, origin))


def refuse_more_processes_than_devices(num_processes: int) -> None:
    """Check that this machine has a device for each rank of a job.

    Raises:
        ConfigError: it has fewer.
    """
    from megatron_cpt.runtime.device import DEVICE, device_count  # torch is heavy, and launching does without

    count = device_count()
    if count is not None and num_processes > count:
        raise ConfigError(
            f"got {num_processes} processes for {count} devices; start at most {count} on this machine, "
            f"or set {DEVICE}=cpu"
        )


def started_by_launcher() -> bool:
    """Whether this process, or the one it was forked from, is a rank that `launch` has started."""
    return LAUNCHED in os.environ


def die_with_launcher() -> None:
    """Make this rank end when its launcher dies, however it dies (Linux; elsewhere a no-op)."""
    launcher = os.environ.get(LAUNCHED)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it died before the line above
        sys.exit(1)


def _rank_environment(rank: int, num_processes: int, port: int) -> Mapping[str, str]:
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Communication is then queued before the products that it hides behind; some layouts demand it.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONSAFEPATH": "1",  # the current folder stays off the path of what a rank starts, too
        LAUNCHED: str(os.getpid()),
    }


def free_port() -> int:
    """A free port that the system does not hand out by itself, so that it is still free in some seconds."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait(processes: Sequence[subprocess.Popen[bytes]], log_folder: Path) -> list[int]:
    """Ranks in the order in which they ended: all of them, or those up to the first failure that has a reason."""
    ended: list[int] = []
    deadline = math.inf
    while len(ended) < len(processes) and time.monotonic() < deadline:
        time.sleep(0.02)
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended.append(rank)
                if process.returncode:
                    known = _reason(_log_path(log_folder, rank)) is not None
                    deadline = min(deadline, time.monotonic() + (0.0 if known else SETTLE_SECONDS))
    return ended


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log_path(log_folder: Path, rank: int) -> Path:
    return log_folder / f"rank_{rank}.log"


def _lines(log: Path) -> list[str]:
    return [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _reason(log: Path) -> str | None:
    """What a rank gave as its reason to stop, the way `training.worker` says it."""
    return next((line[len("error: ") :] for line in reversed(_lines(log)) if line.startswith("error: ")), None)


def _failure(rank: int, code: int, log: Path) -> Exception:
    lines, reason = _lines(log), _reason(log)
    if code == InputError.exit_code and reason:
        return InputError(reason)
    if code == -signal.SIGKILL and not reason:
        return TrainingError(
            f"rank {rank} was killed from outside (SIGKILL), perhaps for lack of memory (all it said: {log})"
        )
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    exception = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)), None)
    lines = [line for line in lines if not WARNING.search(line)]
    last = reason or exception or "; ".join(lines[-3:]) or "it said nothing"
    return TrainingError(f"rank {rank} {how}: {last} (all it said: {log})")
