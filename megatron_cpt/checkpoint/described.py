"""What the weights of a Megatron checkpoint are: from our manifest, from Megatron's arguments, or from the user."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_cpt.checkpoint.files import brief
from megatron_cpt.checkpoint.hf_config import CONFIG, parse_hf_config
from megatron_cpt.checkpoint.llama import MAX_SIZE, check_supported
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.config.manifest import MANIFEST, read_json
from megatron_cpt.config.schema import LlamaShape, RopeScaling
from megatron_cpt.errors import CheckpointError

UNKNOWN_VOCAB = "unknown_vocab"


@dataclass(frozen=True)
class Hints:
    """What a checkpoint may not say of itself, from its user.

    Attributes:
        config: a config.json, or the folder of one, that describes the architecture.
        vocab_size: rows of the vocabulary that an id can reach.
        tokenizer_size: ids of its tokenizer: the size of the vocabulary where nothing else says it.
        vocab_known: whether a checkpoint is refused that does not say what of its vocabulary is padding; else all of
            it counts, and `stated` has `UNKNOWN_VOCAB`.
    """

    config: Path | None = None
    vocab_size: int | None = None
    tokenizer_size: int | None = None
    vocab_known: bool = True


@dataclass(frozen=True)
class Described:
    """What is known of a checkpoint before its tensors are looked at."""

    llama: LlamaShape
    vocab_size: int
    stated: Mapping[str, Any] = field(default_factory=dict)


# Megatron's argument -> the values under which a GPT model of it is a Llama; None: it is not set.
_OF_A_LLAMA: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (None, False),
    "rotary_percent": (None, 1.0),
    "rotary_interleaved": (None, False),
    "rotary_seq_len_interpolation_factor": (None, 1),
    **dict.fromkeys(
        (
            "apply_layernorm_1p",
            "layernorm_zero_centered_gamma",
            "apply_residual_connection_post_layernorm",
            "qk_layernorm",
            "qk_l2_norm",
            "multi_latent_attention",
            "attention_output_gate",
            "squared_relu",
            "quick_geglu",
            "is_hybrid_model",
            "use_legacy_models",
        ),
        (None, False),
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "window_size",
            "no_rope_freq",
            "mtp_num_layers",
            "heterogeneous_layers_config_path",
            "experimental_attention_variant",
        ),
        (None,),
    ),
    "softmax_type": (None, "vanilla"),
}

# The arguments without which nothing is known of a Llama.
_SIZES = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings"}


def describe(folder: Path, args: Mapping[str, Any] | None, stored_rows: int, hints: Hints | None) -> Described:
    """What the model of a Megatron checkpoint is.

    Args:
        folder: of the checkpoint; its manifest.json is believed first, if it has one.
        args: Megatron's arguments that were saved with it, if they were.
        stored_rows: rows of its embedding, padding included.
        hints: what the user says of what neither of them does. The context length, by which nothing is computed, may
            be another in a config there than in the arguments.

    Raises:
        CheckpointError: it is no Llama, what is said of it differs, or nothing says what it is or how many of its rows
            are padding.
    """
    hints = hints or Hints()
    if (folder / MANIFEST).exists():
        manifest = read_checkpoint_manifest(folder)
        return Described(check_supported(manifest["shape"], str(folder)), manifest["vocab_size"], manifest)
    step = (args or {}).get("iteration") or 0
    if type(step) is not int or not 0 <= step <= MAX_SIZE:
        raise CheckpointError(
            f"{folder}: got Megatron's argument iteration={brief(step)}, expected an integer of 0 to {MAX_SIZE}"
        )
    stated = {"step": step} if step else {}
    told, told_size = (None, None) if hints.config is None else told_by_config(hints.config)
    vocab_size = (args or {}).get("vocab_size")
    if args and (told is None or {name for name, value in args.items() if value is not None} >= _SIZES):
        llama = llama_of_args(args, str(folder))
        if told is not None:
            llama = llama.model_copy(update={"max_position_embeddings": told.max_position_embeddings})
    elif told is not None:
        refuse_other_models(args or {}, str(folder))
        llama = told
    else:
        raise CheckpointError(
            f"{folder} holds neither {MANIFEST} nor Megatron's arguments, so nothing says what model it is; give the "
            "config.json of the model with --config"
        )
    if vocab_size is None:
        vocab_size = hints.vocab_size or told_size or hints.tokenizer_size
    if vocab_size is None and not hints.vocab_known:
        return Described(llama, stored_rows, {**stated, UNKNOWN_VOCAB: True})
    if type(vocab_size) is not int or not 0 < vocab_size <= stored_rows:
        if type(vocab_size) is int and vocab_size > stored_rows:
            raise CheckpointError(
                f"{folder} stores {stored_rows} rows of vocabulary, fewer than the {brief(vocab_size)} that its "
                "arguments, or what you gave (--vocab-size, --config, --tokenizer), say; a rank's file is missing, or "
                "the number is another model's"
            )
        said = "nothing" if vocab_size is None else brief(vocab_size)
        raise CheckpointError(
            f"{folder} stores {stored_rows} rows of vocabulary and says {said} of how many an id can reach; give the "
            "number with --vocab-size, or the tokenizer with --tokenizer"
        )
    return Described(llama, vocab_size, stated)


def told_by_config(config: Path) -> tuple[LlamaShape, int]:
    """The architecture and the vocabulary of a config that a user gives."""
    return parse_hf_config(*given_config(config))


def given_config(config: Path) -> tuple[Any, str]:
    """The content of a config.json, or of the one in a folder, that a user gives; and its path."""
    path = config / CONFIG if config.is_dir() else config
    return read_json(path, CheckpointError), str(path)


def check_hints(hints: Hints, folder: Path, llama: LlamaShape, vocab_size: int) -> None:
    """Raise CheckpointError where a checkpoint was found to be another model than its user says."""
    if hints.vocab_size not in (None, vocab_size):
        raise CheckpointError(
            f"{folder} itself says a vocabulary of {vocab_size}, not {hints.vocab_size} as --vocab-size; leave the "
            "option out, or give the checkpoint that it is of"
        )
    if (hints.tokenizer_size or 0) > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {hints.tokenizer_size} ids, the vocabulary of {folder} {vocab_size} rows; give the "
            "tokenizer that the model was trained with"
        )
    if hints.config is None:
        return
    told, told_size = told_by_config(hints.config)
    theirs, ours = (shape.model_dump() | {"vocab_size": vocab_size} for shape in (told, llama))
    if hints.vocab_size is None:
        theirs["vocab_size"] = told_size
    different = [f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    if different:
        raise CheckpointError(
            f"{hints.config} is not the config of {folder}: it says {'; '.join(different[:3])}; leave --config out, or "
            "give the one of this model"
        )


def refuse_other_models(args: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where Megatron's arguments, as far as they are there, are not those of a Llama."""
    for name, allowed in {**_OF_A_LLAMA, "position_embedding_type": ("rope",)}.items():
        got = args.get(name, allowed[0])
        if name == "position_embedding_type" and args.get("use_rotary_position_embeddings"):  # Megatron's older word
            got = "rope"
        if got not in allowed:
            raise CheckpointError(
                f"{where}: got Megatron's argument {name}={brief(got)}, expected a Llama's ({allowed[-1]!r})"
            )


def llama_of_args(args: Mapping[str, Any], where: str) -> LlamaShape:
    """The architecture that Megatron's arguments describe; raises CheckpointError where it is no Llama."""
    refuse_other_models(args, where)
    try:
        heads = args["num_attention_heads"]
        groups = args.get("num_query_groups") if args.get("group_query_attention") else None
        scaling = None
        if args.get("use_rope_scaling"):
            scaling = RopeScaling(factor=float(args.get("rope_scaling_factor") or 8.0))
        return check_supported(
            LlamaShape(
                num_layers=args["num_layers"],
                hidden_size=args["hidden_size"],
                ffn_hidden_size=args["ffn_hidden_size"],
                num_attention_heads=heads,
                num_query_groups=groups or heads,
                head_dim=args.get("kv_channels") or args["hidden_size"] // heads,
                norm_epsilon=args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5,
                rope_theta=float(args.get("rotary_base") or 10000),
                rope_scaling=scaling,
                tied_embeddings=not args.get("untie_embeddings_and_output_weights"),
                max_position_embeddings=args["max_position_embeddings"],
            ),
            where,
        )
    except KeyError as caught:
        raise CheckpointError(f"{where}: Megatron's argument {caught.args[0]} is missing; give --config") from None
    except (ValidationError, TypeError, ValueError, ArithmeticError) as caught:
        reason = caught.errors()[0]["msg"] if isinstance(caught, ValidationError) else str(caught)
        raise CheckpointError(
            f"{where}: Megatron's arguments hold an impossible size ({reason}); give --config"
        ) from None


def megatron_flags(llama: LlamaShape, vocab_divisor: int) -> str:
    """The arguments on Megatron-LM's command line under which it builds this model.

    Args:
        llama: the model.
        vocab_divisor: for `--make-vocab-size-divisible-by`, which Megatron multiplies by its tensor-parallel size.
    """
    scaling = llama.rope_scaling
    flags = [
        f"--num-layers {llama.num_layers} --hidden-size {llama.hidden_size} --ffn-hidden-size {llama.ffn_hidden_size}",
        f"--num-attention-heads {llama.num_attention_heads} --kv-channels {llama.head_dim}",
        f"--group-query-attention --num-query-groups {llama.num_query_groups}"
        if llama.num_query_groups != llama.num_attention_heads
        else "",
        f"--max-position-embeddings {llama.max_position_embeddings} --position-embedding-type rope",
        f"--rotary-base {_whole(llama.rope_theta)} --rotary-percent 1.0",
        "" if scaling is None else f"--use-rope-scaling --rope-scaling-factor {scaling.factor:g}",
        f"--normalization RMSNorm --norm-epsilon {llama.norm_epsilon:g} --swiglu --disable-bias-linear",
        "" if llama.tied_embeddings else "--untie-embeddings-and-output-weights",
        f"--make-vocab-size-divisible-by {vocab_divisor}",
    ]
    return " ".join(flag for flag in flags if flag)


def args_of_llama(llama: LlamaShape, vocab_size: int, padded_size: int, divisor: int, dtype: str) -> Namespace:
    """Megatron's arguments that describe a Llama, as `--use-checkpoint-args` reads them."""
    scaling = llama.rope_scaling
    return Namespace(
        num_layers=llama.num_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.ffn_hidden_size,
        num_attention_heads=llama.num_attention_heads,
        group_query_attention=llama.num_query_groups != llama.num_attention_heads,
        num_query_groups=llama.num_query_groups,
        kv_channels=llama.head_dim,
        max_position_embeddings=llama.max_position_embeddings,
        seq_length=llama.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=_whole(llama.rope_theta),
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=8.0 if scaling is None else scaling.factor,
        normalization="RMSNorm",
        norm_epsilon=llama.norm_epsilon,
        layernorm_epsilon=llama.norm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        apply_layernorm_1p=False,
        untie_embeddings_and_output_weights=not llama.tied_embeddings,
        add_position_embedding=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        vocab_size=vocab_size,
        padded_vocab_size=padded_size,
        make_vocab_size_divisible_by=divisor,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        params_dtype=getattr(torch, dtype),
        tokenizer_type="HuggingFaceTokenizer",
        bert_binary_head=False,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def _whole(number: float) -> int | float:
    """An integer where the number is one: Megatron reads the rotary base as an integer."""
    return int(number) if number.is_integer() else number
