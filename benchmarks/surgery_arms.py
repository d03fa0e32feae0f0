"""One way of making the rows of a new vocabulary, in a process of its own: what `bench_surgery_peers.py` measures.

It runs under the interpreter of the tool it tries, so nothing but the standard library is imported at the top.

    PYTHON benchmarks/surgery_arms.py ARM INPUTS OUTPUT

INPUTS holds `base`, `donor` (Hugging Face folders), `tokenizer` (the new one), `source.jsonl` and `target.jsonl`
(training text), `both.jsonl` (the two of them), `shards` (datasets of the new tokenizer), `vectors.safetensors` (of
the arm `vectors`). The last line of the output is JSON: seconds and CPU seconds of the imports and of the work, and
the peak after each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Each arm imports, yields, and does the rest.
Arm = Iterator[None]


def transformers_resize(inputs: Path, output: Path) -> Arm:
    """transformers' own, with its default, the mean resizing."""
    from transformers import AutoModelForCausalLM

    yield
    model = AutoModelForCausalLM.from_pretrained(inputs / "base", dtype="auto")
    model.resize_token_embeddings(vocab_size(inputs), mean_resizing=True)
    model.save_pretrained(output)


def tokensurgeon(method: str) -> Callable[[Path, Path], Arm]:
    """mergekit's tokensurgeon with one of its approximations, all else by default."""

    def arm(inputs: Path, output: Path) -> Arm:
        from mergekit.scripts.tokensurgeon import main as surgeon

        yield
        words = [str(inputs / "base"), str(inputs / "donor"), str(output), "--approximation-method", method]
        surgeon.main(words, standalone_mode=False)

    return arm


def deepfocus(text: str) -> Callable[[Path, Path], Arm]:
    """FOCUS by its authors, called for each matrix; the second call finds the first one's vectors."""

    def arm(inputs: Path, output: Path) -> Arm:
        os.environ["XDG_CACHE_HOME"] = f"{output}.cache"  # nothing is left of earlier runs
        import torch
        from deepfocus import FOCUS
        from transformers import AutoModelForCausalLM, AutoTokenizer

        yield
        model = AutoModelForCausalLM.from_pretrained(inputs / "base")
        old, new = (AutoTokenizer.from_pretrained(inputs / name) for name in ("base", "tokenizer"))
        torch.manual_seed(1)
        made = [
            FOCUS(
                source_embeddings=table.weight.data,
                source_tokenizer=old,
                target_tokenizer=new,
                target_training_data_path=str(inputs / f"{text}.jsonl"),
                processes=int(os.environ.get("OMP_NUM_THREADS", 1)),
            )
            for table in (model.get_input_embeddings(), model.get_output_embeddings())
        ]
        save_with(model, made, output)

    return arm


def wechsel_formula(inputs: Path, output: Path) -> Arm:
    """The formula of WECHSEL's package on the vectors of the arm `vectors`; rows of kept pieces are the base's."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from wechsel import create_target_embeddings

    yield
    model = AutoModelForCausalLM.from_pretrained(inputs / "base")
    old, new = (AutoTokenizer.from_pretrained(inputs / name) for name in ("base", "tokenizer"))
    vectors = load_file(inputs / "vectors.safetensors")
    made = []
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows = table.weight.data.numpy()
        found, _, _ = create_target_embeddings(vectors["old"], vectors["new"], old, new, rows.copy())
        found[: len(rows)] = rows  # an extended vocabulary begins with the base's ids
        made.append(torch.from_numpy(found))
    save_with(model, made, output)


def vectors(inputs: Path, output: Path) -> Arm:
    """Static vectors of both vocabularies, the old ones turned onto the new ones: as our `wechsel` makes them."""
    from safetensors.torch import save_file

    from megatron_cpt.config.surgery import WechselMethod
    from megatron_cpt.data import read_documents
    from megatron_cpt.surgery.methods.inputs import Reading
    from megatron_cpt.surgery.methods.static_vectors import static_vectors
    from megatron_cpt.surgery.methods.wechsel import _rotation
    from megatron_cpt.tokenizer import load_tokenizer, map_vocabularies

    yield
    method = WechselMethod(method="wechsel")
    old, new = load_tokenizer(inputs / "base"), load_tokenizer(inputs / "tokenizer")
    sides = []
    for tokenizer, name in ((old, "source"), (new, "target")):
        texts = (document.text for document in read_documents([inputs / f"{name}.jsonl"]))
        sides.append(static_vectors(tokenizer, Reading(texts, method.max_bytes), method))
    entries = map_vocabularies(old, new).entries
    pairs = [
        (sides[0][entry.old_id], sides[1][id])
        for id, entry in enumerate(entries)
        if entry.origin == "kept" and sides[0][entry.old_id].any() and sides[1][id].any()
    ]
    turned = sides[0] @ _rotation(pairs, sides[0].shape[1], sides[1].shape[1])
    output.mkdir(parents=True)
    save_file({"old": turned, "new": sides[1]}, output / "vectors.safetensors")


def ours(method: str, *settings: str, calibrated: bool = False) -> Callable[[Path, Path], Arm]:
    """`surgery plan` and `surgery apply`, and `surgery calibrate` between them where asked."""

    def arm(inputs: Path, output: Path) -> Arm:
        # What the commands import when they are called.
        import megatron_cpt.data
        import megatron_cpt.surgery  # noqa: F401
        from megatron_cpt.cli.main import main as command

        yield
        base, plan = str(inputs / "base"), f"{output}.plan"
        words = ["plan", "--old-tokenizer", base, "--new-tokenizer", str(inputs / "tokenizer"), "--method", method]
        for setting in settings:
            words += ["--set", setting.format(inputs=inputs)]
        done = [command(["surgery", *words, "--output", plan])]
        if calibrated:
            texts = ["--source", str(inputs / "shards" / "en.train"), "--target", str(inputs / "shards" / "ja.train")]
            done.append(command(["surgery", "calibrate", plan, base, *texts, "--output", f"{plan}.calibrated"]))
            plan += ".calibrated"
        done.append(command(["surgery", "apply", plan, base, str(output)]))
        assert not any(done), done

    return arm


CORPORA = ("source_corpus={inputs}/source.jsonl", "target_corpus={inputs}/target.jsonl")
OURS = {
    "mean": ("mean",),
    "focus": ("focus", *CORPORA),
    "focus target": ("focus", CORPORA[1], "target_only=true"),
    "wechsel": ("wechsel", *CORPORA),
    "clp": ("clp", "helper={inputs}/donor"),
    "omp": ("omp", "donor={inputs}/donor"),
}
ARMS: dict[str, Callable[[Path, Path], Arm]] = {
    "transformers resize": transformers_resize,
    "tokensurgeon subword": tokensurgeon("subword"),
    "tokensurgeon mean": tokensurgeon("mean"),
    "tokensurgeon omp": tokensurgeon("omp"),
    "deepfocus": deepfocus("target"),
    "deepfocus, both": deepfocus("both"),
    "vectors": vectors,
    "wechsel package": wechsel_formula,
    **{f"ours {name}": ours(*words) for name, words in OURS.items()},
    **{f"ours {name} + prior": ours(*words, calibrated=True) for name, words in OURS.items()},
}


def vocab_size(inputs: Path) -> int:
    """Pieces of the new vocabulary."""
    entries = json.loads((inputs / "donor" / "config.json").read_text())
    return int(entries["vocab_size"])


def save_with(model: Any, tables: list[Any], output: Path) -> None:
    """Save a model of transformers with these two tables as its embedding and its head."""
    model.resize_token_embeddings(len(tables[0]), mean_resizing=False)
    model.get_input_embeddings().weight.data[:] = tables[0]
    model.get_output_embeddings().weight.data[:] = tables[1]
    model.save_pretrained(output)


def peak_mib(pid: int | str = "self") -> float:
    """The most memory that a process has held; 0 when it has ended.

    ru_maxrss would not do: it begins with the memory of the process that started this one.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def main(name: str, inputs: Path, output: Path) -> None:
    """Run an arm and say what it took."""
    taken: dict[str, float] = {}
    begun = time.monotonic(), time.process_time()
    parts = ARMS[name](inputs, output)
    for part in ("imports", "work"):
        next(parts, None)
        now = time.monotonic(), time.process_time()
        taken |= {f"{part}_seconds": now[0] - begun[0], f"{part}_cpu_seconds": now[1] - begun[1]}
        taken[f"{part}_mib"] = peak_mib()
        begun = now
    print(json.dumps(taken))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute())
