"""Block sizes and warps of kernel launches: measured ones by GPU and Triton version, else a rule.

Nothing is timed while a program runs: an op's folder holds a `Table`, and a launch looks its settings up.
A setting that was measured with one Triton version says little of another, so both decide.

This module also says how a kernel is compiled where there is no GPU (`CompileCase`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megatron_cpt.runtime.device import compute_capability

# Compute capability without its point, and the first two numbers of Triton's version: (90, "3.6").
Platform = tuple[int, str]


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes:
        num_warps: warps of a program, a power of two.
        num_stages: loads of a loop in flight; 1 where the kernel has no loop to pipeline.
        blocks: the kernel's constexpr sizes by their names.
        programs: programs of each multiprocessor, for a kernel whose programs walk through the work.
    """

    num_warps: int
    num_stages: int = 1
    blocks: Mapping[str, int] = field(default_factory=dict)
    programs: int = 1

    def options(self) -> dict[str, int]:
        """Returns what a launch takes beside the kernel's arguments."""
        # Products and sums become one instruction: Triton 3.6's default, about to change in later versions.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def keywords(self) -> dict[str, int]:
        """Returns blocks and options together, to be given to `kernel[grid](...)`."""
        return {**self.blocks, **self.options()}


class Table:
    """The settings of one kernel.

    Args:
        rule: makes the settings for a key where nothing was measured.
        measured: platform -> key -> settings. A key is what the settings depend on, as the hidden size.
    """

    def __init__(
        self, rule: Callable[[Any], Launch], measured: Mapping[Platform, Mapping[Any, Launch]] | None = None
    ) -> None:
        self.rule = rule
        self.measured = measured or {}
        self._forced: Launch | None = None

    def choose(self, device_type: str, key: Any) -> Launch:
        """Returns the settings for `key` on this process's device of the type, as "cpu"."""
        if self._forced is not None:
            return self._forced
        here = platform(device_type) if self.measured else None
        found = self.measured.get(here, {}) if here is not None else {}
        return found[key] if key in found else self.rule(key)

    @contextlib.contextmanager
    def using(self, launch: Launch) -> Iterator[None]:
        """Has every launch inside the context take these settings: for sweeps and tests."""
        before, self._forced = self._forced, launch
        try:
            yield
        finally:
            self._forced = before

    def entries(self, keys: tuple[Any, ...]) -> Iterator[tuple[str, Any, Launch]]:
        """Yields (name, key, settings): the rule's for each of `keys`, then every measured one that differs."""
        seen = set()
        of_rule = [("rule", key, self.rule(key)) for key in keys]
        measured = [
            (f"sm{capability}-{version}", key, launch)
            for (capability, version), found in self.measured.items()
            for key, launch in found.items()
        ]
        for name, key, launch in [*of_rule, *measured]:
            identity = key, *launch.options().values(), *sorted(launch.blocks.items())
            if identity not in seen:
                seen.add(identity)
                yield name, key, launch


@functools.cache
def platform(device_type: str) -> Platform | None:
    """Returns the platform whose measured settings serve tensors of the type; None without an NVIDIA GPU."""
    capability = compute_capability(device_type)
    if capability is None:
        return None
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return capability[0] * 10 + capability[1], f"{major}.{minor}"


class CompileCase(NamedTuple):
    """One kernel with one setting, as it is compiled without a GPU.

    Attributes:
        name: unique in the package, as "rms_norm_forward D=4096 bf16".
        function: what `triton.jit` made.
        signature: type of each argument that is no constexpr: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128, 64]>". A suffix ":16" says that the value is divisible by 16, as the launcher
            finds aligned pointers and such sizes to be.
        constexprs: value of each constexpr.
        options: num_warps and num_stages, as `Launch.options` gives them.
        kind: "matrix" for kernels that have to reach the tensor cores' asynchronous products, "stream" for those
            that have to load 128 bits at a time, "small" for those whose loads are too few to matter.
        archs: compute capabilities, without their point, for which the kernel is compiled.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    kind: Literal["matrix", "stream", "small"]
    archs: tuple[int, ...] = (80, 90, 100)
