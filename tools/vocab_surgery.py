#!/usr/bin/env python3
"""Plan, apply or show vocabulary surgery: `megatron-cpt surgery` as a script."""

import sys

from megatron_cpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["surgery", *sys.argv[1:]]))
