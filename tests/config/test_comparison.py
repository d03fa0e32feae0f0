"""Comparisons: what an arm is, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.config.comparison import load_comparison, run_with_seed
from megatron_cpt.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "comparisons").glob("*.yaml"))
TEXTS = ("data.source=en.txt", "data.target=ja.txt")


def load(tmp_path: Path, arms: dict[str, Any], *overrides: str, **more: Any) -> Any:
    path = tmp_path / "comparison.yaml"
    path.write_text(json.dumps({"extends": "real-text", "arms": arms, **more}))
    return load_comparison(path, [*TEXTS, *overrides]).config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    config = load_comparison(path, TEXTS).config
    assert list(config.seeds) == [1, 2, 3]
    assert set(config.controls) <= set(config.arms)


def test_an_arm_is_the_shared_run_with_its_changes(tmp_path: Path) -> None:
    surgery = {"embedding": "normal", "head": "mean", "calibration": {"prior_tokens": 3000, "seq_length": 1000}}
    hot = {"surgery": surgery, "train": {"optimizer": {"learning_rate": 0.5}}}
    config = load(tmp_path, {"mean": {}, "hot": hot, "plain": {"tokenizer": "base"}}, output="out", seed=4)
    assert config.controls == ("mean",) and list(config.seeds) == [4, 5, 6]
    shared = run_with_seed(config, 5).config
    assert (shared.output, shared.seed, shared.train) == ("out/seed5", 5, config.train)
    made = run_with_seed(config, 5, "hot").config
    assert made.train.optimizer.learning_rate == 0.5 and made.train.optimizer.min_learning_rate == 5e-5
    assert made.train.train_steps == 240 - 2, "3,000 tokens are two steps of 2,048"
    assert made.surgery.model_dump()["embedding"]["seed"] == 2, "drawn anew with the second seed"
    assert run_with_seed(config, 4, "plain").config.tokenizer.method == "none"
    assert shared.surgery.calibration is None and config.steps_of_calibration("mean") == 0, "it states none"
    same = made.model_dump(exclude={"train", "surgery"})
    assert same == shared.model_dump(exclude={"train", "surgery"})


@pytest.mark.parametrize(
    ("arms", "more", "words"),
    [
        ({"a": {}}, {"control": "b"}, "control: got 'b', expected an arm: a"),
        ({}, {}, "arms: got {}, expected"),
        ({"a b": {}}, {}, "a name of letters, digits, '-' and '_'"),
        ({"a": {"surgry": {}}}, {}, "arms.a.surgry: unknown key"),
        (
            {"a": {"surgery": {"embedding": "meen"}}},
            {},
            """arms.a.surgery.embedding: got {"method": "meen"}, expected one of 'mean'""",
        ),
        ({"a": {"scratch": True, "tokenizer": "base"}}, {}, "arms.a: got scratch and also tokenizer: base"),
        ({"a": {"scratch": True, "surgery": {}}}, {}, "arms.a: got surgery for an arm that begins without"),
        ({"a": {"train": {"train_steps": 3}}}, {}, "arms.a.train.train_steps: arms are compared at the same steps"),
        ({"a": {"train": {"optimiser": {}}}}, {}, "arms.a: train.optimiser: unknown key"),
        (
            {"a": {"train": {"optimizer": {"learning_rate": -1}}}},
            {},
            "give --set arms.a.train.optimizer.learning_rate=VALUE",
        ),
        (
            {"a": {"surgery": {"head": {"method": "clp", "helper": "trained"}}}},
            {},
            "arms.a: names the 'trained' helper, but there is no `helper` with shape and train",
        ),
        (
            {"a": {"surgery": {"embedding": {"method": "normal", "copy_kept": False}, "calibration": {}}}},
            {},
            "arms.a.surgery: got calibration, which is of new pieces alone",
        ),
        ({"a": {}}, {"tokenizer": {"method": "none"}}, "tokenizer.method: got none, expected extend or replace"),
        (
            {"a": {"surgery": {"calibration": {"steps": 1000}}}},
            {},
            "arms.a: calibration reads the tokens of 509 steps, all of train.train_steps = 240",
        ),
    ],
)
def test_refused_in_words(tmp_path: Path, arms: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, arms, **more)
    assert words in str(caught.value)


def test_lists_of_texts_for_a_method(tmp_path: Path) -> None:
    """A list in a file, as one name: both are texts of the method."""
    for given in ("a.txt", ["a.txt"]):
        config = load(tmp_path, {"a": {"surgery": {"embedding": {"method": "focus", "target_corpus": given}}}})
        assert config.surgery_of("a").embedding.files == ("a.txt",)
