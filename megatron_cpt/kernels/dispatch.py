"""Which implementation of an op runs: by name, or the first that can run here.

Every op registers its implementations, fastest first. An implementation states by `supports` whether
it can run under given facts; nothing falls back silently. The facts an op gives are
`device` (`torch.device.type`, as "cpu") and `dtype` (`torch.dtype`), and where they matter `head_size`.
This module adds `named`: whether the implementation was asked for by its name.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_cpt.errors import KernelUnsupported
from megatron_cpt.runtime.device import compute_capability

AUTO = "auto"
INTERPRETER = "TRITON_INTERPRET"
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_CAPABILITY = (8, 0)  # the first with bf16


class Supports(Protocol):
    """None where the implementation can run under the facts, else the reason why it cannot.

    A fact may be missing (`explain` asks before any tensor exists); a missing fact is no obstacle.
    """

    def __call__(self, **facts: object) -> str | None:
        """Returns the reason, as a phrase, or None."""


@dataclass(frozen=True)
class _Implementation:
    name: str
    function: Callable[..., Any]
    supports: Supports


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op runs, and why those that "auto" would have preferred do not.

    Attributes:
        op: name of the op.
        implementation: name of what runs.
        function: what to call.
        obstacles: name -> reason, a phrase, of each implementation that was asked before and cannot run.
    """

    op: str
    implementation: str
    function: Callable[..., Any]
    obstacles: dict[str, str]

    def __str__(self) -> str:
        names: dict[str, list[str]] = {}
        for name, reason in self.obstacles.items():
            names.setdefault(reason, []).append(name)
        reasons = "".join(f"; {', '.join(those)} cannot run here: {reason}" for reason, those in names.items())
        return f"{self.op}: {self.implementation}{reasons}"


class Registry:
    """The implementations of each op, in the order in which "auto" tries them."""

    def __init__(self) -> None:
        self._ops: dict[str, dict[str, _Implementation]] = {}

    def register(self, op: str, name: str, function: Callable[..., Any], supports: Supports) -> None:
        """Adds an implementation behind those that `op` already has.

        Raises:
            ValueError: the op has one of this name already, or the name is "auto".
        """
        implementations = self._ops.setdefault(op, {})
        if name == AUTO or name in implementations:
            raise ValueError(f"{op}: an implementation cannot be named {name!r}: the name is taken")
        implementations[name] = _Implementation(name, function, supports)

    def function(self, op: str, name: str) -> Callable[..., Any]:
        """Returns the function of an implementation that is there."""
        return self._ops[op][name].function

    def decide(self, op: str, implementation: str = AUTO, **facts: object) -> Choice:
        """Returns which implementation of `op` runs, and the reasons against those before it.

        Args:
            op: name of the op.
            implementation: "auto" for the first that supports the facts, or the name of one.
            facts: what the call is about; see the head of this module.

        Raises:
            KernelUnsupported: no implementation has this name, the named one cannot run under the facts,
                or none can. The message holds the reasons.
        """
        implementations = self._ops.get(op)
        if not implementations:
            raise ValueError(f"no op is called {op!r}; there are {sorted(self._ops)}")
        if implementation != AUTO and implementation not in implementations:
            known = [AUTO, *implementations]
            raise KernelUnsupported(f"{op}: got implementation {implementation!r}; use one of {known}")
        obstacles: dict[str, str] = {}
        for candidate in implementations.values():
            if implementation not in (AUTO, candidate.name):
                continue
            reason = candidate.supports(**facts, named=implementation != AUTO)
            if reason is None:
                return Choice(op, candidate.name, candidate.function, obstacles)
            obstacles[candidate.name] = reason
        reasons = "; ".join(f"{name!r} cannot run here: {reason}" for name, reason in obstacles.items())
        advice = "" if implementation == AUTO else f"; use {AUTO!r} to let the op choose"
        raise KernelUnsupported(f"{op}: {reasons}{advice}")

    def explain(self, **facts: object) -> list[dict[str, Any]]:
        """Returns one row for each implementation: op, implementation, supported, reason.

        The rows of an op stand in the order in which "auto" tries them; `reason` is a phrase in every row.
        """
        rows: list[dict[str, Any]] = []
        for op, implementations in sorted(self._ops.items()):
            chosen: str | None = None
            for candidate in implementations.values():
                reason = candidate.supports(**facts, named=False)
                supported = reason is None
                if reason is None:
                    reason = f"runs here; {AUTO!r} takes {chosen or 'it'}"
                    chosen = chosen or candidate.name
                rows.append({"op": op, "implementation": candidate.name, "supported": supported, "reason": reason})
        return rows


_REGISTRY = Registry()
register = _REGISTRY.register
decide = _REGISTRY.decide
explain = _REGISTRY.explain


def choose(op: str, implementation: str = AUTO, **facts: object) -> Callable[..., Any]:
    """Returns the function to call for `op`; arguments and errors are those of `Registry.decide`."""
    return _REGISTRY.function(op, _chosen_name(op, implementation, **facts))


def _chosen_name(op: str, implementation: str, **facts: object) -> str:
    return _REGISTRY.decide(op, implementation, **facts).implementation


# torch.compile calls it while it traces and goes on with the result, instead of tracing it. The public decorator
# for this, torch.compiler.assume_constant_result, sets this mark after it has loaded the whole compiler.
_chosen_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def anywhere(**_facts: object) -> None:
    """The `supports` of a plain torch implementation: every device and every floating dtype."""
    return None


def triton_obstacle(
    device: object = None, dtype: object = None, *, named: object = False, **_facts: object
) -> str | None:
    """Returns why Triton kernels cannot run, as a phrase, or None: the `supports` of most of them as it stands.

    Triton's interpreter, which runs kernels on the CPU and is there for tests, is taken only where the
    implementation is named and the environment variable TRITON_INTERPRET is 1; "auto" never takes it.

    Args:
        device: `torch.device.type`; None where it is not known yet.
        dtype: `torch.dtype` of the tensors; None where it is not known yet.
        named: whether the implementation was asked for by its name.
    """
    if not triton_installed():
        return "the package triton is not installed"
    if dtype is not None and dtype not in _TRITON_DTYPES:
        return f"its kernels take fp32, bf16 and fp16, not {dtype}"
    if device is None:
        return None
    interpreted = os.environ.get(INTERPRETER) == "1"
    if interpreted and named:
        return None
    capability = compute_capability(str(device))
    if capability is None:
        return f"it needs an NVIDIA GPU, not {device}"
    if interpreted:
        return f"{INTERPRETER}=1 has Triton interpret its kernels, which is for tests and happens by name only"
    if capability < _TRITON_CAPABILITY:
        return f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def triton_installed() -> bool:
    """Whether the package triton can be imported; it is not imported to know."""
    return importlib.util.find_spec("triton") is not None
