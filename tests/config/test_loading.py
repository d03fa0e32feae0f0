"""Loading: layers, origins, strict types, errors that name the key and the way out."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_cpt.config.layers import parse_yaml, recipe_names
from megatron_cpt.config.loading import Resolved, load_any_config, load_config
from megatron_cpt.config.schema import RunConfig, Section, TrainConfig
from megatron_cpt.errors import ConfigError

TRAIN = """
output: runs/job
tokenizer: tok
train_steps: 10
initial_checkpoint: base
data:
  train:
    - {prefix: a, language: en, weight: 1}
    - {prefix: b, language: ja, weight: 3}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: Any, *overrides: str, model: type[BaseModel] = RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, model, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str) -> None:
    files = [] if name == "quickstart" else ["data.source=a.jsonl", "data.target=b.jsonl"]
    assert load_config(name, RunConfig, files).config.name == name


def test_values_come_from_the_nearest_layer_and_say_so(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "extends: quickstart\ntrain: {train_steps: 7, replay: 0.2}\n")
    mine = write(
        tmp_path / "mine.yaml",
        "extends: base.yaml\nname: mine\ntrain: {train_steps: 8, optimizer: {warmup_steps: 0}}\n",
    )
    resolved = load_config(mine, RunConfig, ["train.replay=0.3", "train.replay=0.4"])
    assert (resolved.config.train.train_steps, resolved.config.train.replay) == (8, 0.4)
    assert resolved.config.train.optimizer.learning_rate == 1e-3
    assert resolved.origins["train.train_steps"] == f"file {mine}"
    assert resolved.origins["train.replay"] == "--set"
    assert resolved.origins["output"] == "recipe quickstart"
    assert resolved.origins["train.optimizer.clip_grad"] == "default"
    assert resolved.origins["base.shape.num_layers"] == "recipe quickstart"


def test_null_removes_a_section_and_a_later_layer_brings_it_back(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "extends: quickstart\nbase: {path: model, shape: null, train: null}\n")
    assert load_config(mine, RunConfig).config.base.shape is None
    again = [f"base.shape.{key}=4" for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")]
    again += ["base.shape.num_query_groups=4", "base.shape.head_dim=4", "base.train.train_steps=30", "base.path=null"]
    assert load_config(mine, RunConfig, again).config.base.shape is not None


def test_a_section_that_was_removed_leaves_no_origin_behind() -> None:
    overrides = ["train.optimizer.clip_grad=2", "train.optimizer=null", "train.optimizer={warmup_steps: 3}"]
    resolved = load_config("quickstart", RunConfig, overrides)
    assert resolved.config.train.optimizer.clip_grad == 1.0
    assert resolved.origins["train.optimizer.clip_grad"] == "default"
    assert resolved.origins["train.optimizer.warmup_steps"] == "--set"


def test_set_reaches_into_lists(tmp_path: Path) -> None:
    job = write(tmp_path / "job.yaml", TRAIN)
    resolved = load_config(job, TrainConfig, ["data.train.1.weight=9"])
    assert [source.weight for source in resolved.config.data.train] == [1, 9]
    assert resolved.origins["data.train.1.weight"] == "--set"
    assert resolved.origins["data.train.0.weight"] == f"file {job}"
    assert "got the place '2'" in refusal(job, "data.train.2.weight=9", model=TrainConfig)


def test_the_document_says_which_kind_it_is(tmp_path: Path) -> None:
    assert isinstance(load_any_config(write(tmp_path / "job.yaml", TRAIN)).config, TrainConfig)
    assert isinstance(load_any_config("quickstart").config, RunConfig)


@pytest.mark.parametrize("without", ["", "tokenizer: tok\n"])
def test_a_job_without_its_steps_is_still_a_job(without: str, tmp_path: Path) -> None:
    job = write(tmp_path / "job.yaml", TRAIN.replace("train_steps: 10\n", "").replace(without, ""))
    with pytest.raises(ConfigError) as caught:
        load_any_config(job)
    missing = ["train_steps"] + (["tokenizer"] if without else [])
    assert str(caught.value).count(": got nothing, expected a value") == len(missing)
    assert all(f"{name}: got nothing" in str(caught.value) for name in missing) and "unknown" not in str(caught.value)


def test_a_job_without_data_and_steps_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 problems:\n  train_steps: got nothing.*\n  data: got nothing"):
        load_any_config(write(tmp_path / "job.yaml", "output: runs/job\ntokenizer: tok\n"))


def test_hash_is_of_the_values_alone(tmp_path: Path) -> None:
    recipe = load_config("quickstart", RunConfig)
    copy = load_config(write(tmp_path / "copy.yaml", recipe.dump()), RunConfig)
    assert copy.hash == recipe.hash and copy.config == recipe.config
    assert load_config("quickstart", RunConfig, ["seed=2"]).hash != recipe.hash
    assert load_config("quickstart", RunConfig, ["train.optimizer.clip_grad=1"]).hash == recipe.hash


def test_dump_names_the_origin_of_each_value() -> None:
    lines = load_config("quickstart", RunConfig, ["seed=9"]).dump().splitlines()
    assert [line.split("#")[1].strip() for line in lines if line.startswith("seed: 9 ")] == ["--set"]
    assert sum("# " not in line for line in lines) == sum(line.endswith(":") for line in lines)


class Sample(Section):
    text: str
    texts: tuple[str, ...]
    number: float
    whole: int
    nothing: None = None


TEXT = st.text(alphabet=string.printable + "äあ漢：😀'\"#", max_size=12)


@settings(max_examples=80, deadline=None)
@given(text=TEXT, texts=st.lists(TEXT, min_size=1, max_size=3), number=st.floats(1e-12, 1e12), whole=st.integers(0))
def test_dump_loads_back_to_equal_values(text: str, texts: list[str], number: float, whole: int) -> None:
    sample = Sample(text=text, texts=tuple(texts), number=number, whole=whole)
    origins = dict.fromkeys(sample.model_dump(), "default")
    values = parse_yaml(Resolved(sample, origins, "").dump(), "dump")
    assert Sample.model_validate(values) == sample
    assert type(values["number"]) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("true", True), ("007", "007"), ("1_000", 1000)]
    + [("2024-01-02", "2024-01-02"), ("null", None), ("", None), ("-.5", -0.5), ("[a, 1]", ["a", 1]), ("1.", 1.0)],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.batch.seq_lengh=3",
            "train.batch.seq_lengh: unknown key (from --set); did you mean train.batch.seq_length?",
        ),
        ("trian.train_steps=3", "trian: unknown key (from --set); did you mean train?"),
        (
            "base.train.learning_rate=1",
            "did you mean base.train.optimizer.learning_rate or surgery.calibration.learning_rate or train.optimizer",
        ),
        (
            "surgery.zzz=1",
            "surgery.zzz: unknown key (from --set); expected one of embedding, head, calibration; remove it",
        ),
        ("train.train_steps=true", "train.train_steps: got true, expected a whole number; change the --set"),
        ('train.train_steps="3"', 'train.train_steps: got "3", expected a whole number'),
        ("train.train_steps=0", "train.train_steps: got 0, expected a number greater than 0"),
        ("train.precision=fp8", "train.precision: got \"fp8\", expected 'fp32' or 'bf16'"),
        ("train.batch=3", "train.batch: got 3, expected keys with values"),
        ("base.shape.head_dim=null", "base.shape.head_dim: got null, expected a whole number"),
        ("data.source=[1]", "data.source.0: got 1, expected text"),
        ("train.train_steps", "expected path.to.key=value"),
        (".x=1", "expected path.to.key=value"),
        ("output=[a", "--set output=[a: not valid YAML"),
    ],
)
def test_bad_override_is_named_with_the_way_out(override: str, expected: str) -> None:
    message = refusal("quickstart", override)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_each_problem_has_one_line(tmp_path: Path) -> None:
    text = "extends: quickstart\ntrain: {train_steps: many, colour: red}\ndata: {source: 3}\n"
    message = refusal(write(tmp_path / "bad.yaml", text))
    header, *lines = message.splitlines()
    assert header == f"{tmp_path / 'bad.yaml'} has 3 problems:"
    assert sorted(line.split(":")[0].strip() for line in lines) == ["data.source", "train.colour", "train.train_steps"]
    assert f"change it in file {tmp_path / 'bad.yaml'} or give --set train.train_steps=VALUE" in message


def test_missing_values_are_asked_for(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "empty.yaml", ""))
    assert "name: got nothing, expected a value; add it to the file or give --set name=VALUE" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nseed: 1\nname: b\n", "bad.yaml:3:1: not valid YAML: the key 'name' stands twice"),
        ("name: a\n  seed: 1\n", "bad.yaml:2:7: not valid YAML"),
        ("- a\n", "holds a list, expected keys with values"),
        ("extends: [quickstart]\n", "'extends' got ['quickstart'], expected one recipe name or one path"),
        ("extends: bad.yaml\n", "'extends' goes in a circle"),
        ("extends: quickstat\n", "did you mean the recipe 'quickstart'?"),
        ("seed: !!set {a}\n", "not JSON serializable"),
        ("seed: !!python/name:os.system\n", "not valid YAML"),
    ],
)
def test_broken_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path / "bad.yaml", text))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    assert "did you mean the recipe 'quickstart'?" in refusal("quikstart")
    assert "is a folder" in refusal(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\n")
    assert "is not UTF-8 (byte 6)" in refusal(binary)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.builtin=null"], "data: got no source and no target text; give --set data.source=FILE and"),
        (["data.source=x"], "data: got builtin and also source or target"),
        (["data.target_language=en"], "both 'en'; expected two languages"),
        (["base.shape=null"], "base: got neither a path nor both shape and train"),
        (["base.path=model"], "base: got a path and also shape or train"),
        (["train.batch.seq_length=4096"], "train.batch.seq_length: got 4096, expected at most the shape's"),
        (
            ["train.optimizer.warmup_steps=9999"],
            "train.optimizer.warmup_steps: got 9999, expected at most train.train_steps",
        ),
        (
            ["train.precision=fp32", "train.kernels.cross_entropy_logits=fp16"],
            "train.kernels.cross_entropy_logits: got fp16 with train.precision fp32",
        ),
        (
            ["surgery.head={method: normal, copy_kept: false}"],
            "surgery: got calibration, which is of new pieces alone, and also copy_kept: false",
        ),
        (["surgery.calibration.prior_tokens=0"], "expected prior_tokens or steps above 0, or null"),
        (
            ["base.train.optimizer.min_learning_rate=1"],
            "base.train.optimizer.min_learning_rate: got 1, expected at most",
        ),
    ],
)
def test_rules_between_settings(overrides: list[str], expected: str) -> None:
    assert expected in refusal("quickstart", *overrides)


@pytest.mark.parametrize("name", ["../../esc", "a/b", "", ".", "-x", "ja\n", "日本"])
def test_a_language_is_a_plain_name(name: str, tmp_path: Path) -> None:
    """It becomes part of file names, so it must not lead out of the run's folder."""
    job = write(tmp_path / "job.yaml", TRAIN)
    quoted = json.dumps(name)
    held_out = f"data.validation=[{{prefix: c, language: {quoted}}}]"
    assert "data.validation.0.language: got" in refusal(job, held_out, model=TrainConfig)
    assert "data.train.0.language: got" in refusal(job, f"data.train.0.language={quoted}", model=TrainConfig)
    got = json.dumps(name, ensure_ascii=False)
    for key in ("data.source_language", "data.target_language"):
        message = refusal("quickstart", f"{key}={quoted}")
        assert f"{key}: got {got}, expected a name of letters, digits, '-' and '_'" in message
    assert load_config("quickstart", RunConfig, ["data.target_language=zh-Hant_2"])


def test_rules_of_a_training_job(tmp_path: Path) -> None:
    job = write(tmp_path / "job.yaml", TRAIN)
    assert "got neither a shape nor an initial_checkpoint" in refusal(job, "initial_checkpoint=null", model=TrainConfig)
    assert "expected at least one {prefix, language, weight}" in refusal(job, "data.train=[]", model=TrainConfig)
    twice = "data.validation=[{prefix: c, language: ja}, {prefix: d, language: ja}, {prefix: e, language: en}]"
    assert refusal(job, twice, model=TrainConfig).startswith("data.validation: got 2 sets of language 'ja', expected")
    assert load_config(job, TrainConfig, [twice.replace("d, language: ja", "d, language: ko")])
    assert load_config(job, TrainConfig, ["data.train.1.language=en"])  # two sources of one language are a mixture


NAMED = """
extends: real-text
data:
  source: [en.jsonl]
  target: {wiki: {files: wiki.jsonl, max_epochs: 2}, web: {files: [a.jsonl, b.jsonl], weight: 3}}
train:
  train_steps: 2
  optimizer: {warmup_steps: 0}
  replay: null
  stages:
    - {name: all, tokens: 4096, shares: [{sources: [en, wiki], share: 1}, {sources: [web], share: [0, 1]}]}
"""


def test_texts_with_names_and_stages_of_a_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe.yaml", NAMED)
    resolved = load_config(recipe, RunConfig)
    shown = write(tmp_path / "shown.yaml", resolved.dump())
    assert load_config(shown, RunConfig).config == resolved.config
    data = resolved.config.training_data("shards")
    assert [(s.prefix, s.title, s.language, s.weight, s.max_epochs) for s in data.train] == [
        ("shards/wiki.train", "wiki", "ja", 1, 2),
        ("shards/web.train", "web", "ja", 3, None),
        ("shards/en.train", "en", "en", 1, None),
    ]
    assert data.stages == resolved.config.train.stages
    cases = {
        "train.replay=0.1": "train: got stages and also replay=0.1, expected one of the two ways",
        "train.stages.0.shares.0.sources=[en, wik]": "train.stages.0: got source 'wik', expected one of the texts; did",
        "train.train_steps=3": "train.stages: got 4,096 tokens in all, expected at least train_steps",
        "data.source_language=web": "data: got the name 'web' in source and in target",
        "data.target.wiki.file=x": "data.target.wiki.file: unknown key (from --set); did you mean data.target.wiki.f",
        "data.target.web.weight=0": "data.target.web.weight: got 0, expected a number greater than 0",
        "data.target.a/b={files: x}": "expected a name of letters, digits",
        "data.target=3": "data.target: got 3, expected text, or a list, or",
    }
    for change, expected in cases.items():
        assert expected in refusal(recipe, change), change
    nothing = write(
        tmp_path / "nothing.yaml", NAMED.partition("  target:")[0] + "  target: {}\ntrain: {train_steps: 30}"
    )
    assert "data.target: got no text, expected at least one name with files" in refusal(nothing)


def test_texts_share_what_a_language_has_without_stages(tmp_path: Path) -> None:
    """And a recipe of two plain texts has the weights that it always had."""
    recipe = write(tmp_path / "recipe.yaml", NAMED)
    weights = [s.weight for s in load_config(recipe, RunConfig, ["train.stages=[]"]).config.training_data("x").train]
    assert weights == [0.9 * 1 / 4, 0.9 * 3 / 4, 0.1]
    plain = [f"data.{side}={side}.jsonl" for side in ("source", "target")]
    for replay, expected in (("0.3", [("ja", 0.7), ("en", 0.3)]), ("0", [("ja", 1.0)]), ("1", [("en", 1.0)])):
        config = load_config("real-text", RunConfig, [*plain, f"train.replay={replay}"]).config
        assert [(source.name, source.weight) for source in config.training_data("x").train] == expected
