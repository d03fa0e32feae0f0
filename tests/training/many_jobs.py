"""Several training jobs one after another in the same processes, to pay for imports once.

`python -m tests.training.many_jobs CONFIG.json...`: what `training.worker` does, for each file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import install_engine


def main(paths: list[str]) -> int:
    install_engine(current_device().type)
    from megatron_cpt.training.loop import train

    for path in paths:
        train(TrainConfig.model_validate_json(Path(path).read_bytes()))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
