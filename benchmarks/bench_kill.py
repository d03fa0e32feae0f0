"""Is a dataset the same, byte for byte, when its build is killed at random moments and repeated?

Each trial kills `megatron-cpt data build` with SIGKILL at a random moment of its work (imports do not count), repeats
it until it ends, and compares every file with those of a build that nobody disturbed. The journal is written every few
MiB here, so that kills fall between entries.

    python benchmarks/bench_kill.py --text corpus.jsonl... --tokenizer tokenizer.model --kills 50
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = """
import sys
from megatron_cpt.cli.main import main
from megatron_cpt.data import ordered
ordered.COMMIT_BYTES = 3 << 20
sys.exit(main(["data", "build", *sys.argv[1:]]))
"""


def hashes(prefix: Path) -> list[str]:
    """SHA-256 of the files of a dataset."""
    return [hashlib.sha256(Path(f"{prefix}.{end}").read_bytes()).hexdigest() for end in ("bin", "idx", "manifest.json")]


def start(words: list[str], prefix: Path) -> subprocess.Popen[bytes]:
    """Begin a build."""
    return subprocess.Popen([sys.executable, "-c", COMMAND, *words, "--output", str(prefix)], stdout=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> float:
    """Wait until the build has begun to write; returns that moment."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)
    return time.monotonic()


def main() -> None:
    """Kill, repeat, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    words = [*arguments.text, "--tokenizer", arguments.tokenizer, "--workers", str(arguments.workers)]
    draw = random.Random(arguments.seed)
    same = killed = journaled = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        process = start(words, Path(folder) / "whole")
        begun = wait_for(Path(folder) / "whole.parts", process)
        if process.wait():
            raise SystemExit("the build fails without being killed")
        duration = time.monotonic() - begun
        expected = hashes(Path(folder) / "whole")
        for trial in range(arguments.kills):
            prefix = Path(folder) / f"x{trial}"
            process = start(words, prefix)
            wait_for(Path(f"{prefix}.parts"), process)
            time.sleep(draw.uniform(0, duration))
            process.kill()
            killed += process.wait() != 0
            journaled += any(Path(f"{prefix}.parts").glob("*[0-9].json"))
            unfinished = not Path(f"{prefix}.manifest.json").exists() or Path(f"{prefix}.parts").exists()
            if unfinished and start(words, prefix).wait():
                raise SystemExit(f"trial {trial}: the repeated build fails")
            same += hashes(prefix) == expected
            for path in Path(folder).glob(f"{prefix.name}.*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(
        f"{same} of {arguments.kills} byte-identical ({killed} were killed before their end, {journaled} of them went "
        f"on from a journal; a build works {duration:.1f} s)"
    )
    if same != arguments.kills:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
