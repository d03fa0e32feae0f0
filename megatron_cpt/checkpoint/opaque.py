"""torch.save files whose objects are carried over without their classes: nothing of them is imported or run.

A training framework's checkpoint names classes of its own beside the tensors. Each class or function that a file
names, other than those that make tensors and plain containers, becomes an inert stand-in that keeps what the pickle
says; saved again, it is written as the name it stood for. So a file is opened on a machine without that framework,
and cannot run anything.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import types
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.errors import CheckpointError

# The classes in Python: those in C know nothing of names that stand for others.
_PicklerBase: Any = pickle._Pickler  # type: ignore[attr-defined]
_UnpicklerBase: Any = pickle._Unpickler  # type: ignore[attr-defined]

_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
}
_CONTAINERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
}


class _Named(type):
    """Class of the stand-ins; each stands for the name `stands_for`."""

    stands_for: tuple[str, str]


class _StandIn(metaclass=_Named):
    """What a named class or function made of its arguments, as the pickle says and without making it."""

    def __new__(cls, *arguments: Any) -> _StandIn:
        made = super().__new__(cls)
        made.arguments, made.states, made.items, made.entries = arguments, [], [], []
        return made

    arguments: tuple[Any, ...]
    states: list[Any]
    items: list[Any]
    entries: list[tuple[Any, Any]]

    def __setstate__(self, state: Any) -> None:
        self.states = [state]

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries.append((key, value))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.states[0] if self.states else None
        return type(self), self.arguments, state, iter(self.items) or None, iter(self.entries) or None


class _Unpickler(_UnpicklerBase):  # type: ignore[misc]
    dispatch: dict[int, Any] = dict(_UnpicklerBase.dispatch)

    def load_build(self) -> None:
        """Give an object its state; a class or a function has none to be given."""
        if isinstance(self.stack[-2], type | types.FunctionType):
            raise pickle.UnpicklingError(f"it would change {self.stack[-2]!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._stand_ins: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _TENSORS or is_dtype:
            return super().find_class(module, name)
        return self._stand_ins.setdefault((module, name), _Named(name, (_StandIn,), {"stands_for": (module, name)}))


class _Pickler(_PicklerBase):  # type: ignore[misc]
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not isinstance(obj, _Named):
            super().save_global(obj, name)
            return
        module, written = obj.stands_for
        self.write(pickle.GLOBAL + module.encode() + b"\n" + written.encode() + b"\n")
        self.memoize(obj)


_PICKLE = types.SimpleNamespace(
    __name__="pickle", Pickler=_Pickler, Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError
)


def load_opaque(path: Path) -> dict[str, Any]:
    """The dict in a torch.save archive, its tensors mapped from the file.

    Raises:
        CheckpointError: it is missing, damaged, in torch's form from before 1.6, or holds something else than a dict.
    """
    try:
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_PICKLE)
    except Exception as caught:  # a damaged archive can fail in any way
        reason = str(caught).splitlines()[0] if str(caught) else repr(caught)
        raise CheckpointError(
            f"{path} cannot be read ({reason}); it is damaged or from torch before 1.6: copy it or save it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a checkpoint's dict; it is another file")
    return value


def save_opaque(value: dict[str, Any], path: Path) -> None:
    """Write what `load_opaque` gave, or a changed one; names are written as they were read."""
    torch.save(value, path, pickle_module=_PICKLE)
