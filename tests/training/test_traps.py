"""Eleven traps of megatron-core 0.16.1, and what keeps each of them shut.

1. The interleaved schedule with overlapped sends frees an output that is still being sent:
   tests/model/test_llama.py::test_settings_that_close_a_trap,
   tests/training/test_layouts.py::test_layout_equals_one_process (PP2-VPP2-overlap)
2. Saving hangs without psutil and starts a server process that outlives a killed rank:
   tests/training/test_traps.py::test_psutil_is_declared,
   tests/training/test_interruption.py::test_killed_job_goes_on_as_if_it_had_not_been
3. The distributed optimizer restores torch's AdamW wrongly:
   tests/training/test_optimizer.py::test_one_step_counter_for_a_group,
   tests/training/test_resume.py::test_resumed_in_the_same_layout_is_bit_identical
4. The default way to shard the optimizer's state cannot be saved:
   tests/training/test_resume.py::test_resumed_in_another_layout
5. Norms decay unless the engine's own scheduler is used:
   tests/training/test_against_transformers.py::test_ten_steps_equal_transformers
6. The engine's norm refuses sequence parallelism:
   tests/model/test_llama.py::test_norms_know_sequence_parallelism,
   tests/training/test_layouts.py::test_layout_equals_one_process (TP2-SP-selective)
7. The engine's attention refuses packed documents:
   tests/model/test_llama.py::test_own_modules_are_in_place,
   tests/training/test_against_transformers.py::test_ten_steps_equal_transformers
8. The fusers call torch.compile while they are imported:
   tests/runtime/test_engine.py::test_every_spelling_means_the_cpu,
   tests/runtime/test_engine.py::test_torch_is_left_alone
9. Fused accumulation of weight gradients needs a kernel that is not here:
   tests/model/test_llama.py::test_settings_that_close_a_trap
10. Padded rows of the vocabulary take part in the loss, and their number depends on TP:
   tests/training/test_against_transformers.py::test_ten_steps_equal_transformers (vocabulary 250),
   tests/training/test_variants.py::test_layout_equals_one_process (threes-TP3)
11. Masters and moments behind a bucket with a padded end are saved shifted:
   tests/training/test_masters.py::test_state_behind_a_padded_bucket,
   tests/training/test_masters.py::test_masters_of_other_weights_are_refused

Interleaving over two stages without overlapped sends mixes messages up and is refused:
   tests/training/test_bad_input.py::test_impossible_layout
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_trap_has_its_test() -> None:
    assert __doc__ is not None
    traps = [part for part in re.split(r"\n(?=\d+\. )", __doc__) if part[0].isdigit()]
    assert [int(trap.split(".")[0]) for trap in traps] == list(range(1, 12))
    named = [re.findall(r"(tests/[\w/]+\.py)::(\w+)", trap) for trap in traps]
    assert all(named)
    for path, name in (pair for pairs in named for pair in pairs):
        functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert name in functions, f"{path} has no {name}"


def test_psutil_is_declared() -> None:
    dependencies = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    assert re.search(r'"psutil\b', dependencies)
