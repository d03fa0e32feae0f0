"""From a recipe or file to a checked configuration that knows where each of its values came from."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_cpt.config.layers import RECIPES, SET_ORIGIN, Layers, read_layers
from megatron_cpt.config.manifest import sha256_json
from megatron_cpt.config.rules import check_rules
from megatron_cpt.config.schema import LANGUAGE_RULE, RunConfig, TrainConfig
from megatron_cpt.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel, covariant=True)
COMMENT_COLUMN = 56
TYPE_WORDS = {"array": "a list", "string": "text", "integer": "a whole number", "boolean": "true or false"}
PLAIN_TEXT = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+-]*")


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """A checked configuration.

    Attributes:
        config: the values.
        origins: dotted path of each leaf -> "default", "recipe NAME", "file PATH" or "--set".
        hash: SHA-256 of the values' canonical JSON; equal values have equal hashes, whatever their origin.
    """

    config: Config
    origins: Mapping[str, str]
    hash: str

    def dump(self) -> str:
        """The whole configuration as YAML, each value with its origin; loads back to equal values."""
        return "".join(f"{line}\n" for line in _yaml_lines(self.config.model_dump(mode="json"), self.origins))


def load_config(
    source: str | Path, model: type[Config], overrides: Sequence[str] = (), shelf: Path = RECIPES
) -> Resolved[Config]:
    """Load a recipe or YAML file as `model`.

    Types are JSON's, so `"3"` or `true` is no integer; a list stands for a tuple.

    Args:
        source: a recipe's name or a file's path; the file may name another one as `extends`.
        model: `RunConfig`, `TrainConfig`, or the section that files of another shelf hold.
        overrides: `path.to.key=value` each; later ones win.
        shelf: folder of the package that holds the files with names.

    Raises:
        ConfigError: anything unreadable, unknown, out of range or against the rules of `config.rules`,
            one line for each problem.
    """
    return resolve(read_layers(source, overrides, shelf), model)


def load_any_config(source: str | Path, overrides: Sequence[str] = ()) -> Resolved[RunConfig] | Resolved[TrainConfig]:
    """Load a `TrainConfig` or a `RunConfig`, whichever the document is by its keys.

    A training job has `train_steps` at its top, or `train` in its `data`, or a path as its `tokenizer` and no `train`.
    """
    layers = read_layers(source, overrides)
    return resolve(layers, TrainConfig) if _is_job(layers.tree) else resolve(layers, RunConfig)


def _is_job(tree: Mapping[str, Any]) -> bool:
    data = tree.get("data")
    return (
        "train_steps" in tree
        or (isinstance(data, dict) and "train" in data)
        or (isinstance(tree.get("tokenizer"), str) and "train" not in tree)
    )


def resolve(layers: Layers, model: type[Config]) -> Resolved[Config]:
    """Check raw values as `model`; raises ConfigError as `load_config` does."""
    try:
        config = model.model_validate_json(layers.as_json(), strict=True)
    except ValidationError as caught:
        raise ConfigError(_explain(caught, model, layers)) from None
    if isinstance(config, RunConfig | TrainConfig):
        check_rules(config, layers.name)
    values = config.model_dump(mode="json")
    origins = {".".join(path): layers.origin_of(path) for path, _ in _leaves(values, ())}
    return Resolved(config, origins, sha256_json(values))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(place)))
    else:
        yield path, value


def _explain(caught: ValidationError, model: type[BaseModel], layers: Layers) -> str:
    problems: dict[str, str] = {}
    for error in caught.errors(include_url=False):
        path, section = _place(model, error["loc"])
        name = ".".join(path)
        line = _problem(error, path, section, model, layers)
        # Each member of a union reports its own failure: one line says them all.
        if name in problems and problems[name] != line:
            line = f"{problems[name].rpartition(';')[0]}, or {_expected(error)};{line.rpartition(';')[2]}"
        problems[name] = line
    # Of a union, the member that came furthest is the one that was meant.
    problems = {name: line for name, line in problems.items() if not any(o.startswith(f"{name}.") for o in problems)}
    header = f"{layers.name} has {len(problems)} problems:\n  " if len(problems) > 1 else ""
    return header + "\n  ".join(problems.values())


def _problem(
    error: ErrorDetails, path: list[str], section: type[BaseModel], model: type[BaseModel], layers: Layers
) -> str:
    name = ".".join(path) or layers.name
    origin = layers.origin_of(path)
    if error["type"] == "missing":
        return f"{name}: got nothing, expected a value; add it to the file or give --set {name}=VALUE"
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key (from {origin}); {_nearest(path, section, model)}"
    got = json.dumps(error["input"], ensure_ascii=False, default=str)
    got = got if len(got) <= 80 else f"{got[:77]}..."
    fix = "change the --set" if origin == SET_ORIGIN else f"change it in {origin} or give --set {name}=VALUE"
    return f"{name}: got {got}, expected {_expected(error)}; {fix}"


def _expected(error: ErrorDetails) -> str:
    if error["type"] == "model_type":
        return "keys with values"
    if error["type"] == "union_tag_invalid":
        return f"one of {error['ctx']['expected_tags']}"
    if error["type"] == "union_tag_not_found":
        return "a name, or keys with values and `method` among them"
    if error["type"] == "string_pattern_mismatch":  # the only pattern there is
        return LANGUAGE_RULE
    if error["type"] == "value_error":  # a section's own rule
        return str(error["ctx"]["error"])
    text = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    text = TYPE_WORDS.get(text, text)
    return f"a number {text}" if text.startswith(("greater", "less")) else text


def _place(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """The configuration's path of an error, and the section that its last name was looked up in."""
    path: list[str] = []
    holder: type[BaseModel] = model
    section: type[BaseModel] | None = model
    union: list[type[BaseModel]] = []  # the sections that may stand at this place
    is_chosen = False  # the next name is one that the user chose
    is_member = False  # the next name is pydantic's for a member of a union that may be such a mapping
    for part in loc:
        # Below a plain value a name is pydantic's for a member of a union, not a key.
        if isinstance(part, int):
            path.append(str(part))
        elif is_member:
            is_member, is_chosen = False, part.startswith("dict[")
            section = section if is_chosen else None
        elif is_chosen and section is not None:
            path.append(part)
            is_chosen = False
        elif (chosen := next((one for one in union if _is_tag(part, one)), None)) is not None:
            section, union = chosen, []
        elif section is not None and part != section.__name__:
            path.append(part)
            holder = section
            known = section.model_fields.get(part)
            union = list(_sections_in(known.annotation)) if known else []
            section = union[0] if union else None
            is_chosen = known is not None and get_origin(known.annotation) is dict
            is_member = known is not None and any(get_origin(each) is dict for each in get_args(known.annotation))
    return path, holder


def _section_in(annotation: Any) -> type[BaseModel] | None:
    return next(_sections_in(annotation), None)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _is_tag(part: str, section: type[BaseModel]) -> bool:
    """Whether `part` is the name by which a method's section is chosen among others."""
    known = section.model_fields.get("method")
    return known is not None and part in get_args(known.annotation)


def _nearest(path: list[str], section: type[BaseModel], model: type[BaseModel]) -> str:
    """What an unknown key may have meant: a neighbour, else the same name elsewhere, else the choice."""
    prefix = ".".join([*path[:-1], ""])
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    everywhere = list(_key_paths(model, ""))
    near = difflib.get_close_matches(path[-1], [name.rpartition(".")[2] for name in everywhere], n=1, cutoff=0.8)
    if near:
        places = [name for name in everywhere if name.rpartition(".")[2] == near[0]]
        return f"did you mean {' or '.join(places[:3])}?"
    return f"expected one of {', '.join(section.model_fields)}; remove it"


def _key_paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, known in model.model_fields.items():
        yield f"{prefix}{name}"
        section = _section_in(known.annotation)
        if section is not None:
            yield from _key_paths(section, f"{prefix}{name}.")


def _yaml_lines(value: Any, origins: Mapping[str, str], path: tuple[str, ...] = ()) -> Iterator[str]:
    indent = "  " * len(path)
    keys = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in keys:
        here = (*path, str(key))
        head = f"{indent}{key}:" if isinstance(value, dict) else f"{indent}-"
        origin = origins.get(".".join(here))
        if origin is None:
            yield head
            yield from _yaml_lines(inner, origins, here)
        else:
            yield f"{f'{head} {_scalar(inner)}':<{COMMENT_COLUMN}}  # {origin}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        plain = PLAIN_TEXT.fullmatch(value) and value.lower() not in ("true", "false", "null")
        if plain:
            return value
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    return json.dumps(value)
