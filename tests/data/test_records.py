"""The native readers of records against Python's own json, codecs and hashlib."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_cpt.data import Document, is_held_out
from megatron_cpt.data._native import Block, Sha256, parse_jsonl, parse_txt

FUZZ = int(os.environ.get("FUZZ", "1"))  # `make fuzz` looks so many times longer

characters = st.characters(codec="utf-8") | st.sampled_from('"\\/\b\f\n\r\t\0\x7f#\u2028\ufeff\U0001f600 ')
texts = st.text(characters, max_size=200)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
records = st.fixed_dictionaries(
    {"text": texts}, optional={"id": texts | st.integers(), "more": values, "te\u0301xt": values}
)


def not_rfc(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def expected(line: bytes) -> str | None:
    """The text of a line by Python's json, or None where it has none that can be written as UTF-8."""
    try:
        record = json.loads(line.decode(), parse_constant=not_rfc)
        if not isinstance(record, dict) or not isinstance(record["text"], str):
            return None
        name = record.get("id")
        if isinstance(name, bool | list | dict):
            return None
        str(name).encode()
        record["text"].encode()
    except (ValueError, KeyError):
        return None
    return record["text"]


def parsed(line: bytes) -> str | None:
    block = parse_jsonl(line, "text", 2)
    assert len(block) + len(block.faults) == 1, block.faults
    return block.texts()[0] if len(block) else None


@settings(max_examples=300 * FUZZ, deadline=None)
@given(st.lists(records, min_size=1, max_size=5), st.booleans(), st.sampled_from([None, 1]), st.sampled_from("\n\r"))
def test_any_object_gives_its_text_and_id(
    objects: list[dict[str, Any]], ascii_only: bool, indent: int | None, end: str
) -> None:
    separators = (",", ":") if indent is None else ("\t, ", " : ")
    lines = [
        json.dumps(o, ensure_ascii=ascii_only, separators=separators) + ("\r\n" * 2)[end == "\n" :] for o in objects
    ]
    block = parse_jsonl("".join(lines).encode(), "text", 1)
    assert block.faults == []
    assert block.texts() == [o["text"] for o in objects]
    assert block.ids() == [str(o.get("id", "")) for o in objects]
    assert block.document_bytes.tolist() == [len(o["text"].encode()) for o in objects]


@settings(max_examples=800 * FUZZ, deadline=None)
@given(records, st.booleans(), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 2), st.binary(max_size=3))))
@example({"text": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}, True, [])
def test_damaged_lines_are_refused_where_json_refuses_them(
    record: dict[str, Any], ascii_only: bool, cuts: list[tuple[int, int, bytes]]
) -> None:
    line = json.dumps(record, ensure_ascii=ascii_only).encode()
    for at, removed, put in cuts:
        at %= len(line) + 1
        line = (line[:at] + put + line[at + removed :]).replace(b"\n", b" ")
    if line.strip():
        assert parsed(line) == expected(line)


ODD_LINES = [
    '{"text": "x", "n": [NaN]}', '{"text": "x", "n": -Infinity}', '{"text": "x", "n": 01}', '{"text": "x", "n": +1}',
    '{"text": "x", "n": 1.}', '{"text": "x", "n": .5}', '{"text": "x", "n": 1e+}', '{"text": "x", "n": -0.5E-7}',
    '{"text": "x", "n": -}', '{"text": "x",}', '{"text": "x", "n": [1,]}', '{"text": "x", "n": {"a"}}', "{}", "[]",
    '{"text": "x"} x', '{"text": "x"}{}', '{"text": "x", "n": tru}', '{"text": "x", "n": nulll}', "{'text': 'x'}",
    '{"text": "a", "text": "b"}', '{"text": "a", "text": 1}', '{"text": 1, "text": "b"}', '{"te\\u0078t": "x"}',
    '{"text": "\\x"}', '{"text": "\\u12g4"}', '{"text": "\\u123', '{"text": "\\', '{"text": "x', '{"text"', "{", "null",
    '{"text": "\\ud83d\\ude00"}', '{"text": "\\ud83d"}', '{"text": "\\ude00\\ud83d"}', '{"text": "\\ud83d\\u0041"}',
    '{"text": "x", "id": "\\ud83d"}', '{"text": "x", "more": "\\ud83d"}', '{"text": "x", "id": null}', '"text"', "12",
    '{"text": "x", "id": true}', '{"text": "x", "id": {"a": 1}}', '{"text": "\\u0000"}', '{"text": "\t"}', "{,}",
    '{"a": [[{"b": [[], {}, [{"c": {}}], 1]}], "text"], "text": "x"}', '{"a": [[}], "text": "x"}', '{"a" "b"}',
    '{"text": "x", "a": [1 2]}', '{"text": "x" "a": 1}', '{"text": "x", "a": ]}', '{"text": "\x7f"}', '{"text": "\0"}',
]  # fmt: skip


@pytest.mark.parametrize("line", ODD_LINES)
def test_odd_lines_are_judged_as_json_does(line: str) -> None:
    assert parsed(line.encode()) == expected(line.encode())
    for cut in range(1, len(line)):
        assert parsed(line[:cut].encode()) == expected(line[:cut].encode())


def test_nesting_has_no_limit_and_numbers_are_ids_as_they_are_spelt() -> None:
    deep = b'{"id": 1e5, "a": ' + b'[{"b":' * 100_000 + b"1" + b"}]" * 100_000 + b', "text": "x"}'
    block = parse_jsonl(deep, "text", 1)
    assert (block.texts(), block.ids()) == (["x"], ["1e5"])
    assert parsed(deep.replace(b"}]", b"]}", 1)) is None


def test_utf8_is_judged_as_python_does_at_every_offset() -> None:
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE]
    edges += [0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    damage = [
        b"\xed\xa0\x80",
        b"\xc0\xaf",
        b"\xf4\x90\x80\x80",
        b"\xe3\x81",
        b"\xf0\x9f\x98",
        b"\x80",
        b"\xf0\x9f\x98\x80",
    ]
    sequences = [bytes(s) for n in (1, 2, 3) for s in product(edges, repeat=n)]
    sequences += [
        bytes(s)
        for s in product([0xE1, 0xED, 0xF0, 0xF1, 0xF4], [0x80, 0x8F, 0x90, 0xA0, 0x41], [0x80, 0xC0], [0xBF, 0x41])
    ]
    long_texts = ["", "a", "ab" * 40, "\u3042" * 60, "\u00e4b" * 70, "\U0001f600\u3042" * 30]
    lines = [s.replace(b"\0", b"\1") for s in sequences]
    lines += [
        prefix.encode()[skip:] + s + suffix.encode()
        for s in damage
        for prefix, suffix in product(long_texts, long_texts)
        for skip in range(70)
    ]  # fmt: skip
    for line in (b"x" + line + end for line in lines for end in (b"", b"z")):
        block = parse_txt(line, 2)
        try:
            assert block.texts() == [line.decode().rstrip("\r\n")] and block.faults == []
        except UnicodeDecodeError as caught:
            [(number, reason)] = block.faults
            assert number == 2 and f"at byte {caught.start + 1} of the line" in reason and len(block) == 0


@settings(max_examples=300 * FUZZ, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab \t\r\n\x0b\x1c\x85\u3000\u2003\u200b\ufeff"), max_size=12), max_size=12))
def test_text_files_are_cut_where_str_strip_leaves_nothing(pieces: list[str]) -> None:
    data = "\n".join(pieces)
    wanted: list[tuple[int, str]] = []
    kept: list[str] = []
    for number, line in enumerate([*re.findall(r"[^\n]*\n|[^\n]+", data.removeprefix("\ufeff")), ""], 1):
        if line.strip():
            kept.append(line)
        elif kept:
            wanted.append((number - len(kept), "".join(kept).rstrip("\r\n").replace("\r\n", "\n")))
            kept = []
    block = parse_txt(data.encode(), 1)
    assert list(zip(block.lines.tolist(), block.texts(), strict=True)) == wanted and block.faults == []


def test_a_line_of_a_text_file_ends_in_lf_or_cr_lf() -> None:
    data = b"one\r\n two\rthree\r\r\nfour\r\n\r\nfive\nsix\r\n"
    block = parse_txt(data, 1)
    assert block.texts() == ["one\n two\rthree\r\nfour", "five\nsix"] and block.lines.tolist() == [1, 5]
    assert json.loads(block.write_jsonl(np.array([True, False]), None))["text"] == block.texts()[0]
    assert parse_jsonl(b'{"text": "a\\r\\nb"}\r\n', "text", 1).texts() == ["a\r\nb"]


def test_faults_stand_at_their_lines_and_the_rest_is_read() -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\n \r\n{"text": "\xff"}\n[]\n\n{"text": "b"}\n{"b\\n": 1, "a": 2}'
    block = parse_jsonl(data, "text", 1)
    assert (block.texts(), block.lines.tolist()) == (["a", "b"], [1, 6])
    assert [line for line, _ in block.faults] == [3, 4, 7]
    assert block.faults[0][1].startswith("not valid UTF-8 (byte 0xff at byte 11 of the line)")
    assert block.faults[2][1] == "no field 'text' (fields here: a, b\n); name the one with the text"
    too_long = parse_jsonl(data, "text", 1, longest=17).faults
    assert too_long[-1] == (7, "a record of more than 17 bytes; split it") and too_long[:2] == block.faults[:2]
    [(line, reason)] = parse_txt(b"one\ntwo\nth\0ree\n\nfine", 7).faults
    assert line == 9 and reason.startswith("a NUL at byte 3 of the line")


@pytest.mark.parametrize("fraction", [-1.0, 0.0, 0.1, 0.37, 0.999, 1.0, 2.0, math.nan])
def test_held_out_is_that_of_documents(fraction: float) -> None:
    ids = ["", "#", "#a", "book", "book#1", "book#2", "\u5f3e#x"] + [f"{n}" * (n % 40) for n in range(300)]
    records = [{"id": name, "text": "t" * (k % 150)} for k, name in enumerate(ids)]
    block = parse_jsonl("\n".join(map(json.dumps, records)).encode(), "text", 1)
    wanted = [
        is_held_out(Document(text, "", "", name), fraction) for text, name in zip(block.texts(), ids, strict=True)
    ]
    assert block.held_out(fraction).tolist() == wanted


@settings(max_examples=200 * FUZZ, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_sha256_can_be_put_down_and_taken_up(pieces: list[bytes]) -> None:
    mine, portable, theirs = Sha256(), Sha256(instructions=False), hashlib.sha256()
    for piece in pieces:
        mine.update(piece)
        portable.update(piece)
        theirs.update(piece)
        mine = Sha256.from_saved(mine.saved())
        assert mine.digest() == portable.digest() == theirs.digest()
    with pytest.raises(ValueError, match="not the saved state"):
        Sha256.from_saved(mine.saved() + b"x")


@settings(max_examples=200 * FUZZ, deadline=None)
@given(st.lists(st.tuples(records, st.booleans(), st.none() | texts), max_size=6), st.booleans())
def test_written_lines_keep_all_but_the_changed_text(
    rows: list[tuple[dict[str, Any], bool, str | None]], ascii_only: bool
) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record, _, _ in rows]
    keep = np.array([kept for _, kept, _ in rows], bool)
    changed = [text for _, _, text in rows]
    block = parse_jsonl("\r\n".join(lines).encode(), "text", 1, keep_records=True)
    assert (
        block.write_jsonl(keep) == "".join(line + "\n" for line, kept in zip(lines, keep, strict=True) if kept).encode()
    )
    written = block.write_jsonl(keep, changed)
    wanted = [record if text is None else {**record, "text": text} for record, kept, text in rows if kept]
    assert [json.loads(line) for line in written.split(b"\n")[:-1]] == wanted
    chosen = block.select(keep)
    assert chosen.texts() == [record["text"] for record, kept, _ in rows if kept]
    everything = np.ones(len(chosen), bool)
    assert chosen.write_jsonl(everything, [t for t, kept in zip(changed, keep, strict=True) if kept]) == written


def test_lines_that_were_not_kept_are_not_invented() -> None:
    everything = np.ones(1, bool)
    with pytest.raises(ValueError, match="parsed without keep_records"):
        parse_jsonl(b'{"text": "x", "url": "u"}', "text", 1).write_jsonl(everything)
    block = parse_txt('say "hi"\n\x01\u00e4'.encode(), 1)
    assert json.loads(block.write_jsonl(everything)) == {"text": 'say "hi"\n\x01\u00e4'}
    assert Block.from_texts(["a"]).write_jsonl(everything, ["b"]) == b'{"text": "b"}\n'
    twice = parse_jsonl(b'{"text": "a", "text" : "b", "z": 1}', "text", 1, keep_records=True)
    assert twice.write_jsonl(everything, ["c"]) == b'{"text": "a", "text" : "c", "z": 1}\n'
    for wrong in (np.ones(2, bool), np.ones((1, 1), bool)):
        with pytest.raises(ValueError, match="keep has"):
            block.select(wrong)
    with pytest.raises(TypeError):
        block.select(np.ones(1, np.int64))
