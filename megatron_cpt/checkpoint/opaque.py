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

from megatron_cpt.checkpoint.stand_ins import NamedPickler, named
from megatron_cpt.errors import CheckpointError

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
        return self._stand_ins.setdefault((module, name), named(module, name))


_PICKLE = types.SimpleNamespace(
    __name__="pickle", Pickler=NamedPickler, Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError
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
