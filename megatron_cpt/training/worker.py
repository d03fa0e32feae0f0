"""One rank of a training job: `python -m megatron_cpt.training.worker CONFIG.json`.

The launcher, torchrun and Slurm all start this module; the configuration is resolved and checked
before any rank exists.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.errors import CptError, error_of_system
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import install_engine
from megatron_cpt.runtime.launcher import die_with_launcher


def main(arguments: list[str]) -> int:
    """Train; returns the exit code and leaves the reason on standard error."""
    die_with_launcher()
    try:
        config = TrainConfig.model_validate_json(Path(arguments[0]).read_bytes())
        install_engine(current_device().type)
        from megatron_cpt.training.loop import train

        train(config)
    except CptError as caught:
        return _give_reason(caught)
    except OSError as caught:
        return _give_reason(error_of_system(caught))
    return 0


def _give_reason(error: CptError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
