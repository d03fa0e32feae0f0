"""How the attention kernels are launched: blocks and warps by what a launch is about.

Chosen so that no register is spilled, for capabilities 8.0, 9.0 and 10.0 and with Triton 3.6 and 3.9, and that what is
compiled for capability 8 fits the 99 KiB of shared memory of its smaller GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton

from megatron_cpt.kernels.attention.triton_backward import key_value_gradient_kernel, query_gradient_kernel
from megatron_cpt.kernels.attention.triton_forward import forward_kernel
from megatron_cpt.kernels.tuning import CompileCase, Launch, Table

# Other generations have tensor descriptors too, but their matrix units and their shared memory are different, and
# these settings are not for them.
DESCRIPTORS_CAPABILITY = (9, 0)
_LEAST_COLUMNS = 16  # tl.dot takes no fewer


class Setting(NamedTuple):
    """What the settings depend on.

    Attributes:
        columns: head size, padded to a power of two.
        descriptors: whether tiles are read through tensor descriptors.
        fp32: whether the tensors are fp32, which goes without tensor cores.
    """

    columns: int
    descriptors: bool
    fp32: bool


def padded_head_size(head_size: int) -> int:
    """Returns the columns of a tile, a power of two."""
    return max(int(triton.next_power_of_2(head_size)), _LEAST_COLUMNS)


def _launch(queries: int, keys: int, warps: int, stages: int = 2) -> Launch:
    return Launch(num_warps=warps, num_stages=stages, blocks={"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys})


def _by_columns(columns: int, up_to_64: Launch, up_to_128: Launch, up_to_256: Launch) -> Launch:
    return up_to_64 if columns <= 64 else up_to_128 if columns <= 128 else up_to_256


def _forward_rule(setting: Setting) -> Launch:
    if setting.fp32:
        return _launch(32, 32, 8, 1)
    if setting.descriptors:
        return _by_columns(setting.columns, _launch(128, 128, 8), _launch(128, 128, 8), _launch(128, 64, 8))
    return _by_columns(setting.columns, _launch(128, 64, 8), _launch(128, 64, 8), _launch(64, 32, 8))


def _query_rule(setting: Setting) -> Launch:
    if setting.fp32:
        return _by_columns(setting.columns, _launch(32, 32, 8, 1), _launch(16, 16, 8, 1), _launch(16, 16, 8, 1))
    if setting.descriptors:
        return _by_columns(setting.columns, _launch(128, 64, 8, 3), _launch(128, 64, 8), _launch(64, 32, 8))
    return _by_columns(setting.columns, _launch(128, 64, 8), _launch(128, 32, 8), _launch(64, 16, 8))


def _key_value_rule(setting: Setting) -> Launch:
    if setting.fp32:
        return _launch(32, 32, 8, 1)
    if setting.descriptors:
        return _by_columns(setting.columns, _launch(64, 128, 8, 3), _launch(64, 128, 8), _launch(32, 64, 8))
    return _by_columns(setting.columns, _launch(32, 128, 8), _launch(64, 64, 8), _launch(16, 64, 8, 3))


FORWARD = Table(_forward_rule)
QUERY_GRADIENT = Table(_query_rule)
KEY_VALUE_GRADIENT = Table(_key_value_rule)

_ROWS = "query", "key", "value", "grad_output"
_OF_QUERIES = "query", "grad_output"


def compile_cases() -> Iterator[CompileCase]:
    """Yields every kernel with every setting, at the head sizes of Llama models and of Gemma's."""
    for head_size in (64, 96, 128, 256):
        for descriptors in (True, False):
            yield from _cases(head_size, descriptors, windowed=False)
    yield from _cases(128, descriptors=True, windowed=True)


def _cases(head_size: int, descriptors: bool, windowed: bool) -> Iterator[CompileCase]:
    setting = Setting(padded_head_size(head_size), descriptors, fp32=False)
    heads = {"SHARE": 4}
    kernels = {
        "forward": (forward_kernel, FORWARD, heads),
        "query_gradient": (query_gradient_kernel, QUERY_GRADIENT, heads),
        "key_value_gradient": (key_value_gradient_kernel, KEY_VALUE_GRADIENT, {"HEADS": 4, "SLOTS": 1}),
    }
    through = "descriptors" if descriptors else "pointers"
    for kernel, (function, table, counts) in kernels.items():
        for name, _, launch in table.entries((setting,)):
            constexprs = {
                **counts,
                **launch.blocks,
                "HEAD_SIZE": head_size,
                "COLUMNS": setting.columns,
                "WINDOWED": windowed,
                "DESCRIPTORS": descriptors,
                "PRECISION": "tf32",
                "STAGES": launch.num_stages,
            }
            title = f"attention_{kernel} {name} K={head_size} {through}{' window' * windowed}"
            signature = _signature(setting, launch)
            archs = (DESCRIPTORS_CAPABILITY[0] * 10 + DESCRIPTORS_CAPABILITY[1],) if descriptors else (80, 90, 100)
            yield CompileCase(title, function, signature, constexprs, launch.options(), "matrix", archs)


def _signature(setting: Setting, launch: Launch) -> dict[str, str]:
    """Returns the types of the arguments of all three kernels."""
    types = dict.fromkeys(("window", "num_tokens", "num_heads", "num_slots"), "i32")
    types |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    types |= dict.fromkeys(("logsumexp_HN", "delta_HN"), "*fp32:16") | {"tiles_T3": "*i32:16"}
    types |= dict.fromkeys(("output", "grad_query", "grad_key", "grad_value"), "*bf16:16")
    for name in ("query", "key", "value", "grad"):
        types |= {f"{name}_stride": "i32:16", f"{name}_head_stride": "i32:16"}
    for name in _ROWS:
        rows = launch.blocks["BLOCK_QUERIES" if name in _OF_QUERIES else "BLOCK_KEYS"]
        tile = f"tensordesc<bf16[1, {rows}, {setting.columns}]>"
        types[name] = tile if setting.descriptors else "*bf16:16"
    return types
