"""Unmodified megatron-core on a device that is not CUDA.

megatron-core names CUDA by hand in hundreds of places. `install_engine` adds an import hook that
rewrites the syntax tree of `megatron.core` modules, and of nothing else, as they are imported:

    torch.cuda.X                 -> a namespace with the same names for this device
    "cuda", "cuda:0"             -> the device's name
    "torch.cuda.FloatTensor"     -> the device's tensor type string
    tensor.cuda(...)             -> tensor.to(device)
    from torch.cuda import X     -> X = that namespace's X

Line numbers survive, torch itself is left alone, and with CUDA the hook is not installed at all.
The hook was reviewed against the versions in `REVIEWED_REWRITES`; a test counts its rewrites in the
installed version and fails when the count is not the reviewed one.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import marshal
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.errors import ConfigError

PACKAGE = "megatron.core"
NAMESPACE = "_engine_device_namespace"
_HASH_BYTES = 8
_hash = importlib.util.source_hash

# Rewrites of a reviewed release over the whole wheel, by kind (see `count_rewrites`).
REVIEWED_REWRITES: dict[str, dict[str, int]] = {
    "0.16.1": {".cuda()": 21, "device literal": 93, "import": 5, "tensor type": 9, "torch.cuda": 450},
}


class _Nothing:
    """Stands in for streams and events: every method is there and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _no_op

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class _DefaultGenerators:
    """`torch.cuda.default_generators[i]` for a device that has one generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


@functools.cache
def _rewriting_source() -> bytes:
    return Path(__file__).read_bytes()


def _no_op(*_: Any, **__: Any) -> None:
    return None


def _device_namespace(device: str) -> types.ModuleType:
    """Build what `torch.cuda` becomes inside megatron-core."""
    backend = None if device == "cpu" else torch.get_device_module(device)
    namespace = types.ModuleType(NAMESPACE)
    names: dict[str, Any] = {
        "current_device": lambda: torch.device(device),
        "device_count": lambda: 1,
        "is_available": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "Stream": _Nothing,
        "Event": _Nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": _Nothing,
        "default_stream": _Nothing,
        "device": contextlib.nullcontext,
        "nvtx": types.SimpleNamespace(
            range_push=_no_op, range_pop=_no_op, range=lambda message: contextlib.nullcontext()
        ),
        "_lazy_call": lambda callback: callback(),
        "_lazy_init": _no_op,
        "default_generators": _DefaultGenerators(),
        "set_device": _no_op,
        "synchronize": _no_op,
        "empty_cache": _no_op,
    }
    for name, stand_in in names.items():
        setattr(namespace, name, getattr(backend, name, stand_in) if backend else stand_in)
    namespace.random = namespace  # type: ignore[attr-defined]
    # Types and exceptions (OutOfMemoryError, CUDAGraph, amp, ...) are only named, never used here.
    namespace.__getattr__ = lambda name: getattr(torch.cuda, name)  # type: ignore[method-assign]
    return namespace


class _Rewriter(ast.NodeTransformer):
    """Rewrites one module's tree and counts what it rewrote."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.type_prefix = "torch." if device == "cpu" else f"torch.{device}."
        self.counts: Counter[str] = Counter()

    def _namespace(self, node: ast.AST) -> ast.Name:
        return ast.copy_location(ast.Name(NAMESPACE, ast.Load()), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            self.counts["torch.cuda"] += 1
            return self._namespace(node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value in ("cuda", "cuda:0"):
            self.counts["device literal"] += 1
            return ast.copy_location(ast.Constant(self.device), node)
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            self.counts["tensor type"] += 1
            return ast.copy_location(ast.Constant(node.value.replace("torch.cuda.", self.type_prefix)), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            self.counts[".cuda()"] += 1
            target = ast.copy_location(ast.Attribute(node.func.value, "to", ast.Load()), node)
            return ast.copy_location(ast.Call(target, [ast.Constant(self.device)], []), node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        if node.module != "torch.cuda":
            return node
        self.counts["import"] += 1
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(self._namespace(node), alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a rewritten megatron-core module.

    Its byte code is cached beside that of the module as it stands, which nothing here touches, under the device's
    name and with hashes of both sources, the place and itself. A module that does not name CUDA is not rewritten and
    keeps the usual one.
    """

    device = "cpu"
    namespace: types.ModuleType

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_data(self.path)
        if b"cuda" not in source:
            return super().get_code(fullname)  # type: ignore[return-value]
        path = self.path.encode(errors="surrogateescape")  # tracebacks name it
        cache = importlib.util.cache_from_source(self.path, optimization=f"{sys.flags.optimize}{self.device}")
        head = importlib.util.MAGIC_NUMBER + _hash(b"\0".join((_rewriting_source(), path, source)))
        with contextlib.suppress(OSError):  # none is there
            cached = self.get_data(cache)
            body = cached[len(head) + _HASH_BYTES :]
            if cached.startswith(head + _hash(body)):
                return marshal.loads(body)  # type: ignore[no-any-return]
        tree = _Rewriter(self.device).visit(ast.parse(source))
        code: types.CodeType = compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            body = marshal.dumps(code)
            self.set_data(cache, head + _hash(body) + body)  # does nothing where it cannot write
        return code

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, NAMESPACE, self.namespace)
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `megatron.core` modules and gives them the rewriting loader."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.namespace = _device_namespace(device)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            loader = _Loader(spec.loader.name, spec.loader.path)
            loader.device, loader.namespace = self.device, self.namespace
            spec.loader = loader
        return spec


def engine_version() -> str:
    """Version of the installed megatron-core."""
    return importlib.metadata.version("megatron-core")


def count_rewrites(device: str = "cpu") -> dict[str, int]:
    """Count the rewrites that the hook would make over the installed megatron-core, by kind.

    Static: nothing of megatron-core is imported. A module that does not parse is an error.
    """
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations, "megatron-core is not installed"
    rewriter = _Rewriter(device)
    for location in spec.submodule_search_locations:
        for path in sorted(Path(location, "core").rglob("*.py")):
            rewriter.visit(ast.parse(path.read_bytes()))
    return dict(sorted(rewriter.counts.items()))


def install_engine(device: str) -> bool:
    """Make `import megatron.core` work on `device`; call it before megatron-core is imported.

    Args:
        device: device type, "cuda", "cpu" or the name of a torch backend ("neuron": designed for,
            not verified).

    Returns:
        True when the hook was installed, False when there was nothing to do (CUDA, or installed).

    Raises:
        ConfigError: megatron-core was imported earlier without the hook, or with it for another device.
    """
    installed = next((finder.device for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if installed not in (None, device):
        raise ConfigError(f"the engine of this process was set up for {installed!r}, got {device!r}; use one device")
    if device == "cuda" or installed is not None:
        return False
    if PACKAGE in sys.modules:
        raise ConfigError(
            f"{PACKAGE} was imported before the engine was set up for {device!r}; "
            "call megatron_cpt.runtime.engine.install_engine first"
        )
    sys.meta_path.insert(0, _Finder(device))
    # `doctor` says what is not installed; five warnings on every rank do not help.
    warnings.filterwarnings("ignore", message=".*(Apex is not installed|Apex are not installed)")
    # The fusers wrap functions in torch.compile while they are imported: slow, and no gain off CUDA.
    compile_function = torch.compile
    torch.compile = _identity_compile  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
        import megatron.core.jit as engine_jit

        engine_jit.disable_jit_fuser()
    finally:
        torch.compile = compile_function
    # One generator serves the device and the host here, so the tracker's warning does not apply.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    return True


def _identity_compile(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else lambda inner: inner


def parallel_state() -> Any:
    """megatron-core's `parallel_state` module, for the mesh (the engine must be installed)."""
    from megatron.core import parallel_state as state

    return state


def seed_everything(seed: int) -> None:
    """Seed torch and the engine's per-rank generators. The order of the data has its own seed."""
    from megatron.core import tensor_parallel

    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
