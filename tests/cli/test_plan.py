"""`plan` and `run --dry-run`: refused is what could not run, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.cli.main import main
from megatron_cpt.config.schema import LlamaShape


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """The words that put a base of 64 positions under the quickstart."""
    shape = LlamaShape(
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    write_random_hf(shape, 256, 1, tmp_path / "base", 1, 2)
    settings = [f"base.path={tmp_path / 'base'}", "base.shape=null", "base.train=null", f"output={tmp_path / 'run'}"]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("verb", [["plan"], ["run", "--dry-run"]])
def test_samples_longer_than_the_base_can_read(
    verb: list[str], base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb[0], "quickstart", *verb[1:], *base, "--set"]
    assert main([*words, "train.batch.seq_length=128"]) == 2
    message = "error: train: batch.seq_length=128 is longer than the model's max_position_embeddings=64; shorten it"
    printed = capsys.readouterr()
    assert printed.err.strip() == message and not printed.out
    assert main([*words, "train.batch.seq_length=64"]) == 0
    assert not (tmp_path / "run").exists()


def test_texts_that_are_not_there(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run of `run` looks for them; `plan` needs no data."""
    there, missing = tmp_path / "there.txt", tmp_path / "missing.txt"
    there.write_text("text\n")
    texts = ["data.builtin=null", f"data.source={there}", f"data.target={missing}", "train.batch.seq_length=64"]
    words = ["quickstart", *base, *(word for text in texts for word in ("--set", text))]
    assert main(["plan", *words]) == 0
    capsys.readouterr()
    assert main(["run", "--dry-run", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {missing} does not exist") and not printed.out
    missing.write_text("text\n")
    assert main(["run", "--dry-run", *words]) == 0
    assert not (tmp_path / "run").exists()
