from __future__ import annotations

import pytest

from megatron_cpt.kernels import tuning
from megatron_cpt.kernels.tuning import Launch, Table


def _table() -> Table:
    measured = {(90, "3.6"): {4096: Launch(8, blocks={"BLOCK": 2})}, (90, "3.9"): {4096: Launch(4)}}
    return Table(lambda size: Launch(1, blocks={"BLOCK": size}), measured)


def test_the_measured_setting_of_the_platform_comes_before_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table()
    assert table.choose("cpu", 4096) == Launch(1, blocks={"BLOCK": 4096})
    monkeypatch.setattr(tuning, "platform", lambda device: (90, "3.6"))
    assert table.choose("cuda", 4096) == Launch(8, blocks={"BLOCK": 2})
    assert table.choose("cuda", 512) == Launch(1, blocks={"BLOCK": 512})
    monkeypatch.setattr(tuning, "platform", lambda device: (80, "3.6"))
    assert table.choose("cuda", 4096) == Launch(1, blocks={"BLOCK": 4096})


def test_a_setting_can_be_forced_for_a_while() -> None:
    table = _table()
    with table.using(Launch(16)):
        assert table.choose("cpu", 7) == Launch(16)
    assert table.choose("cpu", 7).num_warps == 1


def test_entries_are_those_of_the_rule_and_the_measured_ones_that_differ() -> None:
    entries = [(name, key, launch.num_warps) for name, key, launch in _table().entries((512, 4096))]
    assert entries == [("rule", 512, 1), ("rule", 4096, 1), ("sm90-3.6", 4096, 8), ("sm90-3.9", 4096, 4)]
    same = Table(lambda _: Launch(1), {(90, "3.6"): {1: Launch(1)}})
    assert [name for name, *_ in same.entries((1,))] == ["rule"]


def test_a_launch_is_given_as_keywords() -> None:
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert Launch(4, 2, {"BLOCK": 8}).keywords() == {"BLOCK": 8, **options}
