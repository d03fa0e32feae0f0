"""What the `bench_convert*.py` share: models of random weights, commands that are watched, folders read as bytes.

Nothing here imports torch or this project: a process that starts others hands its own size on to their ru_maxrss, and
what is compared has to be read by other code than that which wrote it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "megatron_cpt.cli.main", "checkpoint"]
BLOCK_BYTES = 64 << 20
ITEM_BYTES = 2  # bf16


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Llama; the defaults have 1,253,672,960 weights, the smallest ones that are told about."""

    layers: int = 24
    hidden: int = 2048
    ffn: int = 5632
    heads: int = 32
    groups: int = 4
    vocab: int = 48000


SEVENTY_B = Sizes(80, 8192, 28672, 64, 8, 128256)
TINY = Sizes(4, 64, 176, 8, 4, 301)


def add_sizes(parser: argparse.ArgumentParser, default: Sizes) -> None:
    """Options for every size of the model."""
    for name, value in vars(default).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """The sizes that the options of `add_sizes` say."""
    return Sizes(*(getattr(arguments, name) for name in vars(Sizes())))


def tensors_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape by name of every tensor of an untied Llama, as Hugging Face names them."""
    width, keys = sizes.hidden, sizes.hidden // sizes.heads * sizes.groups
    of_layer = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (sizes.ffn, width),
        "mlp.up_proj": (sizes.ffn, width),
        "mlp.down_proj": (width, sizes.ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocab, width)}
    for layer in range(sizes.layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (sizes.vocab, width)}


def config_of(sizes: Sizes) -> dict[str, Any]:
    """Content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.groups,
        "head_dim": sizes.hidden // sizes.heads,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def write_model(folder: Path, sizes: Sizes, files: int, *, sparse: bool = False) -> int:
    """Write a Hugging Face folder of random bf16 weights without tokenizer; returns the bytes of its tensors.

    Args:
        folder: to make.
        sizes: of the model.
        files: number of weight files, all of about the same size.
        sparse: write headers only, the files being holes of the true size: no disk is used, every weight is 0.
    """
    folder.mkdir(parents=True)
    shards, total = _shards(tensors_of(sizes), files)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, (name, shard) in enumerate(zip(names, shards, strict=True)):
        _write_shard(folder / name, shard, None if sparse else number)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config_of(sizes), indent=2))
    return total


def _elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


def _shards(shapes: dict[str, tuple[int, ...]], files: int) -> tuple[list[dict[str, tuple[int, ...]]], int]:
    total = sum(map(_elements, shapes.values())) * ITEM_BYTES
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled >= total * len(shards) / files:
            shards.append({})
        shards[-1][name] = shape
        filled += _elements(shape) * ITEM_BYTES
    return shards, total


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], seed: int | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shard.items():
        end = position + _elements(shape) * ITEM_BYTES
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if seed is None:
            file.truncate(8 + len(raw) + position)
            return
        for block in _random_bf16(list(shard.values()), seed):
            file.write(block)


def _random_bf16(shapes: list[tuple[int, ...]], seed: int) -> Iterator[bytes]:
    """Normal numbers of standard deviation 0.02 (norms: around 1) in blocks, cut off to bf16."""
    import numpy as np

    draw = np.random.default_rng(seed)
    for shape in shapes:
        left = _elements(shape)
        while left:
            count = min(left, 1 << 22)
            values = draw.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            if len(shape) == 1:
                values += np.float32(1)
            yield (values.view(np.uint32) >> 16).astype("<u2").tobytes()  # the upper half of a float32
            left -= count


def bytes_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def warm(folder: Path) -> None:
    """Read every file under a folder, so that the page cache holds it."""
    buffer = memoryview(bytearray(8 << 20))
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder, by its path inside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): _hash_of_file(path) for path in files}


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 over dtype, shape and bytes of every tensor of a Hugging Face folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']} ".encode())
                file.seek(8 + length + begin)
                for start in range(begin, end, 8 << 20):
                    digest.update(file.read(min(8 << 20, end - start)))
                found[name] = digest.hexdigest()
    return found


@dataclass(frozen=True)
class Watched:
    """A command that ended, and what it took; a process and those it started count as one."""

    code: int
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float  # resident, the larger of ru_maxrss and of what was sampled over all processes
    anonymous_mib: float  # sampled; memory that no file stands behind
    output: str
    errors: str

    @property
    def last_line(self) -> str:
        """The last line it said about what went wrong."""
        lines = self.errors.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


def watched(words: list[str], folder: Path, environment: dict[str, str] | None = None) -> Watched:
    """Run a command to its end, its memory sampled every 10 ms.

    Args:
        words: the command.
        folder: where its output goes into files for as long as it runs.
        environment: of the command; None: this process's.
    """
    paths = folder / "stdout.txt", folder / "stderr.txt"
    with open(paths[0], "wb") as output, open(paths[1], "wb") as errors:
        begun = time.monotonic()
        child = subprocess.Popen(words, stdout=output, stderr=errors, env=environment, start_new_session=True)
        resident = anonymous = samples = 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if samples % 10 == 0:  # to look for new processes takes longer than to look at known ones
                family = _session(child.pid)
            samples += 1
            now = [_memory_kib(pid) for pid in family]
            resident = max(resident, sum(kib for kib, _ in now))
            anonymous = max(anonymous, sum(kib for _, kib in now))
            time.sleep(0.01)
        wall = time.monotonic() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    said = [path.read_text(errors="replace") for path in paths]
    for path in paths:
        path.unlink()
    cpu = usage.ru_utime + usage.ru_stime
    peak = max(resident, usage.ru_maxrss) / 1024
    return Watched(child.returncode, wall, cpu, peak, anonymous / 1024, *said)


def _session(leader: int) -> list[int]:
    """All processes of the session that a process leads: itself and those that it started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text(errors="replace").rpartition(")")[2].split()  # the name may hold anything
        except OSError:
            continue
        if int(state[3]) == leader:
            found.append(int(path.parent.name))
    return found


def _memory_kib(pid: int) -> tuple[int, int]:
    """(resident, resident and anonymous or shared memory) of a process; zeros when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}
    return kib.get("VmRSS", 0), kib.get("RssAnon", 0) + kib.get("RssShmem", 0)


def refused(source: Path, options: tuple[str, ...]) -> str:
    """What `checkpoint convert` has against a conversion with these options; "" when it would do it."""
    words = [*COMMAND, "convert", str(source), str(source.with_name("not-made")), *options, "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
