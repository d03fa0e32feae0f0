"""`params.json` of Meta's checkpoints: what it says of a Llama, what it leaves out, and one for a new checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.files import json_inside
from megatron_cpt.config.manifest import read_json
from megatron_cpt.config.schema import LlamaShape, RopeScaling
from megatron_cpt.errors import CheckpointError

PARAMS = "params.json"
FIRST_VOCAB_3 = 128000  # a vocabulary of this size or more is one of Llama 3
THETA_2, THETA_3 = 10000.0, 500000.0
FACTORS = (8.0, 32.0)  # of the rotary scaling of Llama 3.1 and 3.2; no file states it
_OF_ITS_CODE = {"max_batch_size", "max_seq_len"}  # of Meta's inference, not of the model
_MAX_MULTIPLE = 4096
_MAX_INTEGER, _MAX_NUMBER = 1 << 31, 1e30


@dataclass(frozen=True)
class Params:
    """The fields of a params.json; absent ones are None, or what Meta's code takes then."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    multiple_of: int
    ffn_dim_multiplier: float | None
    vocab_size: int | None
    rope_theta: float | None
    use_scaled_rope: bool


def read_params(folder: Path) -> Params:
    """The folder's params.json, every field checked.

    Raises:
        CheckpointError: it is missing or broken, or has a field of another architecture.
    """
    path = folder / PARAMS
    said = read_json(json_inside(folder, PARAMS), CheckpointError)
    said = said.get("model", said) if isinstance(said, dict) else said
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} holds {type(said).__name__}, expected an object")
    unknown = sorted(said.keys() - Params.__dataclass_fields__.keys() - _OF_ITS_CODE)
    if unknown:
        raise CheckpointError(
            f"{path}: got the field {unknown[0]!r}, which a plain Llama does not have; models with images, quantised "
            "ones and those with adapters are not supported"
        )
    dim, heads = _integer(path, said, "dim"), _integer(path, said, "n_heads")
    if dim % heads:
        raise CheckpointError(f"{path}: got dim {dim} with {heads} heads, expected a multiple")
    size = said.get("vocab_size")
    return Params(
        dim=dim,
        n_layers=_integer(path, said, "n_layers"),
        n_heads=heads,
        n_kv_heads=_integer(path, said, "n_kv_heads", heads),
        norm_eps=_number(path, said, "norm_eps"),
        multiple_of=_integer(path, said, "multiple_of", 256),
        ffn_dim_multiplier=_number(path, said, "ffn_dim_multiplier") if _has(said, "ffn_dim_multiplier") else None,
        vocab_size=None if size in (None, -1) else _integer(path, said, "vocab_size"),
        rope_theta=_number(path, said, "rope_theta") if _has(said, "rope_theta") else None,
        use_scaled_rope=_flag(path, said, "use_scaled_rope"),
    )


def _has(said: Mapping[str, Any], name: str) -> bool:
    return said.get(name) is not None


def _integer(path: Path, said: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = said[name] if _has(said, name) else default
    if type(value) is not int or not 0 < value < _MAX_INTEGER:
        raise CheckpointError(f"{path}: got {name} {str(value)[:40]}, expected an integer above 0")
    return value


def _number(path: Path, said: Mapping[str, Any], name: str) -> float:
    value = said.get(name)
    if type(value) not in (int, float) or not 0 < value < _MAX_NUMBER:  # type: ignore[operator]
        raise CheckpointError(f"{path}: got {name} {str(value)[:40]}, expected a number above 0")
    return float(value)  # type: ignore[arg-type]


def _flag(path: Path, said: Mapping[str, Any], name: str) -> bool:
    value = said.get(name)
    if value not in (None, False, True):
        raise CheckpointError(f"{path}: got {name} {str(value)[:40]}, expected true or false")
    return bool(value)


def shape_of(params: Params, ffn: int, vocab_size: int, tied: bool) -> tuple[LlamaShape, str]:
    """The architecture, with what no file states as the release has it that this looks like; and what was assumed."""
    theta = THETA_2 if params.rope_theta is None else params.rope_theta
    scaling = None
    if params.use_scaled_rope:
        release, length = ("Llama 3.2" if tied else "Llama 3.1"), 131072
        scaling = RopeScaling(factor=FACTORS[tied])
    elif vocab_size >= FIRST_VOCAB_3 or theta == THETA_3:
        release, length = "Llama 3", 8192
    elif theta > THETA_2:
        release, length = "Code Llama", 16384
    elif _is_first(params):
        release, length = "Llama 1", 2048
    else:
        release, length = "Llama 2", 4096
    factor = "" if scaling is None else f" and rope scaling factor {scaling.factor:g}"
    assumed = f"max_position_embeddings {length}{factor}, as of {release}; a config.json of the model would say it"
    shape = LlamaShape(
        num_layers=params.n_layers,
        hidden_size=params.dim,
        ffn_hidden_size=ffn,
        num_attention_heads=params.n_heads,
        num_query_groups=params.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        norm_epsilon=params.norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=tied,
        max_position_embeddings=length,
    )
    return shape, assumed


def _is_first(params: Params) -> bool:
    """Whether the sizes are of Llama 1: 30B and 65B by themselves, 7B and 13B by their epsilon."""
    alone = params.dim == 6656 or (params.dim, params.n_layers) == (8192, 80)
    small = params.dim in (4096, 5120) and params.norm_eps == 1e-6
    return params.n_kv_heads == params.n_heads and (alone or small)


def check_agrees(params: Params, ours: LlamaShape, told: LlamaShape, where: str) -> None:
    """Raise CheckpointError unless an architecture told elsewhere is that of params.json, where both speak."""
    compared = {
        "num_hidden_layers": (ours.num_layers, told.num_layers),
        "hidden_size": (ours.hidden_size, told.hidden_size),
        "intermediate_size": (ours.ffn_hidden_size, told.ffn_hidden_size),
        "num_attention_heads": (ours.num_attention_heads, told.num_attention_heads),
        "num_key_value_heads": (ours.num_query_groups, told.num_query_groups),
        "head_dim": (ours.head_dim, told.head_dim),
        "rms_norm_eps": (ours.norm_epsilon, told.norm_epsilon),
        "a scaled rope": (ours.rope_scaling is not None, told.rope_scaling is not None),
    }
    if params.rope_theta is not None:
        compared["rope_theta"] = ours.rope_theta, told.rope_theta
    for name, (mine, theirs) in compared.items():
        if mine != theirs:
            raise CheckpointError(
                f"{where}: it says {name} {theirs}, {PARAMS} and the weights say {mine}; the two are of two models"
            )


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Rows of the gate, by the formula of Meta's code."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def ffn_fields(dim: int, ffn: int) -> dict[str, int | float]:
    """`multiple_of` and, where it takes one, `ffn_dim_multiplier`, from which Meta's code computes this size."""
    if ffn_size(dim, 256, None) == ffn:
        return {"multiple_of": 256}
    multiple = min(ffn & -ffn, _MAX_MULTIPLE)
    plain = ffn_size(dim, 1, None)
    for digits in range(1, 18):  # the shortest factor that does
        for wanted in (ffn, ffn - multiple / 2, ffn + 0.5):
            factor = round(wanted / plain, digits)
            if ffn_size(dim, multiple, factor) == ffn and factor > 0:
                return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    raise CheckpointError(f"no ffn_dim_multiplier of {PARAMS} leads to an FFN of {ffn} for a width of {dim}; give hf")


def embedding_split_by_rows(llama: LlamaShape, vocab_size: int) -> bool:
    """Whether the embedding is cut as by Meta's code for Llama 3, by rows; that for 1 and 2 cuts columns."""
    return (
        vocab_size >= FIRST_VOCAB_3
        or llama.rope_theta != THETA_2
        or llama.rope_scaling is not None
        or llama.tied_embeddings
    )


def check_statable(llama: LlamaShape, where: str) -> None:
    """Raise CheckpointError where a params.json cannot say what the model is."""
    if llama.head_dim * llama.num_attention_heads != llama.hidden_size:
        raise CheckpointError(
            f"{where}: got head_dim {llama.head_dim} with {llama.num_attention_heads} heads and hidden_size "
            f"{llama.hidden_size}; {PARAMS} can only say heads that add up to the width, choose another format"
        )
    if llama.rope_scaling is not None and llama.rope_scaling not in [RopeScaling(factor=factor) for factor in FACTORS]:
        raise CheckpointError(
            f"{where}: got {llama.rope_scaling.model_dump()}; {PARAMS} only says that the rope is scaled, and readers "
            "take factor 8 or 32 with 1, 4 and 8192, choose another format"
        )


def params_of(llama: LlamaShape, vocab_size: int) -> dict[str, Any]:
    """Content of a params.json; for a model like Llama 1 or 2 only fields that Meta's code for those knows."""
    third = embedding_split_by_rows(llama, vocab_size)
    params: dict[str, Any] = {
        "dim": llama.hidden_size,
        "n_layers": llama.num_layers,
        "n_heads": llama.num_attention_heads,
    }
    if third or llama.num_query_groups != llama.num_attention_heads:
        params["n_kv_heads"] = llama.num_query_groups
    params |= {"vocab_size": vocab_size, **ffn_fields(llama.hidden_size, llama.ffn_hidden_size)}
    params["norm_eps"] = llama.norm_epsilon
    if third:
        params["rope_theta"] = llama.rope_theta
    if llama.rope_scaling is not None:
        params["use_scaled_rope"] = True
    return params
