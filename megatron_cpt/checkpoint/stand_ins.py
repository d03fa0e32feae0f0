"""Inert stand-ins for the classes and functions that a pickle names: nothing of them is imported or run.

A stand-in keeps what the pickle says. Written again, it has the name it stood for, and is made as it was made.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Sequence
from typing import Any

# The class in Python: that in C knows nothing of names that stand for others.
PicklerBase: Any = pickle._Pickler  # type: ignore[attr-defined]


class Named(type):
    """Class of the stand-ins; each stands for the name `stands_for` (module, name)."""

    stands_for: tuple[str, str]

    def __call__(cls, *arguments: Any) -> Any:  # noqa: D102 - the call of any class
        made: Any = cls.__new__(cls, *arguments)  # type: ignore[arg-type, var-annotated]
        made.called = True
        return made


class StandIn(metaclass=Named):
    """What a named class or function made of its arguments, as the pickle says and without making it."""

    __slots__ = ("arguments", "called", "entries", "items", "states")

    def __new__(cls, *arguments: Any) -> StandIn:  # noqa: D102 - as for any class
        made = super().__new__(cls)
        made.arguments, made.states, made.items, made.entries = arguments, (), (), ()
        made.called = False
        return made

    arguments: tuple[Any, ...]
    states: Sequence[Any]
    items: Sequence[Any]  # a list where there are any; an index has hundreds of thousands of stand-ins
    entries: Sequence[tuple[Any, Any]]
    called: bool  # or made by the class's __new__ alone

    def __setstate__(self, state: Any) -> None:
        self.states = (state,)

    def append(self, item: Any) -> None:
        """Keep an item that is added to what it stands for."""
        self.extend((item,))

    def extend(self, items: Any) -> None:
        """Keep items that are added to what it stands for."""
        self.items = self.items or []
        self.items.extend(items)  # type: ignore[attr-defined]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries = self.entries or []
        self.entries.append((key, value))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.states[0] if self.states else None
        maker: tuple[Any, tuple[Any, ...]] = (type(self), self.arguments)
        if not self.called:
            maker = (copyreg.__newobj__, (type(self), *self.arguments))  # type: ignore[attr-defined]
        return *maker, state, iter(self.items) or None, iter(self.entries) or None


def named(module: str, name: str) -> Named:
    """A new stand-in for a class or a function.

    Raises:
        ValueError: a line break in the name; written again, what follows it would be instructions of the pickle.
    """
    if "\n" in module or "\n" in name:
        raise ValueError("it names a class or function with a line break")
    return Named(name, (StandIn,), {"stands_for": (module, name), "__slots__": ()})


class NamedPickler(PicklerBase):  # type: ignore[misc]
    """Writes stand-ins under the names that they stand for."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or a function."""
        if not isinstance(obj, Named):
            super().save_global(obj, name)
            return
        module, written = obj.stands_for
        self.write(pickle.GLOBAL + module.encode() + b"\n" + written.encode() + b"\n")
        self.memoize(obj)
