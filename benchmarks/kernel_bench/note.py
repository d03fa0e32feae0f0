"""The note beside a table of measurements: the bars and whether each is met, and the figures of every provider.

Everything in it is read from the table; nothing is known beforehand but the bars.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kernel_bench.measuring import OURS

Row = dict[str, str]
DEFAULT = "triton, budget 1 GiB, logits bf16"
WIDE = "triton, budget 1 GiB, logits fp32"
SUMMED = ", into main_grad"
LEAN = "triton, budget 256 MiB, logits bf16"
LOSS = "linear cross-entropy"
CEILINGS = ("matrix product", "copy", "launch")


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: what is measured, with the shape.
        least, most: the bound; one of them is None.
        got: the value; None where something of it was not measured.
        why: then, what is missing.
    """

    what: str
    got: float | None
    least: float | None = None
    most: float | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """Returns "yes", "NO, by ...", or "not measured: ..."."""
        if self.got is None:
            return f"not measured: {self.why}"
        bound = self.least if self.least is not None else self.most
        assert bound is not None
        met = self.got >= bound if self.least is not None else self.got <= bound
        return "yes" if met else f"NO, by {abs(self.got / bound - 1):.1%}"

    def line(self) -> str:
        """Returns a line of a Markdown table."""
        bound = f">= {self.least:.4g}" if self.least is not None else f"<= {self.most:.4g}"
        got = "" if self.got is None else f"{self.got:.4g}"
        return f"| {self.what} | {bound} | {got} | {self.verdict} |"


def write(rows: list[Row], table: str) -> str:
    """Returns the note as Markdown.

    Args:
        rows: of the table, each value as text.
        table: its file name.
    """
    facts = rows[0]
    parts = [
        f"# Kernels on {facts['gpu']}",
        f"{facts['date']}, commit {facts['commit']}, torch {facts['torch']}, Triton {facts['triton']}, driver "
        f"{facts['driver']}, {facts['dtype'] or 'no dtype'}. [Table]({table}), made by `make bench-gpu`. All providers "
        "of a comparison ran in one process, round by round, on the same inputs; times are medians of the device with "
        "a cold L2, errors are relative 2-norms against float64 (of the gradients: the greatest). Memory is what a run "
        "adds at its peak, gradients included.",
        "## Ceilings",
        _ceilings(rows),
        "## Bars",
        "| what | bar | measured | met |\n|---|---|---|---|\n" + "\n".join(bar.line() for bar in bars(rows)),
        "## Figures",
        *_figures(rows),
        "## What did not run",
        _missing(rows),
    ]
    return "\n\n".join(parts) + "\n"


def bars(rows: list[Row]) -> list[Bar]:
    """Returns every bar, measured or not."""
    return [*_loss_bars(rows), *_memory_bars(rows), *_attention_bars(rows), *_stream_bars(rows)]


def _loss_bars(rows: list[Row]) -> Iterator[Bar]:
    """Time and error of the loss."""
    for vocab_size in (32000, 43176, 128256, 176000):
        shape = f"N=8192 D=4096 V={vocab_size} peaked"
        ours = _find(rows, LOSS, shape, OURS, DEFAULT)
        fraction, why = _value(ours, "fraction_of_floor")
        yield Bar(f"loss, V={vocab_size}: share of the three products' floor", fraction, least=0.85, why=why)
        liger = _find(rows, LOSS, shape, "liger-kernel", "chunk constant 1")
        most = 0.27 if vocab_size >= 128000 else 0.5
        yield _ratio(f"loss, V={vocab_size}: time beside Liger's", ours, liger, "p50_ms", most=most)
        cce = _find(rows, LOSS, shape, "cut-cross-entropy", "cce")
        yield _ratio(f"loss, V={vocab_size}: time beside CCE's default", ours, cce, "p50_ms", most=0.75)
    for vocab_size in (43176, 128256):
        shape = f"N=8192 D=4096 V={vocab_size} peaked"
        what = f"loss, V={vocab_size}: gradient error, logits in fp32 beside bf16"
        pair = [_find(rows, LOSS, shape, OURS, setting) for setting in (WIDE, DEFAULT)]
        yield _ratio(f"{what}, rounded to bf16", *pair, "error_gradient", most=0.35)
        pair = [_weight_alone(_find(rows, LOSS, shape, OURS, setting + SUMMED)) for setting in (WIDE, DEFAULT)]
        yield _ratio(f"{what}, the weight's in fp32", *pair, "error_gradient", most=0.35)


def _memory_bars(rows: list[Row]) -> Iterator[Bar]:
    for vocab_size in (32000, 43176, 128256, 176000):
        for setting in (DEFAULT, DEFAULT + SUMMED):
            ours = _find(rows, LOSS, f"N=8192 D=4096 V={vocab_size} peaked", OURS, setting)
            (peak, why), (gradients, _) = _value(ours, "peak_mib"), _value(ours, "gradients_mib")
            what = f"loss, V={vocab_size}: peak MiB, at most budget + gradients{setting.removeprefix(DEFAULT)}"
            yield Bar(what, peak, most=1024 + (gradients or 0.0), why=why)
    shape = "N=8192 D=4096 V=43176 peaked"
    plain = _find(rows, LOSS, shape, "torch", "plain")
    for setting in (DEFAULT, LEAN):
        what = f"loss, V=43176: peak memory beside plain cross-entropy's, {', '.join(setting.split(', ')[1::2])}"
        yield _ratio(what, _find(rows, LOSS, shape, OURS, setting), plain, "peak_mib", most=0.25)


def _attention_bars(rows: list[Row]) -> Iterator[Bar]:
    for mode, least in (("forward", 0.75), ("backward", 0.65)):
        dense = "N=8192 H=32 G=8 K=128 1 document"
        ours, cudnn = (
            _find(rows, "attention", dense, name, setting, mode)
            for name, setting in ((OURS, "triton"), ("torch", "SDPA cuDNN"))
        )
        what = f"attention, causal 8k, head size 128, {mode}: rate beside cuDNN's"
        yield _ratio(what, cudnn, ours, "p50_ms", least=least)
        packed = "N=8192 H=32 G=8 K=128 documents of 1024 in the mean"
        ours = _find(rows, "attention", packed, OURS, "triton", mode)
        what = f"attention, documents of 1024 in the mean, {mode}: time beside the fastest peer's"
        peers = [row for row in rows if _is(row, "attention", packed, "torch", None, mode) and row["p50_ms"]]
        if not peers:
            yield Bar(what, None, most=1.0, why="no peer has a time")
            continue
        fastest = min(peers, key=lambda row: float(row["p50_ms"]))
        yield _ratio(f"{what} ({fastest['setting']})", ours, fastest, "p50_ms", most=1.0)


def _stream_bars(rows: list[Row]) -> Iterator[Bar]:
    for kernel, shape in (
        ("RMSNorm", "N=8192 D=4096"),
        ("RMSNorm with residual", "N=8192 D=4096"),
        ("RoPE", "N=8192 H=32 G=8 K=128"),
        ("SwiGLU", "N=8192 F=14336"),
    ):
        for mode in ("forward", "backward"):
            ours = _find(rows, kernel, shape, OURS, "triton", mode)
            fraction, why = _value(ours, "fraction_of_floor")
            yield Bar(f"{kernel} {mode}: share of the copy bandwidth", fraction, least=0.85, why=why)
            compiled = _find(rows, kernel, shape, "torch", "torch.compile", mode)
            yield _ratio(f"{kernel} {mode}: time beside torch.compile's", ours, compiled, "p50_ms", most=1.0)


def _is(row: Row, kernel: str, shape: str, provider: str, setting: str | None, mode: str) -> bool:
    """A provider is named without its version."""
    same = row["kernel"] == kernel and row["shape"] == shape and row["mode"] == mode
    return same and row["provider"].split(" ")[0] == provider and setting in (None, row["setting"])


def _find(rows: Iterable[Row], kernel: str, shape: str, provider: str, setting: str, mode: str = "full") -> Row:
    """Returns the row, or one that says that there is none."""
    found = [row for row in rows if _is(row, kernel, shape, provider, setting, mode)]
    return found[0] if found else {"reason": f"there is no row of {provider}, {setting}, {shape}"}


def _weight_alone(row: Row) -> Row:
    """Returns the row with the error of the last gradient alone."""
    return row | {"error_gradient": row.get("error_gradients", "").split(" ")[-1]}


def _value(row: Row, column: str) -> tuple[float | None, str]:
    text = row.get(column, "")
    return (float(text), "") if text else (None, row.get("reason") or f"the row has no {column}")


def _ratio(what: str, over: Row, under: Row, column: str, least: float | None = None, most: float | None = None) -> Bar:
    (one, why), (other, why_other) = _value(over, column), _value(under, column)
    got = one / other if one is not None and other is not None else None
    return Bar(what, got, least, most, why or why_other)


def _ceilings(rows: list[Row]) -> str:
    lines = ["| | | ms | rate | rate at the end |", "|---|---|---|---|---|"]
    measured = [row for row in rows if row["kernel"] in CEILINGS]
    for row in measured:
        if row["mode"] == "first":
            last = [other for other in measured if other["mode"] == "last" and other["shape"] == row["shape"]]
            rates = f"{row['rate']} {row['rate_unit']} | {last[0]['rate'] if last else ''}"
            lines.append(f"| {row['kernel']} | {row['shape']} | {row['p50_ms']} | {rates} |")
    return "\n".join(lines)


def _figures(rows: list[Row]) -> Iterator[str]:
    """Yields a heading and a table for each comparison."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["kernel"] not in CEILINGS and row["p50_ms"]:
            groups.setdefault((row["kernel"], row["mode"], row["shape"]), []).append(row)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("provider", lambda row: f"{row['provider']}, {row['setting']}"),
        ("ms (p20 to p80)", lambda row: f"{row['p50_ms']} ({row['p20_ms']} to {row['p80_ms']})"),
        ("rate", lambda row: f"{row['rate']} {row['rate_unit']}"),
        ("of the floor", lambda row: row["fraction_of_floor"]),
        ("peak MiB", lambda row: row["peak_mib"]),
        ("error, output", lambda row: row["error_output"]),
        ("error, gradient", lambda row: row["error_gradient"]),
    ]
    for (kernel, mode, shape), group in groups.items():
        lines = ["| " + " | ".join(title for title, _ in columns) + " |", "|---" * len(columns) + "|"]
        for row in sorted(group, key=lambda row: float(row["p50_ms"])):
            lines.append("| " + " | ".join(value(row) for _, value in columns) + " |")
        yield f"### {kernel}, {mode}, {shape}\n\n" + "\n".join(lines)


def _missing(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["reason"]:
            reason = re.sub(r"\s+", " ", row["reason"]).replace("|", "/")
            what = " ".join(filter(None, (row["kernel"], row["mode"], row["shape"])))
            lines.append(f"| {what} | {row['provider']} {row['setting']} | {reason} |")
    return "\n".join(["| what | provider | reason |", "|---|---|---|", *lines]) if lines else "Everything ran."
