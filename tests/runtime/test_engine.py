"""The hook rewrites megatron-core as reviewed, and nothing but megatron-core.

Two engines are used: the installed one, and a small stand-in that spells the device in every way the hook knows.
What a hook changes stays changed, so each case has a process of its own and answers with what it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.runtime.engine import REVIEWED_REWRITES, count_rewrites, engine_version

ROOT = Path(__file__).resolve().parents[2]
SPELLINGS = """\
import torch
from torch.cuda import _lazy_call, current_device as where

literal, indexed, prose = "cuda", "cuda:0", "not on a cuda machine"
kinds = ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor"]
other = "torch.cuda.amp"
here = torch.cuda.current_device


def move(tensor):
    from torch.cuda import set_device

    return tensor.cuda(non_blocking=True)


def fail():
    with torch.cuda.stream(torch.cuda.current_stream()):
        raise ValueError("line 19")
"""
JIT = """\
import torch


@torch.compile
def fused(value):
    return value


fuser = "on"


def disable_jit_fuser():
    global fuser
    fuser = "off"
"""


def see(program: str, *paths: Path) -> dict[str, Any]:
    """Run a program that fills the dict `seen`, in a fresh process, and return it."""
    head = "import json, sys\nimport torch\nfrom megatron_cpt.runtime.engine import *\nseen = {}\n"
    text = f"{head}sys.path[:0] = {[str(path) for path in paths]!r}\n{program}\nprint(json.dumps(seen))\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    result = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return seen


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A package `megatron` that hides the installed one."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    for name, text in {"__init__": "", "spellings": SPELLINGS, "jit": JIT, "plain": "answer = 42\n"}.items():
        (core / f"{name}.py").write_text(text)
    (tmp_path / "megatron" / "__init__.py").write_text("")
    return tmp_path


def test_rewrites_of_the_installed_engine_are_the_reviewed_ones() -> None:
    assert engine_version() in REVIEWED_REWRITES, "review the hook against this release, then write down its counts"
    assert count_rewrites() == REVIEWED_REWRITES[engine_version()]


def test_an_unreviewed_spelling_changes_the_count(stand_in: Path) -> None:
    program = "seen['counts'] = count_rewrites()"
    wanted = {".cuda()": 1, "device literal": 2, "import": 2, "tensor type": 2, "torch.cuda": 3}
    assert see(program, stand_in)["counts"] == wanted
    added = stand_in / "megatron" / "core" / "new.py"
    added.write_text("import torch\ntorch.cuda.brand_new()\n")
    assert see(program, stand_in)["counts"]["torch.cuda"] == wanted["torch.cuda"] + 1


def test_every_spelling_means_the_cpu(stand_in: Path) -> None:
    seen = see(
        """
seen["installed"] = [install_engine("cpu"), install_engine("cpu")]
import traceback, megatron.core.jit as jit, megatron.core.plain as plain, megatron.core.spellings as module
seen["texts"] = [module.literal, module.indexed, module.prose, module.other, *module.kinds]
seen["real type"] = torch.ones(1).type()
seen["devices"] = [str(module.here()), str(module.where()), str(module.move(torch.ones(2)).device)]
seen["called"] = module._lazy_call(lambda: "at once")
try:
    module.fail()
except ValueError as caught:
    seen["line"] = traceback.extract_tb(caught.__traceback__)[-1].lineno
seen["fuser"] = [jit.fuser, type(jit.fused).__name__, hasattr(jit.fused, "_torchdynamo_orig_callable")]
seen["cached"] = {m.__name__: __import__("os").path.exists(m.__cached__) for m in (module, plain)}
try:
    install_engine("toy")
except Exception as caught:
    seen["second device"] = f"{type(caught).__name__}: {caught}"
""",
        stand_in,
    )
    assert seen["installed"] == [True, False]
    assert seen["texts"][:4] == ["cpu", "cpu", "not on a cuda machine", "torch.cuda.amp"]
    assert seen["texts"][4:] == ["torch.FloatTensor", "torch.HalfTensor"] and seen["texts"][4] == seen["real type"]
    assert seen["devices"] == ["cpu", "cpu", "cpu"] and seen["called"] == "at once"
    assert seen["line"] == 1 + SPELLINGS.splitlines().index('        raise ValueError("line 19")')
    assert seen["fuser"] == ["off", "function", False]
    assert seen["cached"] == {"megatron.core.spellings": False, "megatron.core.plain": True}
    assert seen["second device"].startswith("ConfigError: the engine of this process was set up for 'cpu', got 'toy'")


def test_byte_code_is_cached_apart_from_that_of_the_module_as_it_stands(stand_in: Path) -> None:
    seen = see(
        """
import importlib, marshal
from importlib.util import cache_from_source
install_engine("cpu")

def literal():
    sys.modules.pop("megatron.core.spellings", None)
    importlib.invalidate_caches()
    return importlib.import_module("megatron.core.spellings").literal

seen["first"] = literal()
source = Path(sys.modules["megatron.core.spellings"].__file__)
cached, usual = (Path(cache_from_source(str(source), optimization=name)) for name in ("0cpu", ""))
seen["usual"] = usual.exists()
head = cached.read_bytes()[:12]
body = marshal.dumps(compile("literal = 'from the cache'", "spellings.py", "exec"))
other = head + importlib.util.source_hash(body) + body
seen["again"] = []
for content in (other, other[:-5], head, b"", bytes(12) + other[12:], other[:40] + bytes(8) + other[48:]):
    cached.write_bytes(content)
    seen["again"].append(literal())
source.write_text(source.read_text().replace('"cuda", "cuda:0"', '"new", "cuda:0"'))
seen["changed"] = literal()
sys.dont_write_bytecode = True
cached.unlink()
seen["unwritten"] = literal(), cached.exists()
""",
        stand_in,
    )
    assert seen["first"] == "cpu" and not seen["usual"]
    assert seen["again"] == ["from the cache", *["cpu"] * 5]  # what is damaged, or of another source, is made anew
    assert seen["changed"] == "new" and seen["unwritten"] == ["new", False]


def test_the_device_is_a_parameter(stand_in: Path) -> None:
    seen = see(
        """
import types
backend = types.ModuleType("torch.toy")
backend.current_device = lambda: "toy:3"
backend.is_available = lambda: True
torch.utils.rename_privateuse1_backend("toy")
torch._register_device_module("toy", backend)
install_engine("toy")
import megatron.core.spellings as module
seen["texts"] = [module.literal, module.indexed, *module.kinds]
seen["from the backend"] = [module.here(), module.where()]
class Tensor:
    def to(self, device, **options):
        return device
    def cuda(self, **options):
        return "cuda"
seen["moved"] = module.move(Tensor())
""",
        stand_in,
    )
    assert seen["texts"] == ["toy", "toy", "torch.toy.FloatTensor", "torch.toy.HalfTensor"]
    assert seen["from the backend"] == ["toy:3", "toy:3"] and seen["moved"] == "toy"


def test_too_late_is_refused(stand_in: Path) -> None:
    seen = see(
        """
import megatron.core
try:
    install_engine("cpu")
except Exception as caught:
    seen["error"] = f"{type(caught).__name__}: {caught}"
seen["finders"] = [type(finder).__name__ for finder in sys.meta_path]
""",
        stand_in,
    )
    assert seen["error"].startswith("ConfigError: megatron.core was imported before the engine was set up for 'cpu'")
    assert "_Finder" not in seen["finders"]


def test_torch_is_left_alone() -> None:
    seen = see(
        """
def objects():
    names = {"torch.cuda": torch.cuda, "compile": torch.compile, "Tensor.cuda": torch.Tensor.cuda}
    names |= {f"torch.cuda.{name}": value for name, value in vars(torch.cuda).items()}
    return {**names, "Tensor.type": torch.Tensor.type, "Module.cuda": torch.nn.Module.cuda}
before, path = objects(), list(sys.meta_path)
seen["inert for cuda"] = install_engine("cuda") is False and sys.meta_path == path
install_engine("cpu")
import megatron.core.tensor_parallel.random, megatron.core.transformer.transformer_config as rewritten
after = objects()
seen["changed"] = [name for name in before if after.get(name) is not before[name]]
seen["available"] = torch.cuda.is_available()
seen["rewritten"] = [name for name, module in sys.modules.items() if "_engine_device_namespace" in vars(module)]
"""
    )
    assert seen["inert for cuda"] and seen["changed"] == []
    assert "megatron.core.tensor_parallel.random" in seen["rewritten"]
    assert all(name.startswith("megatron.core") for name in seen["rewritten"])
