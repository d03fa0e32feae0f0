from __future__ import annotations

import platform
import sys

import pytest

from megatron_cpt.kernels.tuning import CompileCase
from tests.kernels.compiling import load_gate, run_gate

CLEAN = {
    "case": "a kernel",
    "kind": "stream",
    "arch": "sm_90",
    "triton": "3.9.0",
    "registers": "64",
    "stack": "0",
    "shared": "64",
    "hgmma": "0",
    "hmma": "0",
    "load128": "4",
    "async128": "0",
    "inputs": "0123456789ab",
}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="Triton's compiler is there for Linux on x86-64"
)
def test_every_kernel_compiles_for_sm_90_as_the_committed_table_says() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = run_gate("--changed", "--processes", "2")
    assert result.returncode == 0, result.stderr


def test_what_was_compiled_decides_whether_it_is_again() -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    gate = load_gate()

    class Function:
        cache_key = "source"

    case = CompileCase("a kernel", Function(), {"x": "*bf16"}, {"BLOCK": 64}, {"num_warps": 4}, "stream")
    inputs = gate.inputs_of(case, 90)
    changes = [{"signature": {"x": "*fp32"}}, {"constexprs": {"BLOCK": 32}}, {"options": {"num_warps": 8}}]
    changed = [case._replace(**change) for change in changes] + [
        case._replace(function=type("F", (), {"cache_key": "y"}))
    ]
    assert len({inputs, gate.inputs_of(case, 80), *(gate.inputs_of(each, 90) for each in changed)}) == 6
    assert inputs == gate.inputs_of(case._replace(name="renamed"), 90) and triton.__version__


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"stack": "8"}, "8 bytes of registers are spilled"),
        ({"shared": str((227 << 10) + 1)}, "bytes of shared memory, more than"),
        ({"kind": "matrix"}, "no asynchronous matrix products"),
        ({"load128": "0"}, "no loads of 128 bits"),
    ],
)
def test_what_may_not_be_is_named(change: dict[str, str], phrase: str) -> None:
    gate = load_gate()
    assert gate.failures(CLEAN) == []
    assert phrase in gate.failures(CLEAN | change)[0]
    assert gate.failures(CLEAN | {"load128": "0", "async128": "4"}) == []


def test_a_table_that_differs_is_named(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = load_gate()
    monkeypatch.setattr(gate, "RESULTS", tmp_path)
    gate.write_tables([CLEAN | {"triton": "3.6.0", "registers": "70"}, CLEAN | {"arch": "sm_80"}])
    assert gate.differences([CLEAN]) == gate.differences([CLEAN | {"inputs": "ba9876543210"}]) == []
    gate.write_tables([CLEAN, CLEAN | {"case": "an old kernel"}])
    assert [row["triton"] for row in gate.read_table("sm_90")] == ["3.6.0", "3.9.0", "3.9.0"]
    assert len(gate.read_table("sm_80")) == 1
    assert gate.differences([CLEAN | {"registers": "65"}, CLEAN | {"case": "new"}]) == [
        "a kernel on sm_90: registers 64 -> 65",
        "an old kernel is in compile_sm90.csv and is no case",
        "new is not in compile_sm90.csv",
    ]
