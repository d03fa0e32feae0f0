"""The page of a tokenizer: what it says, from facts made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.reporting.markdown import binary_size, code, percent, table
from megatron_cpt.reporting.tokenizer_report import add_costs, usual_shapes, write_tokenizer_report


def facts_of(tokens: int, fallback: float, fertility: float | None) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "bytes": 6000,
        "bytes_per_token": 6000 / tokens,
        "tokens_per_character": tokens / 2000,
        "fertility": fertility,
        "byte_fallback_share": fallback,
        "line_end_share": 0.0,
    }


@pytest.fixture
def facts() -> dict[str, Any]:
    example = {"text": "a|b", "old": ["a", "|", "b"], "new": ["a|b"]}
    piece = {"id": 32_000, "piece": "\u2581`川`", "uses": 3, "old": ["<E5>", "<B7>", "<9D>"]}
    languages = {
        "en": (1500, 1500, 1.5, 0, [], 0.0),
        "ja": (3000, 1000, None, 90, [example] * 4, 0.5),
    }
    return {
        "name": "new",
        "base_name": "old",
        "vocab_size": {"base": 32_000, "adapted": 32_010},
        "languages": {
            name: {
                "base": facts_of(before, 0.25, fertility),
                "adapted": facts_of(after, 0.0, fertility),
                "tokens_saved": 1 - after / before,
                "new_tokens": share,
                "new_pieces_used": 1,
                "lines_changed": {"changed": changed, "total": 100, "examples": examples},
                "coverage": [(1, share)] if share else [],
            }
            for name, (before, after, fertility, changed, examples, share) in languages.items()
        },
        "vocabulary": {"kept": 32_000, "kept_at_their_id": 32_000, "new": 10, "removed": 0},
        "new_pieces": {
            "count": 10,
            "unused": 9,
            "dead": 2,
            "lengths": {1: 10},
            "lengths_used": {1: 3},
            **dict.fromkeys(("most_used", "rarest", "longest", "sample"), [piece]),
        },
        "dead": {"base": {"count": 0, "examples": []}, "adapted": {"count": 2, "examples": ["x", "y"]}},
    }


def test_page(facts: dict[str, Any], tmp_path: Path) -> None:
    report = add_costs(facts, usual_shapes(), [1, 4], 128)
    ratio = report["costs"]["models"]["Llama 2 7B"]["flops_per_byte"]["ja"]["ratio"]
    assert ratio == pytest.approx((1000 / 3000) * (1 + 10 * 6 * 4096 / 44.6e9), rel=1e-3)
    write_tokenizer_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**en** is cut exactly as before, on all 100 lines" in text
    assert "**ja**: 66.7 % fewer tokens" in text and "90 of 100 lines" in text
    assert "**2 new pieces are** dead; 9 of 10" in text
    assert "`a \\| \\| \\| b`" in text and text.count("| old | 3 |") == 3
    assert "| ja | 0.01 MB | 3,000 -> 1,000 | 2.000 -> 6.000 | 1.500 -> 0.500 | - | 25.0 % -> 0 % |" in text
    assert "``\u2581`川` ``" in text.replace("`` \u2581", "``\u2581")
    assert "| 4 | no, 2 over | 32,128 (118 padded rows) | 8,032 | 125.5 MiB |" in text
    assert json.loads((tmp_path / "report.json").read_text())["costs"]["vocab_divisor"] == 128


def test_nothing_new(facts: dict[str, Any], tmp_path: Path) -> None:
    """A vocabulary beside itself, and a language without text: a page all the same."""
    facts["new_pieces"].update(count=0, unused=0, dead=0, lengths={}, lengths_used={})
    facts["new_pieces"].update(dict.fromkeys(("most_used", "rarest", "longest", "sample"), []))
    empty = dict.fromkeys(facts_of(1, 0, 0), 0)
    facts["languages"]["ja"].update(base=empty, adapted=empty, new_tokens=0.0, coverage=[], tokens_saved=0.0)
    write_tokenizer_report(add_costs(facts, usual_shapes(), [1], 128), tmp_path)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["bytes_per_token.png"]


def test_markdown() -> None:
    assert list(table(("a", "b"), [("x|y", "1"), ("z", "-")])) == [
        "| a | b |",
        "|---|---:|",
        "| x\\|y | 1 |",
        "| z | - |",
        "",
    ]
    assert code("a`b") == "``a`b``" and code(" a\t") == "`  a<U+0009> `" and code("") == "(nothing)"
    assert [percent(share) for share in (0, 0.0001, 0.5)] == ["0 %", "<0.1 %", "50.0 %"]
    assert [binary_size(size) for size in (12, 2048, 5 << 20, 3 << 30)] == ["12 B", "2.0 KiB", "5.0 MiB", "3.00 GiB"]
