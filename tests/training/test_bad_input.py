"""Wrong input: one clear message, exit code 2, and every file as it was before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint.convert import convert
from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.cli.main import main
from megatron_cpt.data import SamplePlan, build_dataset
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.training.folder import last_checkpoint
from megatron_cpt.training.metrics import read_metrics
from tests.training.conftest import GLOBAL_BATCH, SHAPE, Tiny, write_documents, write_tokenizer

Refused = Callable[..., str]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of a folder and of everything in it."""
    stats = {str(path): path.stat() for path in sorted([folder, *folder.rglob("*")]) if path.exists()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Refused]:
    """Calls `train` with changes; returns the error after checking code 2 and that nothing was written."""
    output = tmp_path / "run"

    def refuse(*options: str, **changes: Any) -> str:
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({**tiny.config(output).model_dump(mode="json"), **changes}))
        before = snapshot(output)
        assert main(["train", str(config), *options]) == 2
        assert snapshot(output) == before
        out, error = capsys.readouterr()
        assert out == "" and error.startswith("error: ") and "Traceback" not in error
        return error.removeprefix("error: ").strip()

    yield refuse


@pytest.fixture(scope="module")
def stranger(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tokenizer of the same size, and one of another size, each with a dataset."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, size, seed in (("same", 250, 7), ("other", 240, 0)):
        documents = write_documents(seed, 100)
        write_tokenizer(folder / name, documents, size)
        build_dataset(documents, folder / name, folder / f"data-{name}", "a")
    return folder


def source(prefix: Path) -> dict[str, Any]:
    return {"train": [{"prefix": str(prefix), "language": "a", "weight": 1.0}]}


def test_checkpoint_of_a_tokenizer_of_another_size(refused: Refused, stranger: Path, tiny: Tiny) -> None:
    for initial in (tiny.initial, tiny.hf):
        message = refused(tokenizer=str(stranger / "other"), initial_checkpoint=str(initial))
        assert message.startswith(f"{initial} has 250 vocabulary rows but the tokenizer {stranger / 'other'}")
        assert message.endswith("240 pieces; they are not of the same model: run surgery first, or give its tokenizer")


def test_checkpoint_of_another_tokenizer_of_the_same_size(refused: Refused, stranger: Path, tiny: Tiny) -> None:
    message = refused(tokenizer=str(stranger / "same"))
    assert message.startswith(f"{tiny.initial} was made for another tokenizer")
    assert "though their sizes agree; give the one it was made for" in message


def test_dataset_of_another_tokenizer(refused: Refused, stranger: Path) -> None:
    for name in ("same", "other"):
        message = refused(data=source(stranger / f"data-{name}"))
        assert message.startswith(f"{stranger / f'data-{name}'} was built with another tokenizer")
        assert message.endswith("build it again with `data build --tokenizer`")


def test_validation_set_without_bos(refused: Refused, tiny: Tiny, tmp_path: Path) -> None:
    """Its documents' first tokens are never scored, so their bytes must not count."""
    build_dataset(write_documents(2, 5), tiny.tokenizer, tmp_path / "bare", "a", append_bos=False)
    held_out = [{"prefix": str(tmp_path / "bare"), "language": "a"}]
    message = refused(data={**source(tiny.root / "a"), "validation": held_out})
    assert message.startswith(f"{tmp_path / 'bare'} was built without bos")
    assert message.endswith("build the held-out set again with `data build --bos`")


def test_what_does_not_exist(refused: Refused, tiny: Tiny) -> None:
    missing = tiny.root / "missing"
    assert str(missing) in refused(data=source(missing))
    assert str(missing) in refused(tokenizer=str(missing))
    assert str(missing) in refused(initial_checkpoint=str(missing))


@pytest.mark.parametrize(
    ("nproc", "changes", "message"),
    [
        (3, {"tensor_model_parallel_size": 3}, "tensor_model_parallel_size=3 does not divide num_attention_heads=4"),
        (2, {"tensor_model_parallel_size": 4}, "num_query_groups=2; the nearest that divides heads, groups and ffn"),
        (3, {"tensor_model_parallel_size": 2}, "the nearest number of processes that works is 4"),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, "needs overlap_p2p=true"),
        (1, {"sequence_parallel": True}, "sequence_parallel needs tensor_model_parallel_size > 1, got 1"),
        (3, {}, "global_batch_size=8 is not micro_batch_size x data-parallel size = 2 x 3 = 6"),
    ],
)
def test_impossible_layout(nproc: int, changes: dict[str, Any], message: str, refused: Refused) -> None:
    assert message in refused("--nproc", str(nproc), parallel=changes)


@pytest.mark.parametrize(
    ("batch", "parallel", "message"),
    [
        ({"seq_length": 32, "micro_batch_size": 3, "global_batch_size": 16}, {}, "the nearest that works is 15"),
        ({"seq_length": 65, "micro_batch_size": 2, "global_batch_size": 16}, {}, "max_position_embeddings=64"),
        (
            {"seq_length": 33, "micro_batch_size": 2, "global_batch_size": 16},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "the nearest that divides is seq_length=34",
        ),
    ],
)
def test_impossible_batch(batch: dict[str, int], parallel: dict[str, Any], message: str, refused: Refused) -> None:
    nproc = parallel.get("tensor_model_parallel_size", 1)
    assert message in refused("--nproc", str(nproc), batch=batch, parallel=parallel)


def test_shape_that_is_not_the_checkpoints(refused: Refused) -> None:
    message = refused(shape={**SHAPE.model_dump(), "num_layers": 7})
    assert message.startswith("shape is not that of initial_checkpoint=")


def test_output_of_someone_else(refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.write_text("a file")
    assert refused() == f"{output} is a file; choose another output folder"
    output.unlink()
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    assert refused() == f"{output} is not empty (thesis.tex) and holds no training run; choose another output folder"
    (output / "run.json").write_text('{"name": "quickstart", "config_hash": "0"}')
    assert refused() == f"{output / 'run.json'} is not of a training run; choose another output folder"
    (output / "run.json").write_text('{"name": "quick')
    assert "is not valid JSON" in refused()


def test_two_jobs_in_one_folder(refused: Refused, tmp_path: Path, tiny: Tiny) -> None:
    output = tmp_path / "run"
    (output / "logs").mkdir(parents=True)
    (output / "logs" / "rank_0.log").write_text("the first job's words")
    with lock_folder(output):
        for initial in (tiny.initial, tiny.hf):
            message = refused(initial_checkpoint=str(initial))
            assert message == f"another job is running in {output}; wait for it or choose another folder"


def damage(tiny: Tiny, folder: Path, sample: int) -> Path:
    """A copy of dataset "a" in which one token of training sample `sample` is no id of the vocabulary."""
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(tiny.root / f"a.{ending}", folder / f"a.{ending}")
    prefix = folder / "a"
    plan = SamplePlan([(prefix, "a", 1.0)], 32, seed=1)
    stream = np.memmap(f"{prefix}.bin", dtype="<u2", mode="r+")
    stream[plan.place(sample).window * 32 + 5] = 300
    stream.flush()
    return prefix


def test_token_outside_the_vocabulary_ends_the_job(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank of two meets it after the checkpoint of step 2; its reason is told, and the checkpoint stays."""
    prefix = damage(tiny, tmp_path, sample=2 * GLOBAL_BATCH + 3)
    saves = {"save_interval_steps": 2}
    config = tiny.config(tmp_path / "run", data={**source(prefix), "validation": []}, checkpoint=saves)
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    assert main(["train", str(tmp_path / "config.yaml"), "--nproc", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {prefix}.bin: ") and error.endswith("expected 0 to 249; build the dataset again\n")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    reader = open_torch_dist(last_checkpoint(tmp_path / "run"))
    assert reader.stated["step"] == 2 and all(reader.read(name).isfinite().all() for name in reader.names())


def test_a_loss_or_gradient_that_is_no_number_is_never_saved(tiny: Tiny) -> None:
    """A huge learning rate spoils the second step: the loss itself, or, with a huge head, the gradient alone."""
    shutil.copytree(tiny.hf, tiny.root / "huge head")
    weights = load_file(tiny.root / "huge head" / "model.safetensors")
    weights["lm_head.weight"] *= 1e17  # the loss is finite, and so is a first gradient, 1e17 and not 1e20
    save_file(weights, tiny.root / "huge head" / "model.safetensors", {"format": "pt"})
    convert(tiny.root / "huge head", tiny.root / "huge", "torch_dist", tokenizer=tiny.tokenizer)
    rates = {"failing-loss": 1e12, "failing-gradient": 1e3, "failing-unsaved": 1e12}
    jobs: dict[str, dict[str, Any]] = {
        name: {
            "optimizer": {"learning_rate": rate, "min_learning_rate": 1e-3},
            "checkpoint": {"save_interval_steps": None if name == "failing-unsaved" else 1},
        }
        for name, rate in rates.items()
    }
    jobs["failing-gradient"]["initial_checkpoint"] = str(tiny.root / "huge")
    metrics = tiny.train_many(jobs, 1)
    unsaved = (tiny.root / "failing-unsaved.error").read_text()
    assert "loss of step 2 is nan; no update was made; there is no checkpoint yet: lower the learning rate" in unsaved
    for name, message in {
        "failing-loss": "loss of step 2 is nan",
        "failing-gradient": "gradient norm of step 2",
    }.items():
        error = (tiny.root / f"{name}.error").read_text()
        assert error.startswith(f"TrainingError: the {message}") and "lower the learning rate" in error
        assert f" and {last_checkpoint(tiny.root / name)} holds the last good state: " in error
        assert [record["step"] for record in metrics[name]] == [0, 1]
        reader = open_torch_dist(last_checkpoint(tiny.root / name))
        assert reader.stated["step"] == 1 and all(reader.read(tensor).isfinite().all() for tensor in reader.names())


def test_hf_checkpoint_with_its_own_tokenizer(refused: Refused, stranger: Path, tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny.initial, tmp_path / "hf", "hf", tokenizer=tiny.tokenizer)
    message = refused(tokenizer=str(stranger / "same"), initial_checkpoint=str(tmp_path / "hf"))
    assert message.startswith(f"{tmp_path / 'hf'} was made for another tokenizer")
