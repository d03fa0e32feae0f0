"""The house's rules, read from the source: floors, walls, sizes, names."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_cpt"

FLOORS = {
    "errors": 0,
    "config": 1,
    "runtime": 1,
    "tokenizer": 2,
    "checkpoint": 2,
    "kernels": 2,
    "planning": 2,
    "data": 3,
    "surgery": 3,
    "model": 3,
    "training": 4,
    "evaluation": 4,
    "reporting": 5,
    "pipeline": 6,
    "cli": 7,
}

# Library -> the only places that may import it (patterns over paths inside the package).
WALLS = {
    "megatron": r"(model|training)/.*|runtime/engine\.py",
    "triton": r"kernels/.*/triton.*\.py",
    "transformer_engine": r"model/.*",
    "apex": r"model/.*",
    "transformers": r"evaluation/.*",
}
TORCH_FREE = ("errors", "config", "planning", "cli", "tokenizer")
DEVICE_LITERAL = re.compile(r"(cuda|neuron|xpu|mps|hpu)(:\d+)?")
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
LONGER_FILES: dict[str, str] = {}  # path -> why
LONGER_FUNCTIONS: dict[str, str] = {  # path::name -> why
    "megatron_cpt/kernels/attention/triton_backward.py::key_value_gradient_kernel": "a kernel of 31 arguments",
    "megatron_cpt/kernels/attention/triton_backward.py::query_gradient_kernel": "a kernel of 30 arguments",
    "megatron_cpt/kernels/attention/triton_forward.py::forward_kernel": "a kernel of 25 arguments",
    "megatron_cpt/kernels/rope/triton_kernels.py::rotate": "a kernel of 23 arguments, a line each",
}


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively; write the full name"
            assert node.module is not None
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def no(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in sources()} - {"__init__"} <= FLOORS.keys()


def test_imports_go_down() -> None:
    upward = []
    for path in sources():
        part = part_of(path)
        for line, name in imports(path):
            target = name.split(".")[1] if name.startswith("megatron_cpt.") else None
            if target in FLOORS and target != part and FLOORS[target] >= FLOORS.get(part, 0):
                upward.append(
                    f"{inside(path)}:{line} imports {name}: floor {FLOORS[target]} from {FLOORS.get(part, 0)}"
                )
    no(upward)


def test_libraries_stay_behind_their_walls() -> None:
    no(
        [
            f"{inside(path)}:{line} imports {name}"
            for path in sources()
            for line, name in imports(path)
            if (allowed := WALLS.get(name.split(".")[0])) and not re.fullmatch(allowed, inside(path))
        ]
    )


def test_devices_are_named_in_runtime_only() -> None:
    named = []
    for path in sources():
        if part_of(path) == "runtime":
            continue
        for node in ast.walk(tree_of(path)):
            is_literal = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_literal and DEVICE_LITERAL.fullmatch(node.value):  # type: ignore[attr-defined]
                named.append(f"{inside(path)}:{node.lineno} says {node.value!r}")  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
                named.append(f"{inside(path)}:{node.lineno} uses torch.cuda")
        named += [f"{inside(path)}:{line}" for line, name in imports(path) if name.startswith("torch.cuda")]
    no(named)


def test_files_are_short() -> None:
    files = [*sources(), *sources(ROOT / "tests"), *(ROOT / "csrc").glob("*.*")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_bytes().splitlines()) for path in files}
    no(
        [
            f"{name}: {length} lines"
            for name, length in lengths.items()
            if length > MAX_FILE_LINES and name not in LONGER_FILES
        ]
    )
    no([f"{name} is an exception without need" for name in LONGER_FILES if lengths.get(name, 0) <= MAX_FILE_LINES])


def test_functions_are_short() -> None:
    lengths = {}
    for path in [*sources(), *sources(ROOT / "tests")]:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                skipped = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
                assert node.end_lineno is not None
                name = f"{path.relative_to(ROOT).as_posix()}::{node.name}"
                lengths[name] = node.end_lineno - node.lineno + 1 - skipped
    too_long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    no([f"{name}: {length} lines" for name, length in too_long.items() if name not in LONGER_FUNCTIONS])
    no([f"{name} is an exception without need" for name in LONGER_FUNCTIONS if name not in too_long])


def test_files_say_what_they_hold() -> None:
    no([inside(path) for path in sources() if path.name in FORBIDDEN_NAMES])


def test_comments_are_ascii_and_promise_nothing() -> None:
    wrong = []
    for path in [*sources(), *sources(ROOT / "tests")]:
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            is_comment = token.type == tokenize.COMMENT
            if is_comment and (not token.string.isascii() or re.search(r"\b(TODO|FIXME|XXX)\b", token.string)):
                wrong.append(f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}")
    no(wrong)


def test_tests_mirror_the_package() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders <= FLOORS.keys() | {"architecture", "examples", "gpu"}


def test_every_verb_is_in_the_table() -> None:
    from megatron_cpt.cli.main import VERBS

    modules = {
        path.stem for path in (PACKAGE / "cli").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert modules - {"__init__", "main", "console"} == VERBS.keys()


@pytest.mark.parametrize("forbidden", ["torch", "megatron", "transformers"])
def test_light_modules_start_without_torch(forbidden: str) -> None:
    loaded_by = imported_by_light_modules()
    no([f"importing {module} loads {forbidden}" for module, loaded in loaded_by.items() if forbidden in loaded])


@cache
def imported_by_light_modules() -> dict[str, list[str]]:
    """Which heavy libraries are loaded once each light module has been imported, in one fresh process."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources()
        if part_of(path) in TORCH_FREE
    ]
    program = (
        "import importlib, json, sys\n"
        f"heavy = {('torch', 'megatron', 'transformers')!r}\n"
        "loaded = {}\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    loaded[module] = [name for name in heavy if name in sys.modules]\n"
        "print(json.dumps(loaded))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded: dict[str, list[str]] = json.loads(result.stdout)
    return loaded
