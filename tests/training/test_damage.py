"""Files of a run that were damaged from outside: the message names the file and says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.errors import InputError
from megatron_cpt.training.folder import checkpoint_folders
from megatron_cpt.training.metrics import MetricsLog, read_metrics
from megatron_cpt.training.worker import main as run_rank
from tests.training.conftest import Tiny


def test_a_rank_tells_what_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_rank([str(tmp_path)]) == 2
    expected = f"error: {tmp_path}: Is a directory; a folder stands where a file is needed; choose another path\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "lo', "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ('{"loss": 2.0}', "is not the record of a step; remove this line"),
        ("[]", "is not the record of a step; remove this line"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n' + line + '\n{"step": 3}\n{"step": 4, "lo'
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        MetricsLog(tmp_path, 10, 3)
    assert str(caught.value).startswith(f"{path}:2 {message}")


def test_a_last_line_that_was_cut_off_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsLog(tmp_path, 10, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_truncated_checkpoint_is_named(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Following the advice works, and the save that follows removes what an earlier one has left."""
    config = tiny.config(tmp_path / "run", train_steps=2, checkpoint={"save_interval_steps": 1})
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    command = ["train", str(tmp_path / "config.yaml")]
    assert main(command) == 0
    (_, first), (_, last) = checkpoint_folders(tmp_path / "run")
    (last / "manifest.json").unlink()
    for file in first.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {first} is damaged (") and error.count("\n") == 1
    assert error.endswith("); remove this checkpoint folder and start again: the run goes on from the one before\n")

    shutil.rmtree(first)
    cut_off = first.with_name(".iter_0000007.tmp")
    cut_off.mkdir()
    assert main(command) == 0
    assert sorted(path.name for path in first.parent.iterdir()) == ["iter_0000001", "iter_0000002"]
