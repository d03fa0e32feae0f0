"""Work on a Ray cluster against the same work here: files, errors, workers that are killed."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.data import DatasetBuild, Document, _native, build_files, ordered
from megatron_cpt.data.cleaning.duplicates import Signing, find_duplicates
from megatron_cpt.data.cluster import Cluster, open_cluster
from megatron_cpt.errors import ConfigError, CptError, DataError, VerificationError

# Nobody else on this machine may use the cluster. Ray looks once, when it is imported.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
HOST = """
import ray, sys
with ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=sys.argv[1],
              log_to_driver=False) as cluster:
    print("address", cluster.address_info["address"], flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one host with two cores, in a session of its own, that ends with this process."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        host = subprocess.Popen(
            [sys.executable, "-c", HOST, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert host.stdin is not None and host.stdout is not None
        try:
            yield next(line for line in host.stdout if line.startswith("address ")).split()[1]
        finally:
            host.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                host.wait(60)
            host.stdout.close()
            mine = [process for process in psutil.process_iter() if _session_of(process.pid) == host.pid]
            _, left = psutil.wait_procs(mine, timeout=20)
            for process in left:
                process.kill()
            assert host.returncode == 0 and not left, "processes outlived their cluster"


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[Cluster]:
    with open_cluster(address, 1) as opened:
        yield opened


@pytest.fixture(scope="module")
def corpus(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Three files, the second of several blocks, in a folder with spaces."""
    folder = tmp_path_factory.mktemp("a corpus") / "with spaces"
    folder.mkdir()
    draw = random.Random(5)
    paths = []
    for number, count in enumerate((40, 12000, 7)):
        path = folder / f"part {number}.jsonl"
        lines = (json.dumps({"text": draw.choice(documents).text}, ensure_ascii=False) for _ in range(count))
        path.write_text("\n".join(lines), encoding="utf-8")
        paths.append(path)
    return tuple(paths)


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx", "manifest.json")]


def test_clusters_that_cannot_be_used_are_refused(
    corpus: tuple[Path, ...], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address, message in (
        (f"127.0.0.1:{port}", f"no Ray cluster at 127.0.0.1:{port} .*refused"),
        (f"ray://[::1]:{port}", "no Ray cluster at ray://"),
        ("local", "--ray local: expected HOST:PORT or ray://HOST:PORT of a running cluster, or auto"),
        ("", "expected HOST:PORT"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), ray=address)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    with pytest.raises(ConfigError, match="no Ray cluster at nowhere.invalid:6379"):
        build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), ray="auto")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs the library ray .*; pip install 'megatron-cpt\[ray\]'"):
        build_files(DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx"), ray="auto")
    assert list(tmp_path.iterdir()) == []  # nothing is left of the attempts
    program = "import megatron_cpt.data, megatron_cpt.cli.data, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@dataclass(frozen=True)
class KilledBuild(DatasetBuild):
    """Writes the journal after each block; its first worker kills itself once that of part 1 has begun."""

    diary: Path = Path()

    def work(
        self,
        numbers: Any,
        workers: int = 1,
        on_progress: ordered.Progress | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        part = self.parts().read(1)
        if list(numbers) == [1]:
            with open(self.diary, "a") as diary:
                diary.write(f"{part.blocks}\n")
        first = not part.begun

        def progress(done: int, total: int) -> None:
            if first and self.parts().read(1).begun:
                os.kill(os.getpid(), signal.SIGKILL)
            if on_progress is not None:
                on_progress(done, total)

        with patch.object(ordered, "COMMIT_BYTES", 1):
            super().work(numbers, workers, progress if list(numbers) == [1] else on_progress, notice)


# The next three connect by themselves, and a process has one connection at a time: they stand before `cluster`.
def test_a_worker_that_is_killed_half_way_changes_no_byte(
    address: str,
    corpus: tuple[Path, ...],
    tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    build_files(DatasetBuild(corpus, tokenizer, tmp_path / "local", "xx"))
    seen: list[tuple[int, int]] = []
    build_files(
        KilledBuild(corpus, tokenizer, tmp_path / "on ray", "xx", diary=tmp_path / "diary"),
        None,
        ray=address,
        on_progress=lambda *at: seen.append(at),
    )
    assert files_of(tmp_path / "on ray") == files_of(tmp_path / "local")
    assert not Path(f"{tmp_path / 'on ray'}.parts").exists()
    begun_at = [int(line) for line in (tmp_path / "diary").read_text().split()]
    assert begun_at[0] == 0 and len(begun_at) == 2 and begun_at[1] > 0
    total = sum(path.stat().st_size for path in corpus)
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert capfd.readouterr().out == ""  # Ray tells of the lost worker, but not where results are printed


def test_the_command_works_on_a_cluster(
    address: str,
    corpus: tuple[Path, ...],
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.chdir(corpus[0].parent)
    build_files(DatasetBuild([corpus[0].name], tokenizer, tmp_path / "local", "xx"))
    options = ["--tokenizer", str(tokenizer), "--language", "xx", "--output", str(tmp_path / "on ray")]
    assert main(["data", "build", *options, "--json", "--ray", corpus[0].name]) == 0
    assert json.loads(capfd.readouterr().out)["documents"] == 40
    assert files_of(tmp_path / "on ray") == files_of(tmp_path / "local")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": "bad\n')
    assert main(["data", "build", "--ray", address, *options, "--overwrite", str(tmp_path / "broken.jsonl")]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {tmp_path}/broken.jsonl:2: ")
    assert len(printed.err.splitlines()) == 1


def test_cleaning_on_a_cluster_writes_the_same_files(
    address: str, corpus: tuple[Path, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rules = "rules: {short: {metric: characters, at_least: 20, reason: fragments}}"
    (tmp_path / "profile.yaml").write_text(f"about: a test\n{rules}\nduplicates: {{threshold: 0.7}}\n")
    command = ["data", "clean", str(corpus[0]), str(corpus[2]), "--profile", str(tmp_path / "profile.yaml")]
    assert main([*command, "--output", str(tmp_path / "here"), "--workers", "1"]) == 0
    assert main([*command, "--output", str(tmp_path / "over there"), f"--ray={address}", "--json"]) == 0
    assert capfd.readouterr().out
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("here", "over there")
    )
    assert here == there and {Path(name).suffix for name in here} >= {".zst", ".md"}
    assert json.loads(here["report.json"])["duplicates"]["exact"]["documents"]


def fail(kind: int) -> int:
    if kind == 0:
        raise VerificationError("a proof failed: here")
    if kind == 1:
        raise DataError("a corpus is broken: there")
    if kind == 2:
        open("/proc/no such file")  # noqa: SIM115
    if kind == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return kind


def test_errors_of_tasks_are_those_of_this_process(cluster: Cluster) -> None:
    for kind, message in ((0, "a proof failed: here"), (1, "a corpus is broken: there")):
        with pytest.raises((VerificationError, DataError)) as caught:
            list(cluster.map(fail, [9, kind]))
        assert type(caught.value) is (VerificationError, DataError)[kind] and str(caught.value) == message
    with pytest.raises(CptError, match="/proc/no such file: No such file or directory; check the path"):
        list(cluster.map(fail, [2]))
    with (
        patch("megatron_cpt.data.cluster._RETRIES", 0),
        pytest.raises(CptError, match="lost with its worker 1 times.*run the command again"),
    ):
        list(cluster.map(fail, [3]))
    with pytest.raises(ConfigError, match="tasks of 3 threads: no host of the cluster has more than 2 cores"):
        list(cluster.map(fail, [9], num_cpus=3))
    with patch("megatron_cpt.data.cluster.__version__", "0.0"), pytest.raises(ConfigError, match="on host .* it is"):
        Cluster(cluster.hosts, 1)


def test_files_that_hosts_do_not_see_are_named(
    cluster: Cluster, corpus: tuple[Path, ...], tokenizer: Path, tmp_path: Path
) -> None:
    build = DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx")
    parts = build.parts()
    parts.claim()
    mine = Path(f"/proc/self/task/{os.getpid()}")  # which no other process sees
    with pytest.raises(DataError, match=rf"host \S+ \(.+\) of the Ray cluster does not see {mine}; put inputs, tok"):
        cluster.run_parts(parts, build.work, [0], shared=[mine])
    other = replace(build, text_field="body")
    with pytest.raises(DataError, match="is of a build with another tokenizer or other files"):
        cluster.run_parts(parts, other.work, [0])
    with pytest.raises(DataError, match="does not see this job in"):
        cluster.run_parts(other.parts(), other.work, [0])


def linger(path: Path) -> None:
    try:
        path.touch()  # inside: it may be stopped right after
        for _ in range(6000):
            time.sleep(0.1)
    except KeyboardInterrupt:
        path.with_suffix(".stopped").touch()
        raise


def test_ctrl_c_stops_the_tasks(cluster: Cluster, tmp_path: Path) -> None:
    def interrupt() -> None:
        if (tmp_path / "a task").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(cluster.map(linger, [tmp_path / "a task"], idle=interrupt))
    assert (tmp_path / "a task.stopped").exists()


def test_duplicates_are_those_found_here(cluster: Cluster, documents: list[Document], tmp_path: Path) -> None:
    signing = Signing(num_permutations=64)
    paths = []
    for number in range(3):
        texts = [d.text + "!" * (number if k % 3 == 0 else 0) for k, d in enumerate(documents) if k % 4 <= number + 1]
        paths.append(tmp_path / f"signatures {number}")
        paths[-1].write_bytes(signing.sign(_native.Block.from_texts(texts)).tobytes())
    here = find_duplicates(paths, tmp_path / "here", signing)
    there = find_duplicates(paths, tmp_path / "over there", signing, map_tasks=cluster.map)
    assert here.summary()["near_duplicates"] and here.summary()["exact_duplicates"]
    assert np.array_equal(here.roots, there.roots) and np.array_equal(here.repeated, there.repeated)
    assert here.summary() == there.summary()
