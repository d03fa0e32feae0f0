"""Launch settings of the tables, timed: what is faster than the rule is printed as an entry to be pasted.

Around the rule's setting each block, the warps and the stages are halved and doubled, alone and then two at a time,
until the time is over. A setting whose results differ from the rule's by more than rounding is no candidate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from kernel_bench import attention, streams
from kernel_bench.ceilings import Ceilings, measure_ceilings
from kernel_bench.machine import Budget, Machine, Step, Tensors
from kernel_bench.measuring import OURS, Comparison, Provider, Results, Work, measure

KERNELS = "megatron_cpt.kernels"
WARPS, STAGES = (1, 16), (1, 5)
_MOST_CHANGES = 2
_LEAST_GAIN = 0.02  # less is not worth an entry
_ROUNDING = 2.0**-7  # two roundings of bf16


@dataclass(frozen=True)
class Target:
    """One kernel at one key of its table.

    Attributes:
        module, table: where the table is.
        step: runs the kernel, with little else.
        blocks: the least and the greatest size of each block that may be varied.
        pipelined: whether the number of stages means something.
        amount, unit: FLOPs or bytes of a run.
    """

    module: str
    table: str
    key: Any
    step: Callable[[], Step[Any]]
    blocks: Mapping[str, tuple[int, int]]
    amount: float
    unit: str = "GB/s"
    pipelined: bool = False
    title: str = ""


def run(machine: Machine, results: Results, minutes: Mapping[str, float]) -> None:
    """Times the candidates of every table of these sections, each in an equal share of its section's time."""
    ceilings = measure_ceilings(machine, results)
    for section, share in minutes.items():
        wanted = list(TARGETS[section](machine))
        for target in wanted:
            rows = _time(target, machine, ceilings, results, Budget(60 * share / len(wanted)))
            print(_entry(target, rows))
            machine.free()


def candidates(rule: Any, target: Target) -> list[Any]:
    """Returns settings near the rule's, that itself first and then those with fewer changes."""
    ranges = dict(target.blocks)
    axes: dict[str, list[int]] = {}
    for name, value in rule.blocks.items():
        low, high = ranges.get(name, (value, value))
        axes[name] = [value, *(other for other in (value // 2, value * 2) if low <= other <= high)]
    warps, stages = rule.num_warps, rule.num_stages
    axes["num_warps"] = [warps, *(n for n in (warps // 2, warps * 2) if WARPS[0] <= n <= WARPS[1])]
    axes["num_stages"] = [stages]
    if target.pipelined:
        axes["num_stages"] += [n for n in (stages - 1, stages + 1) if STAGES[0] <= n <= STAGES[1]]
    found = []
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        changes = sum(value != axis[0] for value, axis in zip(values, axes.values(), strict=True))
        if changes <= _MOST_CHANGES:
            launch = type(rule)(chosen.pop("num_warps"), chosen.pop("num_stages"), chosen)
            found.append((changes, launch))
    return [launch for _, launch in sorted(found, key=lambda pair: pair[0])]


def _time(target: Target, machine: Machine, ceilings: Ceilings, results: Results, budget: Budget) -> list[Any]:
    """Returns (setting, its row)."""
    table = getattr(importlib.import_module(target.module), target.table)
    rule, step = table.rule(target.key), target.step()
    with table.using(rule):
        truth = tuple(tuple(x.double() for x in tensors) for tensors in step.run(step.prepare()))
    tried = candidates(rule, target)[: 2 if machine.dry else None]
    work = Work(target.amount, ceilings.bytes if target.unit == "GB/s" else ceilings.flops, target.unit)
    providers = [Provider(OURS, _words(launch), partial(_with_setting, step, table, launch)) for launch in tried]
    shape = f"{target.table} {target.key} {target.title}".strip()
    rows = measure(Comparison(f"sweep {target.module}", "sweep", shape, providers, work, truth), machine, budget)
    results.add(rows)
    return list(zip(tried, rows, strict=True))


def _with_setting(step: Step[Any], table: Any, launch: Any) -> Step[Any]:
    def prepare() -> Any:
        with table.using(launch):
            return step.prepare()

    def run(state: Any) -> Tensors:
        with table.using(launch):
            return step.run(state)

    return Step(run, prepare)


def _words(launch: Any) -> str:
    blocks = " ".join(f"{name}={size}" for name, size in launch.blocks.items())
    return f"{blocks} warps={launch.num_warps} stages={launch.num_stages}"


def _entry(target: Target, rows: list[Any]) -> str:
    """Returns what to paste into the table, or why there is nothing."""
    from megatron_cpt.kernels.tuning import platform

    head = f"# {target.module}.{target.table}, key {target.key!r}"
    same = [
        (launch, row)
        for launch, row in rows
        if not row.get("reason") and max(row.get("error_output", 0.0), row.get("error_gradient", 0.0)) <= _ROUNDING
    ]
    if not same or same[0][0] is not rows[0][0]:
        return f"{head}: the rule's setting has no time: {rows[0][1].get('reason')}"
    ours, (best, row) = same[0][1], min(same, key=lambda pair: pair[1]["p50_ms"])
    gain = 1 - row["p50_ms"] / ours["p50_ms"]
    tried = f"{len(same)} of {len(rows)} candidates timed"
    if gain < _LEAST_GAIN or row["p80_ms"] >= ours["p50_ms"]:
        return f"{head}: the rule's setting stays ({tried})"
    launch = f"Launch(num_warps={best.num_warps}, num_stages={best.num_stages}, blocks={dict(best.blocks)})"
    spent = f"{row['p50_ms']:.4g} ms against {ours['p50_ms']:.4g}"
    return f"{head}: {spent} ({tried})\n{platform('cuda')!r}: {{{target.key!r}: {launch}}},"


def _cross_entropy_targets(machine: Machine) -> Iterator[Target]:
    module = f"{KERNELS}.cross_entropy.triton_kernels"
    tokens = 2 if machine.dry else 4096
    for columns in (320,) if machine.dry else (32000, 43200, 128256, 176000):
        size = tokens * columns * machine.dtype.itemsize
        blocks = {"BLOCK": (512, 16384)}
        for table, amount, make in (("STATISTICS", size, _statistics), ("GRADIENT", 2 * size, _gradient)):
            step = partial(make, machine, tokens, columns)
            yield Target(module, table, columns, step, blocks, float(amount))


def _logits(machine: Machine, tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(machine.device).manual_seed(24)
    logits_TM = torch.randn(tokens, columns, device=machine.device, generator=generator).mul_(3).to(machine.dtype)
    return logits_TM, torch.randint(0, columns, (tokens,), device=machine.device, generator=generator)


def _statistics(machine: Machine, tokens: int, columns: int) -> Step[Any]:
    from megatron_cpt.kernels.cross_entropy import triton_rows

    logits_TM, columns_T = _logits(machine, tokens, columns)

    def run(out_KT: torch.Tensor) -> Tensors:
        triton_rows.statistics(logits_TM, columns_T, out_KT, 0.0)
        return (out_KT,), ()

    return Step(run, lambda: torch.zeros(3, tokens, device=machine.device))


def _gradient(machine: Machine, tokens: int, columns: int) -> Step[Any]:
    from megatron_cpt.kernels.cross_entropy import triton_rows

    logits_TM, columns_T = _logits(machine, tokens, columns)
    lse_T = logits_TM.float().logsumexp(-1)
    grad_T = torch.full_like(lse_T, 1.0)
    options = {"vocab_size": columns, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}

    def run(copy_TM: torch.Tensor) -> Tensors:
        triton_rows.gradient(copy_TM, copy_TM, columns_T, lse_T, grad_T, **options)
        return (copy_TM,), ()

    return Step(run, logits_TM.clone)


def _attention_targets(machine: Machine) -> Iterator[Target]:
    from megatron_cpt.kernels.attention.triton_settings import Setting, padded_head_size

    module = f"{KERNELS}.attention.triton_settings"
    blocks = {"BLOCK_QUERIES": (16, 256), "BLOCK_KEYS": (16, 256)}
    cases = attention.DRY_CASES[:1] if machine.dry else [case for case in attention.CASES if "4" not in case.title]
    for case in cases:
        key = Setting(padded_head_size(case.head_size), descriptors=True, fp32=False)
        squares = sum(length**2 for length in case.lengths)
        flops = 2.0 * case.num_heads * case.head_size * squares
        for table, share in (("FORWARD", 1.0), ("QUERY_GRADIENT", 2.5), ("KEY_VALUE_GRADIENT", 2.5)):
            step = partial(_attention_step, case, machine, table == "FORWARD")
            yield Target(module, table, key, step, blocks, flops * share, "TFLOP/s", pipelined=True, title=case.title)


def _attention_step(case: attention.Case, machine: Machine, forward: bool) -> Step[Any]:
    from megatron_cpt.kernels import attention as op

    inputs = attention.make_inputs(case, machine)

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return op(*tensors, inputs.cu_seqlens, scale=inputs.scale, implementation="triton")

    return inputs.forward(ours) if forward else inputs.backward(ours)


def _stream_targets(machine: Machine) -> Iterator[Target]:
    """The backward of one table may run another's kernel too; both stand in the time, one of them is varied."""
    tokens, sizes = (2, (40,)) if machine.dry else (8192, (4096, 5120, 8192, 16384))
    itemsize = machine.dtype.itemsize
    norm = f"{KERNELS}.norm.triton_kernels"
    for size in sizes:
        columns = 1 << (size - 1).bit_length()
        op = streams.rms_norm(machine, tokens, size)
        forward, backward = (float(itemsize * n) for n in (op.forward_elements, op.backward_elements))
        both = {"BLOCK_N": (1, 64), "BLOCK_D": (256, columns)}
        yield Target(norm, "FORWARD", size, partial(streams.step_of, op, "forward"), both, forward)
        step = partial(streams.step_of, op, "backward")
        if size <= 8192:
            yield Target(norm, "BACKWARD", size, step, {"BLOCK_N": (1, 64)}, backward)
        else:
            yield Target(norm, "WIDE_BACKWARD", size, step, {"BLOCK_D": (256, columns)}, backward)
            yield Target(norm, "WIDE_WEIGHT", size, step, both, backward, pipelined=True)
    heads = (4, 2, 16) if machine.dry else (32, 8, 128)
    rope = streams.rope(machine, tokens, *heads)
    most = {"BLOCK_H": (1, 1 << (heads[0] - 1).bit_length())}
    step, amount = partial(streams.step_of, rope, "forward"), float(itemsize * rope.forward_elements)
    yield Target(f"{KERNELS}.rope.triton_kernels", "ROTATION", (heads[0], heads[2]), step, most, amount)
    ffn_size = 48 if machine.dry else 14336
    swiglu = streams.swiglu(machine, tokens, ffn_size)
    for table, mode, count in (
        ("FORWARD", "forward", swiglu.forward_elements),
        ("BACKWARD", "backward", swiglu.backward_elements),
    ):
        step, amount = partial(streams.step_of, swiglu, mode), float(itemsize * count)
        yield Target(f"{KERNELS}.swiglu.triton_kernels", table, ffn_size, step, {"BLOCK_F": (256, 8192)}, amount)


TARGETS = {"cross_entropy": _cross_entropy_targets, "attention": _attention_targets, "streams": _stream_targets}
