"""`config.json` of a Llama, read from and written for transformers 4 and 5."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron_cpt.checkpoint.files import brief
from megatron_cpt.checkpoint.llama import MAX_SIZE, check_supported
from megatron_cpt.config.schema import LlamaShape, RopeScaling
from megatron_cpt.errors import CheckpointError

CONFIG = "config.json"


def parse_hf_config(config: Any, where: str) -> tuple[LlamaShape, int]:
    """The architecture and the vocabulary size that a `config.json` states."""
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        got = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(
            f"{where}: got model_type {brief(got)}, expected 'llama'; other architectures are not supported"
        )
    _refuse_variants(config, where)
    try:
        heads = config["num_attention_heads"]
        theta, scaling = _rope(config, where)
        shape = LlamaShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=config.get("tie_word_embeddings") or False,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
        )
        vocab_size = config["vocab_size"]
    except KeyError as caught:
        raise CheckpointError(
            f"{where}: {caught.args[0]} is missing; the file is not a complete Llama config"
        ) from None
    except (ValidationError, TypeError, ArithmeticError) as caught:
        reason = caught.errors()[0]["msg"] if isinstance(caught, ValidationError) else str(caught)
        raise CheckpointError(f"{where}: a size is not what a Llama's config holds ({reason})") from None
    if type(vocab_size) is not int or not 0 < vocab_size <= MAX_SIZE:
        raise CheckpointError(
            f"{where}: got vocab_size {brief(vocab_size)}, expected a positive integer up to {MAX_SIZE}"
        )
    return check_supported(shape, where), vocab_size


def hf_config(
    shape: LlamaShape,
    vocab_size: int,
    dtype: str,
    bos: int | None,
    eos: int | list[int] | None,
) -> dict[str, Any]:
    """The `config.json` of the model, with the rope in both the version 4 and the version 5 form.

    Args:
        shape: the architecture.
        vocab_size: the true vocabulary size (rows of the embedding in the HF folder).
        dtype: "float32", "bfloat16" or "float16".
        bos: id of the token that begins a text, or None.
        eos: id or ids of the tokens that end one, or None.
    """
    scaling = None
    if shape.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **shape.rope_scaling.model_dump()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied_embeddings,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# What an export writes anew; and what is of the files a config came with, or would run code, and is not handed on.
DECIDED_FIELDS = frozenset(
    {"_name_or_path", "transformers_version", "auto_map", "quantization_config"}.union(
        hf_config(
            LlamaShape(
                num_layers=1,
                hidden_size=2,
                ffn_hidden_size=1,
                num_attention_heads=1,
                num_query_groups=1,
                head_dim=2,
            ),
            vocab_size=1,
            dtype="float32",
            bos=None,
            eos=None,
        )
    )
)


def _refuse_variants(config: dict[str, Any], where: str) -> None:
    """Refuse what a plain Llama does not have; ignoring it would compute another model."""
    plain: dict[str, tuple[Any, ...]] = {
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "hidden_act": (None, "silu"),
        "quantization_config": (None,),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1.0),
    }
    for field, allowed in plain.items():
        if config.get(field) not in allowed:
            raise CheckpointError(
                f"{where}: got {field} {brief(config[field])}, expected a plain Llama ({allowed[-1]!r})"
            )


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from either form; both may be there when they agree."""
    old = config.get("rope_scaling") or {}
    new = config.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise CheckpointError(f"{where}: rope_scaling and rope_parameters must be objects or null")
    thetas = {form["rope_theta"] for form in (config, old, new) if form.get("rope_theta") is not None}
    scalings = [
        _scaling(form, where) for form in (old, new) if form.get("rope_type", form.get("type")) or "factor" in form
    ]
    if len(thetas) > 1 or any(scaling != scalings[0] for scaling in scalings):
        raise CheckpointError(
            f"{where}: rope_theta/rope_scaling and rope_parameters contradict each other; keep the one that is right"
        )
    return (thetas.pop() if thetas else 10000.0), (scalings[0] if scalings else None)


def _scaling(form: dict[str, Any], where: str) -> RopeScaling | None:
    kind = form.get("rope_type", form.get("type"))
    if form.get("partial_rotary_factor") not in (None, 1.0):
        raise CheckpointError(
            f"{where}: got partial_rotary_factor {brief(form['partial_rotary_factor'])}, expected 1.0"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{where}: got rope type {brief(kind)}, expected 'default' or 'llama3'; others are not supported"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(**{name: form[name] for name in names})
