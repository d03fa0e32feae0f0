"""Parts and other independent tasks on the hosts of a Ray cluster that is there already.

Ray alone says what runs where, carries arguments and results, and repeats a task whose worker or host is lost.
What tasks make, they make in files, and all hosts have to see the same ones. Nothing here starts a cluster.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.data.ordered import Progress
from megatron_cpt.data.parts import Notice, Parts
from megatron_cpt.errors import ConfigError, CptError, DataError, error_of_system

WorkOnParts = Callable[[Sequence[int], int, Progress | None, Notice | None], None]

_RETRIES = 5  # of a task whose worker or host was lost; each goes on at the journal
_MOST_TASKS = 1000  # handed to Ray at a time
_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 120.0  # for every host to start a process and look around
_REPORT_SECONDS = 1.0
_LOCK_SECONDS = 120.0  # NFS servers hold the locks of a lost host for a lease of about 90 s
_LATE_SECONDS = 60.0  # after which a network file system shows what another host has written
_CANCEL_SECONDS = 20.0


@contextmanager
def open_cluster(address: str = "auto", workers: int | None = None) -> Iterator[Cluster]:
    """Connect to a running Ray cluster; it goes on when the connection ends, without this job's tasks.

    Args:
        address: "auto" (that of RAY_ADDRESS, else the cluster this host belongs to), HOST:PORT, or
            ray://HOST:PORT.
        workers: threads (and cores) of each part; None: as many as let all parts be worked on at once.

    Yields:
        The cluster, all hosts of which have this version of megatron_cpt. Standard output is turned to
        standard error meanwhile, because of what Ray says of lost workers.

    Raises:
        ConfigError: ray is not installed, no cluster can be reached there, or a host has another version.
    """
    # Read when ray is imported: attempts of 1 s (wrong token) to 40 s (no Ray behind the port), 20 if not set.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
    except ImportError as caught:
        raise ConfigError(f"--ray needs the library ray ({caught}); pip install 'megatron-cpt[ray]'") from None
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    _check_reachable(address)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as caught:
        raise ConfigError(f"no connection to a Ray cluster at {address}: {_last_line(caught)}") from None
    try:
        with redirect_stdout(sys.stderr):
            yield Cluster(_hosts_of(ray.nodes()), workers)
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask for the port before Ray does, which would try for a minute or end the process."""
    if address == "auto":
        return
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})", address)
    if match is None:
        raise ConfigError(f"--ray {address}: expected HOST:PORT or ray://HOST:PORT of a running cluster, or auto")
    try:
        socket.create_connection((match[1], int(match[2])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as caught:
        raise ConfigError(f"no Ray cluster at {address} ({caught}); start one there, or give its address") from None


def _last_line(caught: BaseException) -> str:
    cause = caught.__cause__ or caught
    return next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(cause).__name__)


@dataclass(frozen=True)
class Host:
    """A live host of the cluster: Ray's name of it, what people call it, and its cores as Ray counts them."""

    node_id: str
    name: str
    num_cpus: int


def _hosts_of(nodes: Sequence[Mapping[str, Any]]) -> tuple[Host, ...]:
    found = (
        Host(
            node["NodeID"],
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            int(node["Resources"].get("CPU", 0)),
        )
        for node in nodes
        if node["Alive"]
    )
    return tuple(host for host in found if host.num_cpus)


class Cluster:
    """A connection to a cluster, see `open_cluster`.

    Hosts may come and go. A task never asks for more cores than a host that is there at the beginning has.
    """

    def __init__(self, hosts: tuple[Host, ...], workers: int | None) -> None:
        if not hosts:
            raise ConfigError("the Ray cluster has no host with cores; add hosts to it and run the command again")
        self.hosts, self.workers = hosts, workers
        self._check_versions()

    def run_parts(
        self,
        parts: Parts,
        work: WorkOnParts,
        numbers: Sequence[int],
        shared: Iterable[Path] = (),
        on_progress: Progress | None = None,
        notice: Notice | None = None,
    ) -> None:
        """Bring the parts `numbers` to their end, each as one task on some host; see `Machines.run_parts`.

        The parts end as they would here: a task that loses its worker goes on from the part's journal.

        Raises:
            ConfigError: no host has so many cores as a part has threads.
            DataError: a host does not see the job's files.
            CptError: the first failure of a part, as itself; or a part whose workers are lost again and again.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if not numbers:
            return
        threads = self.workers or self._threads_each(len(numbers))
        inputs = {path.parent: path for path in (parts.inputs[number] for number in numbers)}  # one of each folder
        self._check_files([parts.folder / "job.json", *inputs.values(), *shared])
        sizes = {number: parts.read(number).input_bytes for number in numbers}
        near = NodeAffinitySchedulingStrategy(self.hosts[0].node_id, soft=True)
        ledger = ray.remote(_Ledger).options(num_cpus=0, max_restarts=-1, scheduling_strategy=near).remote()
        finished: set[int] = set()
        reported = 0.0

        def report() -> None:
            nonlocal reported
            if on_progress is None or time.monotonic() - reported < _REPORT_SECONDS:
                return
            reported = time.monotonic()
            done = sum(min(size, sizes[number]) for number, size in _read(ledger).items() if number not in finished)
            on_progress(done + sum(sizes[number] for number in finished), sum(sizes.values()))

        task = partial(_work_on_part, parts, work, threads, ledger)
        for number, notices in self.map(task, numbers, threads, report):
            finished.add(number)
            if notice is not None:
                for text in notices:
                    notice(text)
        if on_progress is not None:
            on_progress(sum(sizes.values()), sum(sizes.values()))
        _wait_for_journals(parts, numbers)

    def map(
        self,
        function: Callable[[Any], Any],
        tasks: Iterable[Any],
        num_cpus: int = 1,
        idle: Callable[[], None] | None = None,
    ) -> Iterator[Any]:
        """The results of a picklable function for each task, in any order; each task on some host.

        A task starts in this process's folder, where its host has it. One that is lost with its worker or
        host is repeated. When the iteration ends early, by an error or Ctrl-C, tasks that run are stopped.

        Args:
            function: called with one task.
            tasks: picklable values.
            num_cpus: cores of a task.
            idle: called about once a second, and after each result.

        Raises:
            ConfigError: no host has so many cores.
            CptError: a task has raised it, or the system has refused something; or a task was lost too often.
        """
        import ray

        largest = max(host.num_cpus for host in self.hosts)
        if num_cpus > largest:
            raise ConfigError(f"tasks of {num_cpus} threads: no host of the cluster has more than {largest} cores")
        remote = ray.remote(_run_task).options(num_cpus=num_cpus, max_retries=_RETRIES, retry_exceptions=False)
        held, waiting, running = ray.put((__version__, os.getcwd(), function)), iter(tasks), set[Any]()
        try:
            while True:
                running.update(remote.remote(held, task) for task in islice(waiting, _MOST_TASKS - len(running)))
                if not running:
                    return
                for ready in ray.wait(list(running), num_returns=1, timeout=_REPORT_SECONDS)[0]:
                    running.remove(ready)
                    yield _result_of(ready)
                if idle is not None:
                    idle()
        finally:
            for task in running:
                ray.cancel(task)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_SECONDS)

    def _threads_each(self, num_parts: int) -> int:
        cores = [host.num_cpus for host in self.hosts]
        return max(1, min(min(cores), sum(cores) // num_parts))

    def _check_versions(self) -> None:
        def version() -> str:  # local: travels by value, to hosts that have no megatron_cpt
            try:
                import megatron_cpt
            except ImportError as caught:
                return f"none ({caught})"
            return megatron_cpt.__version__

        for host, found in self._ask(version):
            if found != __version__:
                raise _other_version(host.name, __version__, found)

    def _check_files(self, paths: Iterable[Path]) -> None:
        absolute = [os.path.abspath(path) for path in paths]
        for host, sizes in self._ask(_file_sizes, absolute):
            for path, there, here in zip(absolute, sizes, _file_sizes(absolute), strict=True):
                if there != here:
                    raise DataError(
                        f"host {host.name} of the Ray cluster {'sees another' if there else 'does not see'} {path}; "
                        "put inputs, tokenizer and output on a file system that all hosts mount at the same place"
                    )

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Iterator[tuple[Host, Any]]:
        """Answers of all hosts that are still there, whatever else runs on them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = ray.remote(question)
        asked = {}
        for host in self.hosts:
            there = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
            asked[remote.options(num_cpus=0, scheduling_strategy=there).remote(*arguments)] = host
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
        if silent:
            names = ", ".join(asked[answer].name for answer in silent)
            raise ConfigError(
                f"no answer in {_ANSWER_SECONDS:.0f} s from Ray's host {names}; see whether it is in order"
            )
        for answer, host in asked.items():
            try:
                yield host, ray.get(answer)
            except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                continue  # gone: no task will run there


class _Ledger:
    """Bytes done of each part; lives in a process of the cluster."""

    def __init__(self) -> None:
        self.done: dict[int, int] = {}

    def report(self, number: int, done: int) -> None:
        self.done[number] = done

    def read(self) -> dict[int, int]:
        return self.done


def _read(ledger: Any) -> dict[int, int]:
    import ray

    try:
        done: dict[int, int] = ray.get(ledger.read.remote(), timeout=_CONNECT_SECONDS)
    except ray.exceptions.RayError:  # it is being started, or was lost with its host: no reason to stop the work
        return {}
    return done


def _run_task(held: tuple[str, str, Callable[[Any], Any]], task: Any) -> tuple[Any, CptError | None]:
    """On a host: the function's value, or the error that a user can act on, as values for Ray."""
    version, folder, function = held
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        # A cluster that was started from a background shell has inherited this, and no task could be stopped.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if version != __version__:  # of a host that has joined later
        return None, _other_version(socket.gethostname(), version, __version__)
    if os.path.isdir(folder):
        os.chdir(folder)
    try:
        return function(task), None
    except CptError as caught:
        return None, caught
    except OSError as caught:
        return None, error_of_system(caught)


def _other_version(host: str, here: str, there: str) -> ConfigError:
    return ConfigError(
        f"megatron_cpt here is {here}, on host {host} of the Ray cluster it is {there}; "
        "install the same version on all hosts"
    )


def _result_of(reference: Any) -> Any:
    import ray

    try:
        value, error = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise  # a defect keeps its traceback
    except ray.exceptions.RayError as caught:
        raise CptError(
            f"a task of the Ray cluster was lost with its worker {_RETRIES + 1} times, or its host has too little "
            f"memory: {_last_line(caught)}; run the command again: it goes on from here"
        ) from None
    if error is not None:
        raise error
    return value


def _work_on_part(parts: Parts, work: WorkOnParts, workers: int, ledger: Any, number: int) -> tuple[int, list[str]]:
    """On a host: bring a part to its end, and say what was done again."""
    if not parts.is_begun():
        raise DataError(
            f"host {socket.gethostname()} of the Ray cluster does not see this job in {os.path.abspath(parts.folder)}; "
            "write to a file system that all hosts mount at the same place"
        )
    parts.wait_for(number, _LOCK_SECONDS)
    reported = time.monotonic()
    notices: list[str] = []

    def report(done: int, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            ledger.report.remote(number, done)

    work([number], workers, report, notices.append)
    return number, notices


def _file_sizes(paths: Sequence[str]) -> list[int | None]:
    """Bytes of each file, 1 for a folder, None for what is not there."""
    return [os.path.getsize(path) + 1 if os.path.isfile(path) else 1 if os.path.isdir(path) else None for path in paths]


def _wait_for_journals(parts: Parts, numbers: Sequence[int]) -> None:
    """Until this host, too, sees that the parts are done; whoever needs them says so if they are not."""
    end = time.monotonic() + _LATE_SECONDS
    while any(not parts.read(number).is_done() for number in numbers) and time.monotonic() < end:
        time.sleep(_REPORT_SECONDS)
        os.listdir(parts.folder)  # makes a network file system look again
