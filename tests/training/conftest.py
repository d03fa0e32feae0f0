"""A tiny corpus, tokenizer, dataset and model that every training test shares."""

from __future__ import annotations

import atexit
import functools
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from torch import Tensor

from megatron_cpt.checkpoint.chunks import BoxReader, DataFiles
from megatron_cpt.checkpoint.convert import convert
from megatron_cpt.checkpoint.metadata import Chunk, read_index, write_index
from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.config.schema import LlamaShape, TrainConfig
from megatron_cpt.data import Document, build_dataset
from megatron_cpt.training.job import run_job
from megatron_cpt.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SHAPE = LlamaShape(
    num_layers=8,
    hidden_size=32,
    ffn_hidden_size=88,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    max_position_embeddings=64,
)
STEPS = 8
LONGEST_SECONDS = 600  # of a call of `train_many`
GLOBAL_BATCH = 8


@dataclass(frozen=True)
class Tiny:
    """Paths of the shared inputs, and how to train on them."""

    root: Path
    tokenizer: Path
    hf: Path
    initial: Path

    def config(self, output: Path | str, **changes: Any) -> TrainConfig:
        """A job of a few fp32 steps; `changes` are whole sections or fields."""
        document: dict[str, Any] = {
            "output": str(output),
            "tokenizer": str(self.tokenizer),
            "initial_checkpoint": str(self.initial),
            "train_steps": STEPS,
            "precision": "fp32",
            "batch": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": GLOBAL_BATCH},
            "optimizer": {"learning_rate": 3e-3, "min_learning_rate": 3e-4, "warmup_steps": 2},
            "data": {
                "train": [
                    {"prefix": str(self.root / "a"), "language": "a", "weight": 3.0},
                    {"prefix": str(self.root / "b"), "language": "b", "weight": 1.0},
                ],
                "validation": [{"prefix": str(self.root / "held"), "language": "a"}],
                "loader_workers": 0,  # a process more for each rank of each job
            },
            "log_interval_steps": 1,
            **changes,
        }
        return TrainConfig.model_validate(document)

    def train_many(self, jobs: dict[str, dict[str, Any]], num_processes: int) -> dict[str, list[dict[str, Any]]]:
        """Run several jobs one after another in one set of processes: name -> changes; returns name -> metrics.

        A job named `failing-...` may fail; its error is in `<name>.error` beside its configuration.
        """
        paths = []
        for name, changes in jobs.items():
            config = self.config(**{"output": self.root / name, **changes})
            paths.append(str(self.root / f"{name}.json"))
            Path(paths[-1]).write_text(config.model_dump_json())
        log_folder = self.root / "logs" / f"{'-'.join(jobs)}.{num_processes}"
        while log_folder.exists():  # a job that goes on
            log_folder = log_folder.with_name(f"{log_folder.name}-more")
        trainer = start_trainer()
        if trainer.poll() is not None:  # a test that killed it has failed already
            start_trainer.cache_clear()
            trainer = start_trainer()
        assert trainer.stdin is not None and trainer.stdout is not None
        trainer.stdin.write(json.dumps([num_processes, str(log_folder), paths]) + "\n")
        trainer.stdin.flush()
        timer = threading.Timer(LONGEST_SECONDS, trainer.kill)
        timer.start()
        answer = trainer.stdout.readline()
        timer.cancel()
        assert answer, f"the process that trains has ended with code {trainer.wait()}"
        logs = [path.read_text(errors="replace")[-4000:] for path in sorted(log_folder.iterdir())]
        assert not json.loads(answer), "\n".join([json.loads(answer), *logs])
        errors = {path.stem: path.read_text() for path in self.root.glob("*.error") if path.stem in jobs}
        assert all(name.startswith("failing-") for name in errors), errors
        return {name: read_metrics(self.root / name) for name in jobs}

    def train(self, output: Path | str, num_processes: int = 1, **changes: Any) -> list[dict[str, Any]]:
        """Run a job and return its metrics."""
        run_job(self.config(output, **changes), num_processes)
        return read_metrics(output)


@functools.cache
def start_trainer() -> subprocess.Popen[str]:
    """Start the process that trains for `train_many`; it ends with its standard input, that is with this process."""
    command = [sys.executable, "-m", "tests.training.many_jobs"]
    trainer = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(trainer.communicate)
    return trainer


def write_documents(seed: int, count: int) -> list[Document]:
    """Documents of 3 to 40 made-up words: many shorter and some longer than a training sample."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    draw.seed(seed)
    return [Document(" ".join(draw.choices(words, k=draw.randint(3, 40))), "a", f"{seed}/{n}") for n in range(count)]


def write_tokenizer(folder: Path, documents: list[Document], vocab_size: int) -> None:
    """A SentencePiece model of exactly `vocab_size` pieces (without byte fallback, so it may be small)."""
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(document.text for document in documents),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        minloglevel=2,
    )


def make_tiny(root: Path, vocab_size: int, shape: LlamaShape = SHAPE) -> Tiny:
    """Write tokenizer, datasets and initial weights into `root`."""
    documents = {name: write_documents(seed, count) for seed, (name, count) in enumerate(DATASETS.items())}
    tiny = Tiny(root, root / "tokenizer", root / "hf", root / "initial")
    write_tokenizer(tiny.tokenizer, documents["a"] + documents["b"], vocab_size)
    for name, texts in documents.items():
        build_dataset(texts, tiny.tokenizer, root / name, name)
    write_random_hf(shape, vocab_size, 5, tiny.hf, 1, 2)
    convert(tiny.hf, tiny.initial, "torch_dist", tokenizer=tiny.tokenizer)
    return tiny


def change_stored(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Put other numbers in place of those of a tensor in a torch_dist folder."""
    tensors, objects = read_index(folder, lambda _: True)
    stored = tensors[name]
    origin = tuple(0 for _ in stored.size)
    with DataFiles(folder, "__changed") as files:
        place = files.save(change(BoxReader(folder).read(stored, origin, stored.size).clone()))
    chunk = Chunk(origin, stored.size, *place)
    write_index(folder, {**tensors, name: replace(stored, chunks=(chunk,))}, objects)


DATASETS = {"a": 200, "b": 100, "held": 10}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The shared inputs: vocabulary 250, which no TP size and no divisor likes."""
    return make_tiny(tmp_path_factory.mktemp("tiny inputs"), 250)


@pytest.fixture(scope="session")
def reference(tiny: Tiny) -> list[dict[str, Any]]:
    """Metrics of the one-process run that every layout has to equal."""
    return tiny.train(tiny.root / "reference")
