"""Start the processes of one job on this machine, and never leave one behind.

`torchrun` and Slurm work as well: a process that finds their variables is already a rank. The
launcher is for everyone else, so that `--nproc 2` is all a laptop or one GPU machine needs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_cpt.errors import InputError, TrainingError

GRACE_SECONDS = 10.0
LAUNCHED = "MEGATRON_CPT_LAUNCHER_PID"


def launch(module: str, arguments: Sequence[str], num_processes: int, log_folder: Path) -> None:
    """Run `python -m module arguments...` as `num_processes` ranks and wait for all of them.

    Rank 0 writes to this terminal; what every rank says on standard error is kept in
    `log_folder/rank_<r>.log`. When one rank fails the others are stopped.

    Raises:
        InputError: a rank refused its input (exit code 2); the message is the rank's own.
        TrainingError: a rank failed otherwise; the message names the rank, its log and its last words.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    port = _free_port()
    with ExitStack() as stack:
        processes = []
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
        stack.callback(_stop, processes)
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        stack.callback(signal.signal, signal.SIGTERM, previous)
        failed = _wait(processes)
    if failed is not None:
        raise _failure(failed, processes[failed].returncode, log_folder)


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
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        LAUNCHED: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks ended well (None) or one failed (its rank)."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


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


def _failure(rank: int, code: int, log_folder: Path) -> Exception:
    log = _log_path(log_folder, rank)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line[len("error: ") :] for line in reversed(lines) if line.startswith("error: ")), None)
    if code == InputError.exit_code and said:
        return InputError(said)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    last = said or "; ".join(line.strip() for line in lines[-3:] if line.strip()) or "it said nothing"
    return TrainingError(f"rank {rank} {how}: {last} (all it said: {log})")
