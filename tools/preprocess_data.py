#!/usr/bin/env python3
"""Build an indexed dataset from text files: `megatron-cpt data build` under the name Megatron users look for."""

import sys

from megatron_cpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["data", "build", *sys.argv[1:]]))
