"""What holds for every test and for every process that a test starts."""

from __future__ import annotations

import os

# These tests are of the CPU, on machines that have an accelerator too; and their matrices are tiny.
os.environ.setdefault("MEGATRON_CPT_DEVICE", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
