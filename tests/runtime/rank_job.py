"""One rank of the launcher's tests: `python -m tests.runtime.rank_job FOLDER BEHAVIOUR...`, one for each rank.

Every rank leaves its process id and its variables in FOLDER and then does what its behaviour says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from megatron_cpt.runtime.launcher import die_with_launcher

VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)


def main(folder: Path, behaviours: list[str]) -> int:
    die_with_launcher()
    rank = int(os.environ["RANK"])
    facts = {name: os.environ.get(name) for name in VARIABLES}
    written = folder / f".rank{rank}"
    written.write_text(json.dumps({"pid": os.getpid(), **facts}))
    written.rename(folder / f"rank{rank}.json")
    while len(list(folder.glob("rank*.json"))) < len(behaviours):
        time.sleep(0.01)
    print(f"rank {rank} is talking on standard output", flush=True)
    match behaviours[rank].split(":"):
        case ["refuse", seconds]:
            time.sleep(float(seconds))
            print("error: the text is not Japanese", file=sys.stderr, flush=True)
            return 2
        case ["lose", seconds]:
            time.sleep(float(seconds))
            print("error: the loss is nan", file=sys.stderr, flush=True)
            return 1
        case ["crash", seconds]:
            time.sleep(float(seconds))
            raise ConnectionError("closed by the other side")
        case ["exit"]:
            print("cannot open the index", file=sys.stderr)
            warnings.warn("nothing to do with it", UserWarning, stacklevel=1)
            return 3
        case ["murder"]:
            warnings.warn("nothing to do with it", UserWarning, stacklevel=1)
            os.kill(os.getpid(), signal.SIGKILL)
        case ["linger"]:
            time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
