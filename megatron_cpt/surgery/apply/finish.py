"""What makes a rewritten checkpoint whole: config, tokenizer, documents, and the manifest, last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.described import Hints
from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.hf_tables import HFTables
from megatron_cpt.checkpoint.huggingface import GENERATION
from megatron_cpt.checkpoint.manifest import KIND, SEALS, write_checkpoint_manifest
from megatron_cpt.checkpoint.mp_rank import open_mp_rank
from megatron_cpt.checkpoint.tables import VocabTables, carry
from megatron_cpt.checkpoint.tokenizer_files import MODEL_FILES, SIDE_FILES, copy_tokenizer
from megatron_cpt.checkpoint.torch_dist_tables import TorchDistTables
from megatron_cpt.config.manifest import MANIFEST, read_json, sha256_file, write_json_atomic, write_manifest
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.plan import SurgeryPlan
from megatron_cpt.tokenizer import Tokenizer

# A folder may hold the model in other forms too, with the old tables.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".index"}
_REPLACED = {CONFIG, GENERATION, MANIFEST, *MODEL_FILES, *SIDE_FILES, "vocab_map.json", "vocab.json", "merges.txt"}
_REPLACED |= {"surgery_certificate.json"}  # of the surgery that made the source
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ABOUT_THE_OLD = {"kind", "megatron_cpt", "inputs", "format", "shape", "vocab_size", "padded_vocab_size"}
_ABOUT_THE_OLD |= {"tokenizer_sha256", "weights_sha256", "surgery", "vocab_divisor", *_IDS, *SEALS}


def finish(
    folder: Path,
    old: VocabTables,
    plan: SurgeryPlan,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    record: dict[str, Any],
    written: dict[str, Any],
) -> None:
    """Write what is missing beside the weights in `folder`.

    Args:
        folder: holds what `old.rewrite` has written.
        old: the source.
        plan: what was applied.
        tokenizer: the new one.
        facts: of the surgery, for the manifest.
        record: what undoing it needs, likewise.
        written: what `old.rewrite` returned.
    """
    source = old.folder
    before = read_json(source / MANIFEST, CheckpointError) if (source / MANIFEST).exists() else None
    record = {**record, "manifest": before and {key: value for key, value in before.items() if key not in SEALS}}
    inputs = {"plan": plan.sha256, "old_tokenizer": plan.old_sha256}
    if before is not None:
        inputs[MANIFEST] = sha256_file(source / MANIFEST)
    padded = facts["padded_vocab_size"]
    weights = {name: written[name] for name in ("weights_sha256",) if name in written}
    if isinstance(old, HFTables):
        record |= _finish_folder(folder, old, plan, tokenizer, padded)
        inputs[CONFIG] = sha256_file(source / CONFIG)
        stated = {"format": old.format, "surgery": {**facts, "undo": record}, **weights}
        # Its config.json has one size, that of the tables.
        write_checkpoint_manifest(folder, old.reader.llama, padded, padded, plan.new_sha256, inputs, **stated)
    elif isinstance(old, TorchDistTables):
        stated = {name: value for name, value in old.reader.stated.items() if name not in _ABOUT_THE_OLD}
        stated |= {name: old.reader.stated[name] for name in _IDS if name in old.reader.stated}
        stated = adapted_ids(stated, plan, tokenizer) if any(name in stated for name in _IDS) else stated
        if isinstance(other := stated.get("huggingface"), dict):
            stated["huggingface"] = {name: held and adapted_ids(held, plan, tokenizer) for name, held in other.items()}
        stated |= {"vocab_divisor": facts["divisor"], "surgery": {**facts, "undo": record}, **weights}
        copy_tokenizer(tokenizer.path, folder)
        write_checkpoint_manifest(folder, old.reader.llama, plan.new_size, padded, plan.new_sha256, inputs, **stated)
    else:
        copy_tokenizer(tokenizer.path, folder)
        stated = {"format": old.format, "surgery": {**facts, "undo": record}}
        try:
            llama = open_mp_rank(source, Hints(vocab_size=plan.old_size)).llama
        except CheckpointError:  # its tables could be changed, yet it is of no Llama, or of Megatron's older form
            sizes = {"vocab_size": plan.new_size, "padded_vocab_size": padded, "tokenizer_sha256": plan.new_sha256}
            write_manifest(folder / MANIFEST, KIND, inputs, **stated, **sizes)
            return
        write_checkpoint_manifest(folder, llama, plan.new_size, padded, plan.new_sha256, inputs, **stated)


def _finish_folder(folder: Path, old: HFTables, plan: SurgeryPlan, tokenizer: Tokenizer, padded: int) -> dict[str, Any]:
    """Configs, tokenizer and documents of a Hugging Face folder; returns the old configs."""
    carry_documents(old.folder, folder)
    path = old.folder / GENERATION
    old_config = read_json(old.folder / CONFIG, CheckpointError)
    generation = read_json(path, CheckpointError) if path.is_file() else None
    config = adapted_ids(old_config, plan, tokenizer)
    if isinstance(generation, dict):
        write_json_atomic(folder / GENERATION, adapted_ids(generation, plan, tokenizer))
    else:
        ends = {name: config[name] for name in _IDS[:2] if config.get(name) is not None}
        write_json_atomic(folder / GENERATION, {"_from_model_config": True, **ends})
    copy_tokenizer(tokenizer.path, folder)
    write_json_atomic(folder / CONFIG, {**config, "vocab_size": padded})
    return {"config": old_config, "generation_config": generation}


def carry_documents(source: Path, folder: Path) -> None:
    """Carry over what is neither weights nor tokenizer nor made anew: licence, model card, code."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name not in _REPLACED and not path.name.startswith("."):
            carry(path, folder / path.name)


def adapted_ids(config: dict[str, Any], plan: SurgeryPlan, tokenizer: Tokenizer) -> dict[str, Any]:
    """A config with the ids that begin and end a text where they are in the new vocabulary."""
    # New pieces may be copies too, of an old piece that the old tokenizer reads them as; they are not that piece.
    new_ids = {old: new for name in ("head", "embedding") for new, old in plan.kept(name).items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [new_ids[id] for id in value if id in new_ids] or None
        return new_ids.get(value)

    adapted = dict(config)
    for key in _IDS:
        if config.get(key) is not None:
            adapted[key] = moved(config[key])
    if tokenizer.bos_id is not None:
        adapted["bos_token_id"] = tokenizer.bos_id
    eos = adapted.get("eos_token_id")
    if tokenizer.eos_id is not None and not (isinstance(eos, list) and tokenizer.eos_id in eos):
        adapted["eos_token_id"] = tokenizer.eos_id
    return adapted
