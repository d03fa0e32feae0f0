"""The loader: the batches of the schedule, whatever happens to the processes that prepare them."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data import Batch, Document, IndexedDataset, Sample, SamplePlan, batch, build_dataset
from megatron_cpt.data.loader import Loader
from megatron_cpt.errors import DataError, TrainingError
from tests.runtime.test_launcher import is_alive, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan(documents: list[Document], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> SamplePlan:
    folder = tmp_path_factory.mktemp("loader")
    for name, part in {"a": documents[:70], "b": documents[70:]}.items():
        build_dataset(part, tokenizer, folder / name, name)
    return SamplePlan([(folder / "a", "a", 3.0), (folder / "b", "b", 1.0)], 32, 5)


@dataclass(frozen=True)
class Fatal:
    """The samples of another plan, but number `deadly` ends the process `times` times, in the way of `how`."""

    plan: SamplePlan
    deadly: int
    times: int
    how: str
    folder: Path

    def sample(self, number: int) -> Sample:
        if number == self.deadly and (died := len(list(self.folder.iterdir()))) < self.times:
            (self.folder / str(died)).touch()
            if self.how == "signal":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "exit":
                sys.exit(7)
            raise RuntimeError("a defect")
        return self.plan.sample(number)


def schedule(count: int, size: int = 3) -> Iterator[range]:
    """Every other sample number, as one of two ranks would have it."""
    return (range(2 * k * size, (2 * k + 1) * size) for k in range(count))


def same(ours: Batch, other: Batch) -> bool:
    fields = ("tokens_N", "labels_N", "cu_seqlens", "position_ids_N", "sources")
    return all(np.array_equal(getattr(ours, name), getattr(other, name)) for name in fields)


def expected(plan: SamplePlan, count: int) -> Iterator[Batch]:
    return (batch([plan.sample(number) for number in numbers]) for numbers in schedule(count))


@pytest.mark.parametrize(("num_workers", "prefetch"), [(0, 8), (1, 1), (1, 8), (3, 7), (2, 1), (2, 100)])
def test_the_batches_are_those_of_the_schedule(plan: SamplePlan, num_workers: int, prefetch: int) -> None:
    with Loader(plan, schedule(20), num_workers, prefetch) as loader:
        made = list(loader)
    assert len(made) == 20 and all(map(same, made, expected(plan, 20)))
    assert all(getattr(each, name).flags.writeable for each in made for name in ("tokens_N", "labels_N"))


def test_an_endless_schedule_is_asked_no_further_than_said(plan: SamplePlan) -> None:
    asked = []
    endless = (asked.append(k) or range(k, k + 1) for k in itertools.count())
    with Loader(plan, endless, 1, 4) as loader:
        for _ in range(3):
            next(loader)
    assert asked == list(range(7))


def test_killed_workers_lose_and_repeat_nothing(plan: SamplePlan) -> None:
    draw = random.Random(3)
    with Loader(plan, schedule(60), 2, 6) as loader:
        first = set(loader.worker_ids)
        for number, due in enumerate(expected(plan, 60)):
            if number % 6 == 0:
                os.kill(draw.choice(loader.worker_ids), signal.SIGKILL)
            assert same(next(loader), due)
        assert not first & set(loader.worker_ids)
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("how", ["signal", "exit", "defect"])
def test_a_batch_that_is_fatal_twice_is_made_in_the_end(plan: SamplePlan, how: str, tmp_path: Path) -> None:
    with Loader(Fatal(plan, 25, 2, how, tmp_path), schedule(10), 1, 5) as loader:
        assert all(map(same, loader, expected(plan, 10)))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_batch_that_is_fatal_three_times_ends_the_job(plan: SamplePlan, tmp_path: Path) -> None:
    with Loader(Fatal(plan, 25, 99, "signal", tmp_path), schedule(10), 1, 5) as loader:
        made = list(itertools.islice(loader, 4))
        assert all(map(same, made, expected(plan, 4)))
        with pytest.raises(TrainingError, match=r"ended 3 times over samples \[24, 25, 26\] \(killed by SIGKILL\)"):
            next(loader)


class Unreadable(DataError):
    """An error that goes out of a process and does not come in again: it is made of two things, and holds one."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


@dataclass(frozen=True)
class Refusing:
    """Samples that are all refused."""

    def sample(self, number: int) -> Sample:
        raise Unreadable("sample ", str(number))


def test_an_answer_that_cannot_be_read_ends_the_job() -> None:
    """In a process of its own, which is given up where it waits for ever."""
    code = (
        "from megatron_cpt.data.loader import Loader; from megatron_cpt.errors import TrainingError\n"
        "from tests.data.test_loader import Refusing\n"
        "try:\n    with Loader(Refusing(), [[1]]) as loader: next(loader)\n"
        "except TrainingError as caught: print(caught)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert "cannot be read: TypeError" in done.stdout, done.stderr


def test_damaged_data_is_told_as_it_is_where_it_is_met(
    documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    plan = SamplePlan([(tmp_path / "x", "xx", 1.0)], 32, 5)
    place = next(k for k in range(100) if plan.place(k).window == 10)
    stream = np.fromfile(tmp_path / "x.bin", "<u2")
    stream[330] = 60_000
    stream.tofile(tmp_path / "x.bin")
    for num_workers in (0, 1):
        with (
            Loader(plan, ([k] for k in range(100)), num_workers) as loader,
            pytest.raises(DataError, match="60000") as told,
        ):
            for number in range(100):  # noqa: B007 - looked at below
                next(loader)
        assert number == place and "at token 330, expected 0 to" in str(told.value)


def test_a_dataset_that_is_gone_is_told(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    plan = SamplePlan([(tmp_path / "x", "xx", 1.0)], 32, 5)
    (tmp_path / "x.idx").unlink()
    with Loader(plan, schedule(10)) as loader, pytest.raises(DataError, match=r"x\.idx is missing"):
        next(loader)


def test_workers_are_light_and_end_with_the_loader(plan: SamplePlan) -> None:
    with Loader(plan, schedule(10), 2) as loader:
        next(loader)
        workers = loader.worker_ids
        assert all(is_alive(pid) for pid in workers)
        assert not any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in workers)
    assert not any(map(is_alive, workers))
    with contextlib.suppress(DataError), Loader(plan, schedule(10)) as loader:
        workers = loader.worker_ids
        raise DataError("the job fails")
    assert not any(map(is_alive, workers))


def test_workers_do_not_outlive_a_job_that_is_killed(plan: SamplePlan) -> None:
    prefixes = [dataset.prefix for dataset in plan.datasets]
    program = (
        "import itertools, sys, time\n"
        "from megatron_cpt.data import SamplePlan\n"
        "from megatron_cpt.data.loader import Loader\n"
        "plan = SamplePlan([(prefix, 'xx', 1.0) for prefix in sys.argv[1:]], 32, 5)\n"
        "loader = Loader(plan, ([k] for k in itertools.count()), 2, 500)\n"
        "next(loader), next(loader)\n"
        "print(*loader.worker_ids, flush=True)\n"
        "time.sleep(60)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", program, *prefixes], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    workers = [int(pid) for pid in job.stdout.readline().split()]
    assert len(workers) == 2 and all(map(is_alive, workers))
    job.kill()
    job.communicate()
    assert wait_until(lambda: not any(map(is_alive, workers)))


def test_a_plan_travels_without_its_tokens(plan: SamplePlan) -> None:
    letter = pickle.dumps(plan)
    assert len(letter) < 4000
    assert same(*(batch([each.sample(7)]) for each in (plan, pickle.loads(letter))))
    assert isinstance(plan.datasets[0], IndexedDataset)
