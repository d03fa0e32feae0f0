"""Faults are counted under kinds: what differs from record to record is left out, names stay whole."""

from __future__ import annotations

import pytest

from megatron_cpt.data._native import parse_jsonl, parse_txt
from megatron_cpt.data.counting import Counts

LONGEST = 40


@pytest.mark.parametrize(
    ("field", "line", "kind"),
    [
        ("text2", b'{"a": 1}', "no field 'text2'"),
        ("text 2 (raw)", b'{"a": 1}', "no field 'text 2 (raw)'"),
        ("today's 2", b'{"a": 1}', "no field 'today's 2'"),
        ("v2", b'{"v2": 5}', "field 'v2' holds number, expected a string"),
        ("text", b'{"text": "\xff"}', "not valid UTF-8"),
        ("text", b"{", "not a line of JSON"),
        ("text", b'{"text": "%s"}' % (b"a" * LONGEST), "a record of more than N bytes; split it"),
    ],
)
def test_the_kind_of_a_fault_of_jsonl(field: str, line: bytes, kind: str) -> None:
    counts = Counts()
    counts.add_faults(reason for _, reason in parse_jsonl(line + b"\n", field, 1, LONGEST, False).faults)
    assert counts.faults == {kind: 1}


def test_places_that_differ_are_of_one_kind() -> None:
    counts = Counts()
    for text in (b"a\0", b"abc\0"):
        counts.add_faults(reason for _, reason in parse_txt(text, 1, LONGEST).faults)
    assert counts.faults == {"a NUL at byte N of the line; this is not a text file, or remove it": 2}
