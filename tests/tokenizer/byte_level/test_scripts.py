"""Which bytes are of a script."""

from __future__ import annotations

import unicodedata

import pytest

from megatron_cpt.tokenizer.byte_level.scripts import byte_rule, num_characters
from megatron_cpt.tokenizer.scripts import script_rule


@pytest.mark.parametrize("script", ["ja", "ko", "de"])
def test_no_part_of_another_character_is_of_the_script(script: str) -> None:
    """What freezes the source languages: bytes of the script stand in no text without it."""
    holds, rule = byte_rule(script), script_rule(script)
    blocks = (0x20, 0x3400, 1), (0x3400, 0xD800, 11), (0xE000, 0x10000, 5), (0x1F000, 0x20100, 3)
    for code in (code for block in blocks for code in range(*block)):
        text = chr(code)
        if unicodedata.category(text) == "Cn":
            continue
        data = text.encode()
        if rule.search(text):
            assert holds(data)
            assert holds(b" a" + data)
        else:
            assert not any(holds(data[start:end]) for start in range(len(data)) for end in range(start + 1, 5))


def test_beginnings_and_ends() -> None:
    holds = byte_rule("ja")
    assert holds(b"\xe3\x81") and holds(b"a\xe5") and holds(b"\x81\x82\xe4\xb8")
    assert not holds(b"\xe3") and not holds(b"\x81\x82") and not holds(b"\xe3\x84") and not holds(b"a\xe2\x80")
    assert byte_rule("ko")(b"\xea\xb0") and not byte_rule("ja")(b"\xea\xb0")
    assert byte_rule("any")(b"\x81") and byte_rule("any")(b"a")
    assert num_characters("a\u3042".encode() + b"\xe3\x81") == 3
