#!/usr/bin/env python3
"""Convert a checkpoint between formats: `megatron-cpt checkpoint convert` under the name Megatron users look
for."""

import sys

from megatron_cpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", "convert", *sys.argv[1:]]))
