"""The note, the pictures and the candidates of `bench_kernels.py`, on made-up figures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LOSS = {"kernel": "linear cross-entropy", "mode": "full", "shape": "N=8192 D=4096 V=43176 peaked"}
OURS = {**LOSS, "provider": "megatron_cpt", "setting": "triton, budget 1 GiB, logits bf16", "gradients_mib": "100"}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the package `kernel_bench`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_bench
    from kernel_bench import machine, measuring, note, sweep  # noqa: F401

    return kernel_bench


def _rows(bench: Any, *given: dict[str, str]) -> list[dict[str, str]]:
    """Made-up rows: what is not given is empty, and the machine is none."""
    facts = {"gpu": "made-up GPU", "date": "2000-01-01", "commit": "none", "torch": "0", "triton": "0", "driver": "0"}
    return [dict.fromkeys(bench.measuring.COLUMNS, "") | facts | row for row in given]


def _verdict(bench: Any, rows: list[dict[str, str]], what: str) -> str:
    (found,) = [bar.verdict for bar in bench.note.bars(rows) if bar.what == what]
    return str(found)


def test_a_bar_is_met_missed_by_a_share_or_not_measured(bench: Any) -> None:
    liger = {**LOSS, "provider": "liger-kernel 9.9", "setting": "chunk constant 1", "p50_ms": "10"}
    cce = {**LOSS, "provider": "cut-cross-entropy 9.9", "setting": "cce", "reason": "ImportError: a reason"}
    ours = OURS | {"p50_ms": "6", "fraction_of_floor": "0.9", "peak_mib": "1200"}
    rows = _rows(bench, ours, liger, cce)
    assert _verdict(bench, rows, "loss, V=43176: share of the three products' floor") == "yes"
    assert _verdict(bench, rows, "loss, V=43176: time beside Liger's") == "NO, by 20.0%"
    assert _verdict(bench, rows, "loss, V=43176: time beside CCE's default") == "not measured: ImportError: a reason"
    assert _verdict(bench, rows, "loss, V=43176: peak MiB, at most budget + gradients") == "NO, by 6.8%"
    assert "there is no row" in _verdict(bench, rows, "loss, V=32000: time beside Liger's")


def test_attention_is_held_to_the_fastest_peer_that_has_a_time(bench: Any) -> None:
    packed = {"kernel": "attention", "mode": "forward", "shape": "N=8192 H=32 G=8 K=128 documents of 1024 in the mean"}
    peers = [
        {**packed, "provider": "torch", "setting": "a", "p50_ms": "3"},
        {**packed, "provider": "torch", "setting": "b", "p50_ms": "2"},
        {**packed, "provider": "torch", "setting": "c", "reason": "RuntimeError: none"},
    ]
    ours = {**packed, "provider": "megatron_cpt", "setting": "triton", "p50_ms": "1.5"}
    what = "attention, documents of 1024 in the mean, forward: time beside the fastest peer's (b)"
    assert _verdict(bench, _rows(bench, ours, *peers), what) == "yes"


def test_the_note_says_what_did_not_run(bench: Any) -> None:
    rows = _rows(bench, OURS | {"p50_ms": "6", "rate": "1", "rate_unit": "TFLOP/s"}, LOSS | {"reason": "Error: a | b"})
    text = bench.note.write(rows, "made_up.csv")
    assert "# Kernels on made-up GPU" in text and "[Table](made_up.csv)" in text
    assert "| linear cross-entropy full N=8192 D=4096 V=43176 peaked |   | Error: a / b |" in text


def test_pictures_of_a_table(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plot_kernels

    figures = {"p50_ms": "6", "p20_ms": "5", "p80_ms": "7", "peak_mib": "1200", "floor_ms": "4"}
    rows = _rows(bench, OURS | figures | {"fraction_of_floor": "0.66"})
    path = tmp_path / "made_up.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, bench.measuring.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert plot_kernels.read_table(path) == rows
    assert [picture.name for picture in plot_kernels.draw(rows, path)] == ["made_up_memory.png", "made_up_floor.png"]
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"made_up.csv: got 1 rows with the columns \['a', 'b'\], expected"):
        plot_kernels.read_table(path)


def test_candidates_begin_with_the_rule_and_stay_in_their_ranges(bench: Any) -> None:
    from megatron_cpt.kernels.tuning import Launch

    rule = Launch(4, 2, {"A": 64, "FIXED": 128})
    target = bench.sweep.Target("m", "T", 1, lambda: None, {"A": (64, 256)}, 1.0, pipelined=True)
    found = bench.sweep.candidates(rule, target)
    assert found[0] == rule and len({str(launch) for launch in found}) == len(found)
    assert {launch.blocks["A"] for launch in found} == {64, 128}
    assert {launch.blocks["FIXED"] for launch in found} == {128}
    assert {launch.num_warps for launch in found} == {2, 4, 8}
    assert {launch.num_stages for launch in found} == {1, 2, 3}
    changed = [sum([x.num_warps != 4, x.num_stages != 2, x.blocks["A"] != 64]) for x in found]
    assert changed == sorted(changed) and max(changed) == 2


@pytest.mark.parametrize(
    ("faster", "entry"),
    [
        ({"p50_ms": 0.9, "p80_ms": 0.92, "error_output": 0.0}, "Launch(num_warps=8, num_stages=1, blocks={'A': 64})"),
        ({"p50_ms": 0.9, "p80_ms": 1.1, "error_output": 0.0}, "the rule's setting stays"),
        ({"p50_ms": 0.99, "p80_ms": 0.99, "error_output": 0.0}, "the rule's setting stays"),
        ({"p50_ms": 0.1, "p80_ms": 0.1, "error_output": 0.5}, "the rule's setting stays (1 of 2 candidates timed)"),
        ({"reason": "OutOfResources: shared memory"}, "the rule's setting stays (1 of 2 candidates timed)"),
    ],
    ids=["faster", "noisy", "hardly faster", "wrong", "failed"],
)
def test_an_entry_is_printed_for_what_is_faster_and_right(bench: Any, faster: dict[str, Any], entry: str) -> None:
    from megatron_cpt.kernels.tuning import Launch

    target = bench.sweep.Target("m", "T", 1, lambda: None, {}, 1.0)
    ours = {"p50_ms": 1.0, "p80_ms": 1.0, "error_output": 0.0}
    rows = [(Launch(4, 1, {"A": 64}), ours), (Launch(8, 1, {"A": 64}), faster)]
    assert entry in bench.sweep._entry(target, rows)


@pytest.mark.usefixtures("triton")
def test_a_dry_run_of_the_sweep(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = bench.machine.Machine(dry=True)
    results = bench.measuring.Results(tmp_path / "sweep.csv", machine)
    bench.sweep.run(machine, results, dict.fromkeys(bench.sweep.TARGETS, 5.0))
    out = capsys.readouterr().out
    for table in ("STATISTICS", "GRADIENT", "QUERY_GRADIENT", "KEY_VALUE_GRADIENT", "ROTATION", "BACKWARD"):
        assert f".{table}, key" in out
    assert "no time" not in out
    assert not [row["reason"] for row in results.rows if row["reason"]]


def test_a_dry_run_is_no_result(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_kernels

    inside = str(BENCHMARKS / "results" / "dry.csv")
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--dry-run", "--output", inside])
    assert bench_kernels.main() == 2
    assert "a dry run is no result" in capsys.readouterr().err
    assert not Path(inside).exists()


def test_quantiles_and_errors(bench: Any) -> None:
    import torch

    assert bench.measuring.quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert bench.measuring.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert bench.measuring.relative_error(exact * 1.5, exact) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="got a result of shape"):
        bench.measuring.relative_error(exact[:1], exact)
