"""Files of a run that were damaged from outside: the message names the file and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.training.worker import main as run_rank


def test_a_rank_tells_what_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_rank([str(tmp_path)]) == 2
    expected = f"error: {tmp_path}: Is a directory; a folder stands where a file is needed; choose another path\n"
    assert capsys.readouterr().err == expected
