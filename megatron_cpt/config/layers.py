"""The raw configuration: recipe, files and `--set` laid over each other, each value with its origin.

YAML is read by the rules of YAML 1.2's core schema, so `1e-4` is a number, `no` is Norwegian and
`12:30` is text; PyYAML's own (1.1) rules would make text, false and 750 of them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SET_ORIGIN = "--set"


class Yaml12Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars, refusing a key that stands twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; raises ConstructorError where a key stands twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' stands twice: keep one", key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass
class Layers:
    """A tree of raw values and, for each leaf's path, where the value came from."""

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[tuple[str, ...], str] = field(default_factory=dict)

    def overlay(self, layer: dict[str, Any], origin: str) -> None:
        """Lay `layer` over the tree: mappings are merged key by key, everything else is replaced."""
        self._merge(self.tree, layer, origin, ())

    def _merge(self, tree: dict[str, Any], layer: dict[str, Any], origin: str, path: tuple[str, ...]) -> None:
        for key, value in layer.items():
            here = (*path, str(key))
            if not isinstance(value, dict):
                tree[str(key)] = value
                self.origins[here] = origin
                continue
            if not isinstance(tree.get(str(key)), dict):
                self._forget(here)
                tree[str(key)] = {}
                if not value:
                    self.origins[here] = origin
            self._merge(tree[str(key)], value, origin, here)

    def _forget(self, path: tuple[str, ...]) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]

    def override(self, assignment: str) -> None:
        """Apply one `--set a.b=value`; a number among the names is a place in a list.

        Raises:
            ConfigError: no `=`, an empty name, a value that is not YAML, or a place outside the list.
        """
        name, equals, text = assignment.partition("=")
        parts = tuple(name.strip().split("."))
        if not equals or not all(parts):
            raise ConfigError(
                f"--set {assignment}: expected path.to.key=value, for example --set train.train_steps=100"
            )
        value = parse_yaml(text, f"--set {assignment}")
        self._assign(parts, value, assignment)

    def _assign(self, parts: tuple[str, ...], value: Any, assignment: str) -> None:
        for depth in range(1, len(parts)):
            parent = _descend(self.tree, parts[:depth])
            if not isinstance(parent, list):
                continue
            place = parts[depth]
            if not place.isdecimal() or int(place) >= len(parent):
                raise ConfigError(
                    f"--set {assignment}: {'.'.join(parts[:depth])} is a list of {len(parent)}, "
                    f"got the place {place!r}; expected a number from 0 to {len(parent) - 1}"
                )
            inner = Layers(self.name, {place: parent[int(place)]})
            inner._assign(parts[depth:], value, assignment)
            parent[int(place)] = inner.tree[place]
            self.origins[parts] = SET_ORIGIN
            return
        layer: dict[str, Any] = {parts[-1]: value}
        for part in reversed(parts[:-1]):
            layer = {part: layer}
        self.overlay(layer, SET_ORIGIN)

    def origin_of(self, path: Sequence[str]) -> str:
        """Where the value at `path` came from: "default", "recipe NAME", "file PATH" or "--set".

        A section has the origin of its first value.
        """
        for length in range(len(path), 0, -1):
            origin = self.origins.get(tuple(path[:length]))
            if origin is not None:
                return origin
        below = (origin for known, origin in self.origins.items() if known[: len(path)] == tuple(path))
        return next(below, "default")

    def as_json(self) -> str:
        """The tree as JSON, for validation by JSON's types; raises ConfigError for a value JSON lacks."""
        try:
            return json.dumps(self.tree)
        except TypeError as caught:
            raise ConfigError(
                f"{self.name}: {caught}; expected text, numbers, true, false, null, lists, keys"
            ) from None


def _descend(tree: Any, parts: tuple[str, ...]) -> Any:
    for part in parts:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def recipe_names(shelf: Path = RECIPES) -> list[str]:
    """Names of the recipes (or of what else lies on the shelf) that come with the package."""
    return sorted(path.stem for path in shelf.glob("*.yaml"))


def parse_yaml(text: str, name: str) -> Any:
    """Read one YAML document; raises ConfigError with `name`, line and column when it is broken."""
    try:
        return yaml.load(text, Loader=Yaml12Loader)
    except yaml.YAMLError as caught:
        mark = getattr(caught, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark and "\n" in text.strip() else ""
        problem = getattr(caught, "problem", None) or caught
        raise ConfigError(f"{name}{place}: not valid YAML: {problem}") from None


def read_layers(source: str | Path, overrides: Sequence[str] = (), shelf: Path = RECIPES) -> Layers:
    """Read a recipe (by name) or a YAML file, what it `extends` first, then lay `overrides` on top.

    Args:
        source: name of a recipe, or path of a file. A recipe's name wins over a file of that name.
        overrides: `path.to.key=value` each, in order; the value is YAML.
        shelf: folder of the package that holds the files with names; what it holds is called as it is ("recipes").

    Raises:
        ConfigError: no such recipe or file, broken YAML, a circle of `extends`, a bad override.
    """
    layers = Layers(str(source))
    _read_chain(layers, str(source), Path(), [], shelf)
    for assignment in overrides:
        layers.override(assignment)
    return layers


def _read_chain(layers: Layers, reference: str, folder: Path, chain: list[Path], shelf: Path) -> None:
    path, origin = _locate(reference, folder, shelf)
    if path.resolve() in chain:
        circle = " -> ".join(str(step) for step in [*chain, path.resolve()])
        raise ConfigError(f"'extends' goes in a circle: {circle}; remove one of them")
    tree = _read_file(path)
    parent = tree.pop("extends", None)
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: 'extends' got {parent!r}, expected one {_noun(shelf)} name or one path")
        _read_chain(layers, parent, path.parent, [*chain, path.resolve()], shelf)
    layers.overlay(tree, origin)


def _noun(shelf: Path) -> str:
    return shelf.name.removesuffix("s")


def _locate(reference: str, folder: Path, shelf: Path) -> tuple[Path, str]:
    names, noun = recipe_names(shelf), _noun(shelf)
    if reference in names:
        return shelf / f"{reference}.yaml", f"{noun} {reference}"
    path = folder / reference
    if path.is_file():
        return path, f"file {path}"
    near = difflib.get_close_matches(reference, names, n=1)
    hint = f"did you mean the {noun} {near[0]!r}?" if near else f"{noun}s are {', '.join(names)}"
    kind = "a folder" if path.is_dir() else f"neither a {noun} nor a file"
    raise ConfigError(f"{path} is {kind}; expected a {noun}'s name or a YAML file: {hint}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as caught:
        raise ConfigError(f"cannot read {path}: {caught.strerror or caught}") from None
    except UnicodeDecodeError as caught:
        raise ConfigError(f"{path} is not UTF-8 (byte {caught.start}): save it as UTF-8") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, expected keys with values")
    return tree
