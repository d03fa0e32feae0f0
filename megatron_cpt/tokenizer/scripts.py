"""Which pieces belong to a target language, told by their characters.

A rule keeps a piece when at least one of its characters is of the script. Such a piece can only ever
appear in a text that has the character, so every text without the script is cut exactly as before.
"""

from __future__ import annotations

import re

from megatron_cpt.errors import TokenizerError

_CHARACTERS = {
    # Kana, Han, CJK punctuation, full-width and half-width forms.
    "ja": "\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\uffe0-\uffe6"
    "\U00020000-\U0003ffff",
    # Hangul syllables and letters.
    "ko": "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff",
    # The letters that English lacks. Few German pieces have one: "any" compresses German far better, at the
    # price of cutting some source-language text anew.
    "de": "\u00e4\u00f6\u00fc\u00df\u00c4\u00d6\u00dc\u1e9e",
    "any": "\\s\\S",
}
SCRIPTS = tuple(_CHARACTERS)


def script_rule(script: str) -> re.Pattern[str]:
    """A pattern that finds a character of the script in a piece; "any" finds every character.

    Raises:
        TokenizerError: the script is not one of `SCRIPTS`.
    """
    if script not in _CHARACTERS:
        raise TokenizerError(f"script {script!r} is unknown: expected one of {', '.join(SCRIPTS)}")
    return re.compile(f"[{_CHARACTERS[script]}]")
