"""Compile every Triton kernel with every launch setting, on a machine without a GPU, and look at what came out.

For each case: registers and stack of the machine code, shared memory, and the instructions that decide its speed.
What may not be (`failures`): stack bytes (registers spilled to memory), more shared memory than a program can
have, a matrix kernel on sm_90 without asynchronous products (HGMMA), a streaming kernel without 128-bit loads.

    python benchmarks/compile_kernels.py                    for sm_90; compare with results/compile_sm90.csv
    python benchmarks/compile_kernels.py --arch 80 90 100   also for other GPUs, each with a table of its own
    python benchmarks/compile_kernels.py --write            replace the rows of this Triton version in the tables
    python benchmarks/compile_kernels.py --changed          take a row from the table where it was made from the very
                                                            same source and settings, but for one in eight

The rows of another Triton version stay as they are. Two rows of one case and one version differ only where the
kernel or its settings have changed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("case", "kind", "arch", "triton", "registers", "stack", "shared", "hgmma", "hmma", "load128", "async128")
COLUMNS += ("inputs",)  # a hash of what was compiled
_ALWAYS = 8  # with --changed, one case in so many is compiled although nothing of it has changed
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def cases() -> Iterator[Any]:
    """Yields the compile cases of every op."""
    import megatron_cpt.kernels as package

    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.rpartition(".")[2].startswith("triton"):
            found = getattr(importlib.import_module(module.name), "compile_cases", None)
            yield from found() if found is not None else ()


def compile_case(case: Any, arch: int) -> dict[str, str]:
    """Returns the row of one case, every value as text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        kind, _, divisor = case.signature.get(name, "constexpr").partition(":")
        signature[name] = "constexpr" if name in case.constexprs else kind
        if divisor and name not in case.constexprs:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(fn=case.function, signature=signature, constexprs=constexprs, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    usage, code = _disassemble(kernel.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    values = {
        "case": case.name,
        "kind": case.kind,
        "arch": f"sm_{arch}",
        "triton": triton.__version__,
        "registers": re.findall(r"REG:(\d+)", usage)[0],
        "stack": re.findall(r"STACK:(\d+)", usage)[0],
        "shared": kernel.metadata.shared,
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "load128": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128", code)),
        "async128": len(re.findall(r"\bLDGSTS\.E(?:\.\w+)*\.128|\bUTMALDG", code)),
        "inputs": inputs_of(case, arch),
    }
    return {name: str(value) for name, value in values.items()}


def inputs_of(case: Any, arch: int) -> str:
    """Returns a hash of all that decides the machine code of a case: the same inputs give the same code."""
    import triton

    settings = [dict(sorted(each.items())) for each in (case.signature, case.constexprs, case.options)]
    # Triton's key of a function: its source, and that of what it calls.
    told = (triton.__version__, arch, case.kind, case.function.cache_key, settings)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:12]


def _disassemble(cubin: bytes, tools: Path) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        calls = [tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"]
        usage, code = (
            subprocess.run([*map(str, call), file.name], capture_output=True, text=True, check=True).stdout
            for call in calls
        )
    return usage, code


def failures(row: dict[str, str]) -> list[str]:
    """Returns what may not be in a row, each as a phrase."""
    found = []
    arch = int(row["arch"].removeprefix("sm_"))
    if int(row["stack"]):
        found.append(f"{row['stack']} bytes of registers are spilled")
    if int(row["shared"]) > SHARED_BYTES[arch]:
        found.append(f"{row['shared']} bytes of shared memory, more than {SHARED_BYTES[arch]}")
    if row["kind"] == "matrix" and arch == 90 and not int(row["hgmma"]):
        found.append("no asynchronous matrix products")
    if row["kind"] == "stream" and not int(row["load128"]) + int(row["async128"]):
        found.append("no loads of 128 bits")
    return [f"{row['case']} on {row['arch']}: {phrase}" for phrase in found]


def table_of(arch: str) -> Path:
    """Returns the path of an architecture's committed table."""
    return RESULTS / f"compile_{arch.replace('_', '')}.csv"


def read_table(arch: str) -> list[dict[str, str]]:
    """Returns the rows of an architecture's committed table, [] where there is none."""
    path = table_of(arch)
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_tables(rows: list[dict[str, str]]) -> None:
    """Replaces the committed rows of these architectures and this Triton version."""
    for arch in sorted({row["arch"] for row in rows}):
        made = [row for row in rows if row["arch"] == arch]
        versions = {row["triton"] for row in made}
        kept = [row for row in read_table(arch) if row["triton"] not in versions]
        with table_of(arch).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted([*kept, *made], key=lambda row: (row["triton"], row["case"])))


def differences(rows: list[dict[str, str]]) -> list[str]:
    """Returns what differs from the committed rows of the same Triton version and architecture, each as a phrase.

    A version that has no rows is not compared.
    """
    found = []
    for arch, version in sorted({(row["arch"], row["triton"]) for row in rows}):
        made = {row["case"]: row for row in rows if row["arch"] == arch}
        committed = {row["case"]: row for row in read_table(arch) if row["triton"] == version}
        if not committed:
            continue
        name = table_of(arch).name
        for case in sorted(made.keys() | committed.keys()):
            if case not in committed:
                found.append(f"{case} is not in {name}")
            elif case not in made:
                found.append(f"{case} is in {name} and is no case")
            elif made[case] != committed[case]:
                old, new = committed[case], made[case]
                # Another source may well compile to the same code.
                changed = [f"{key} {old[key]} -> {new[key]}" for key in COLUMNS[:-1] if old[key] != new[key]]
                found += [f"{case} on {arch}: {', '.join(changed)}"] if changed else []
    return found


def _row_of(position: int, arch: int) -> dict[str, str]:
    return compile_case(list(cases())[position], arch)


def compile_all(archs: list[int], processes: int, changed: bool = False) -> list[dict[str, str]]:
    """Returns the rows of all cases on all architectures; with `changed`, those of the table where they still hold."""
    rows: dict[tuple[int, int], dict[str, str] | None] = {}
    for arch in archs:
        made = {(row["case"], row["inputs"]): row for row in read_table(f"sm_{arch}")} if changed else {}
        for position, case in enumerate(cases()):
            if arch in case.archs:
                rows[position, arch] = made.get((case.name, inputs_of(case, arch))) if position % _ALWAYS else None
    missing = [pair for pair, row in rows.items() if row is None]
    with ProcessPoolExecutor(processes) as pool:
        rows |= zip(missing, pool.map(_row_of, *zip(*missing, strict=True)), strict=True)
    return [row for row in rows.values() if row is not None]


def main() -> int:
    """Compile, print the table, and return 1 where something may not be or differs from the committed table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", type=int, default=[90], choices=sorted(SHARED_BYTES))
    parser.add_argument("--write", action="store_true", help="replace the committed rows of this Triton version")
    parser.add_argument("--changed", action="store_true", help="compile what the committed table was not made from")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    # Interpreted kernels cannot be compiled; Triton reads the variable when a kernel's module is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    rows = compile_all(arguments.arch, arguments.processes, arguments.changed)
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    wrong = [phrase for row in rows for phrase in failures(row)]
    if arguments.write:
        write_tables(rows)
    else:
        wrong += differences(rows)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
