"""Every example runs, or is checked as far as it can be without the machines it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.config.loading import load_config
from megatron_cpt.config.schema import LlamaShape, RunConfig, TrainConfig
from megatron_cpt.data.world import World
from megatron_cpt.planning import plan_job
from megatron_cpt.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SHAPE = LlamaShape(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8
)
LLAMA_2_7B = LlamaShape(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32, head_dim=128
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which `megatron-cpt` is this source tree."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "megatron-cpt"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_cpt.cli.main "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("script", sorted([*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")]), ids=lambda p: p.name)
def test_script_is_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_file_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    files = [str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.*") if path.name != "README.md"]
    assert [name for name in files if f"({name})" not in table] == []


def test_train_job_fits_a_7b_on_eight_gpus() -> None:
    config = load_config(EXAMPLES / "train_job.yaml", TrainConfig).config
    plan = plan_job(config, LLAMA_2_7B, 43176, config.vocab_divisor, 8)
    assert plan["layout"]["name"] == "TP2-PP1-DP4"
    assert plan["tokens"]["total"] == 25000 * 1024 * 4096
    assert max(rank["total_bytes"] for rank in plan["memory"]) < 80 * 2**30


def test_quickstart_script_names_what_the_run_makes() -> None:
    script = (EXAMPLES / "quickstart.sh").read_text()
    assert "megatron-cpt run quickstart" in script
    load_config("quickstart", RunConfig)


def test_by_hand(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "a path with spaces"
    folder.mkdir()
    texts = {}
    for language in ("en", "ja"):
        documents = list(World(1).documents(language, 150))
        texts[language] = folder / f"{language}.jsonl"
        lines = [json.dumps({"id": document.id, "text": document.text}) for document in documents]
        texts[language].write_text("\n".join(lines) + "\n")
    train_tokenizer((document.text for document in World(1).documents("en", 150)), 600, folder / "base")
    write_random_hf(SHAPE, 600, 1, folder / "base", 1, 2)
    command = ["bash", str(EXAMPLES / "by_hand.sh"), folder / "base", texts["en"], texts["ja"], folder / "out", "2"]
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "out" / "hf" / "config.json").exists()
    config = json.loads((folder / "out" / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["vocab_size"] % 8 == 0


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda p: p.name)
def test_tool_is_its_verb(tool: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, str(tool), "--help"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout.lower()
    assert len(tool.read_text().splitlines()) <= 40
