"""The command line as a user meets it: fast help, one kind of error, exit codes, machine-readable output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from megatron_cpt.cli.doctor import OPTIONAL
from megatron_cpt.cli.main import VERBS, main
from megatron_cpt.config.loading import load_config
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.errors import DataError, TrainingError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_cpt.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_help_is_fast_and_loads_no_torch() -> None:
    # The quickest of three: what is measured is the program, not what else the machine does.
    durations = []
    for _ in range(3):
        begin = time.perf_counter()
        result = run("--help")
        durations.append(time.perf_counter() - begin)
    assert result.returncode == 0
    assert all(f"\n  {verb} " in result.stdout for verb in VERBS)
    assert min(durations) < 0.5
    program = "import sys; from megatron_cpt.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "-h"]) == 0
    short = capsys.readouterr().out
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown == short
    assert f"megatron-cpt {verb}" in shown
    assert "completion" not in shown


def test_help_of_a_narrow_terminal_has_whole_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["surgery", "plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--old-tokenizer" in shown and "--embedding" in shown
    assert max(map(len, shown.splitlines())) <= 50


def test_help_without_a_verb_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().out
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dcotor"], "error: unknown verb 'dcotor': did you mean 'doctor'?\n"),
        (["zzz"], "error: unknown verb 'zzz': expected one of "),
        (["plan"], "error: Missing argument 'config'"),
        (["plan", "quickstart", "--jsn"], "error: No such option: --jsn"),
        (["data", "clean"], "error: Missing argument 'files'. See `megatron-cpt data clean --help`.\n"),
        (["data", "verify", "no/such/place"], "no/such is no folder: expected 'shards' there"),
        (["plan", "quikstart"], "did you mean the recipe 'quickstart'?"),
        (
            ["plan", "quickstart", "--set", "seed=x"],
            'error: seed: got "x", expected a whole number; change the --set\n',
        ),
        (
            ["plan", "quickstart", "--set", "train.parallel.tensor_model_parallel_size=4"],
            "error: train: this layout has 2 problems:\n  tensor_model_parallel_size=4 does not divide",
        ),
    ],
)
def test_wrong_input_is_answered_with_one_message(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert expected.lower() in captured.err.lower()
    assert captured.err.count("error:") == 1
    assert captured.out == ""


def verb_that_raises(error: BaseException | None) -> ModuleType:
    app = typer.Typer()

    @app.command()
    def command() -> None:
        if error is not None:
            raise error

    module = ModuleType("megatron_cpt.cli.doctor")
    module.__dict__["app"] = app
    return module


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (TrainingError("rank 3 died"), 1, "error: rank 3 died\n"),
        (DataError("line 7 [of] a.jsonl"), 2, "error: line 7 [of] a.jsonl\n"),
        (KeyboardInterrupt(), 130, "error: stopped with Ctrl-C\n"),
        (typer.Exit(7), 7, ""),
    ],
)
def test_exit_code_and_message_of_an_error(
    error: BaseException | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "megatron_cpt.cli.doctor", verb_that_raises(error))
    assert main(["doctor"]) == code
    assert capsys.readouterr().err.strip() == message.strip()


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_cpt.cli.doctor", verb_that_raises(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["doctor"])


def test_ctrl_c_ends_with_130() -> None:
    program = textwrap.dedent("""
        import signal, sys, time
        from types import ModuleType
        import typer
        from megatron_cpt.cli.main import main
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands it down ignored
        app = typer.Typer()
        @app.command()
        def wait() -> None:
            print("ready", flush=True)
            time.sleep(60)
        module = sys.modules["megatron_cpt.cli.doctor"] = ModuleType("doctor")
        module.app = app
        sys.exit(main(["doctor"]))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b"error: stopped with Ctrl-C\n"


def test_plan_prints_everything_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--json", "--set", "seed=3"]) == 0
    value = json.loads(capsys.readouterr().out)
    resolved = load_config("quickstart", RunConfig, ["seed=3"])
    assert value["config"] == resolved.config.model_dump(mode="json")
    assert value["config_hash"] == resolved.hash
    train = resolved.config.train
    adapt = value["jobs"]["adapt"]
    assert adapt["tokens"]["per_step"] == train.batch.global_batch_size * train.batch.seq_length
    assert adapt["layout"]["name"] == "TP2-PP1-DP1"
    base = value["jobs"]["base"]
    assert adapt["vocabulary"]["vocab_size"] == base["vocabulary"]["vocab_size"] + resolved.config.tokenizer.num_pieces
    assert adapt["parameters"]["total"] > base["parameters"]["total"]


def test_plan_prints_a_document_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--set", "seed=3"]) == 0
    document, _, rest = capsys.readouterr().out.partition("config hash ")
    assert "parameters" in rest and "tokens" in rest and "stages: all 4 layers" in rest
    assert yaml.safe_load(document)["seed"] == 3
    copy = tmp_path / "copy.yaml"
    copy.write_text(document)
    assert load_config(copy, RunConfig).hash == rest.split()[0]


def listed(project: str, name: str) -> list[str]:
    """Distributions of a list in pyproject.toml, without their versions."""
    found = re.search(rf"^{name} = \[(.*?)\]( *#.*)?$", project, re.M | re.S)
    assert found, name
    return re.findall(r'"([A-Za-z0-9-]+)[^"]*"', found[1])


def test_what_is_advertised_is_used() -> None:
    """Every required distribution is imported by the package, every extra is one that `doctor` explains."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    modules = {"megatron-core": "megatron", "PyYAML": "yaml", "tensorboard": "torch.utils.tensorboard"}
    of_engine = {"psutil"}  # megatron-core imports it and does not say so
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_cpt").rglob("*.py"))
    for name in set(listed(project, "dependencies")) - of_engine:
        assert re.search(rf"^ *(import|from) {modules.get(name, name)}\b", sources, re.M), name
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    names = set(re.findall(r"^(\w+) =", extras, re.M)) - {"dev"}
    assert names == {"gpu", "ray", "clean"}
    advertised = {name for extra in names for name in listed(project, extra)}
    assert OPTIONAL.keys() == advertised | {"apex"}  # apex is built by hand


def test_doctor_explains_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert {"torch", "megatron-core", "python"} <= value["versions"].keys()
    assert all(row["reason"] for row in value["ops"])
    usable = {row["op"] for row in value["ops"] if row["supported"]}
    assert usable == {row["op"] for row in value["ops"]} >= {"attention", "linear_cross_entropy", "rms_norm"}
    assert main(["doctor"]) == 0
    assert value["versions"]["torch"] in capsys.readouterr().out
