"""The one reader of pickles from strangers: nothing that they name is imported or run, and no byte of them costs much.

Each class or function that a pickle names, other than plain containers, becomes an inert stand-in that keeps what the
pickle says. A subclass says which names it knows, and what is made of a call of them.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_cpt.checkpoint.stand_ins import Named, StandIn, named

# The class in Python: that in C keeps its memo in a table, which a few bytes can make gigabytes large.
_UnpicklerBase: Any = pickle._Unpickler  # type: ignore[attr-defined]

_NAMES = 10_000  # different names in a pickle; each takes about 1 KiB in memory
_KEY_PARTS = 100  # elements of a tuple that is a key, with those of the tuples in it
_DIMENSIONS, LIMIT = 64, 2**63
MAX_DIMENSIONS = 8  # of a tensor that may be a Llama's
# What a pickle may cost in memory, in bytes, beside texts and numbers: for each of its own bytes, and in any case.
_COST_PER_BYTE, _COST_FREE = 40, 1 << 20  # those of Megatron cost up to 21
_ELEMENT = 8
# Elements of its value when each container is counted as often as it is referred to: who walks through it is done.
_SPREAD_PER_BYTE, _SPREAD_FREE = 16, 1 << 16

SIZE, ENCODE = named("torch", "Size"), named("_codecs", "encode")  # the latter is how protocol 2 writes bytes
_SET, _FROZENSET, _BYTES, _BYTEARRAY, _COMPLEX = (
    named("__builtin__", name) for name in ("set", "frozenset", "bytes", "bytearray", "complex")
)
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
PLAIN_NAMES: Mapping[tuple[str, str], Any] = {
    **{kind.stands_for: kind for kind in (SIZE, ENCODE)},
    **{
        (module, kind.stands_for[1]): kind
        for kind in (_SET, _FROZENSET, _BYTES, _BYTEARRAY, _COMPLEX)
        for module in ("__builtin__", "builtins")
    },
    **{("torch", name): dtype for name, dtype in DTYPES.items()},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
}
_CONTAINERS = (collections.OrderedDict, argparse.Namespace)
_COPIED = (str, bytes, tuple, list)  # what containers and bytes are made of
_KEYS = (str, int, float, bool, bytes, type(None), torch.dtype, StandIn, Named)


def _key_parts(key: Any) -> int:
    """Refuse a key whose hash costs more than it has bytes, as a few nested tuples do; the number of its parts."""
    waiting, parts = [key], 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if isinstance(part, tuple) and len(part) + parts <= _KEY_PARTS:
            waiting.extend(part)
        elif not isinstance(part, _KEYS) or parts > _KEY_PARTS:
            raise ValueError(
                f"a key or element of a set is {type(part).__name__}, expected text, a number or a short tuple"
            )
        elif type(part) is int and not -LIMIT <= part < 2 * LIMIT:
            raise ValueError(f"a key or element of a set is a number of {part.bit_length()} bits, expected 64 at most")
    return parts


def numbers(values: Any, what: str, count: int = _DIMENSIONS) -> tuple[int, ...]:
    """A tuple of at most `count` integers of 0 to 2^63; raises ValueError, with `what` they are, for anything else."""
    if not isinstance(values, tuple) or len(values) > count:
        raise ValueError(f"{what} is no tuple of at most {count} numbers")
    for value in values:
        if type(value) is not int or not 0 <= value < LIMIT:
            raise ValueError(f"{what} holds something else than integers of 0 or more, below 2^63")
    return tuple(values)


def _encoded(text: Any, encoding: Any) -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding in ("latin1", "latin-1") else NotImplemented


def _bytearray(content: Any = b"", encoding: Any = None) -> Any:
    content = _encoded(content, encoding) if isinstance(content, str) else content
    return bytearray(content) if isinstance(content, bytes) else NotImplemented


# Function or class -> what makes the value from the arguments; a stand-in where it is NotImplemented.
PLAIN_MAKERS: Mapping[Any, Callable[..., Any]] = {
    SIZE: lambda sizes: torch.Size(numbers(sizes, "a tensor's size")),
    ENCODE: _encoded,
    _BYTES: lambda *given: NotImplemented if given else b"",
    _BYTEARRAY: _bytearray,
    _COMPLEX: lambda real, imaginary: complex(float(real), float(imaginary)),
    collections.OrderedDict: lambda: collections.OrderedDict(),
    argparse.Namespace: lambda: argparse.Namespace(),
}


class Unpickler(_UnpicklerBase):  # type: ignore[misc]
    """Reads a pickle.

    Args:
        data: the pickle.
    """

    names = PLAIN_NAMES
    makers = PLAIN_MAKERS

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._size = len(data)
        self._named: dict[tuple[str, str], Named] = {}
        # A pickle can come back to a value that it has built as often as it likes, and build much of one byte.
        self._cost_left = _COST_PER_BYTE * len(data) + _COST_FREE

    def load(self) -> Any:
        """The value; a walk through it takes no more steps than its pickle has bytes, but for a factor."""
        value = super().load()
        _check_spread(value, _SPREAD_PER_BYTE * self._size + _SPREAD_FREE)
        return value

    def find_class(self, module: str, name: str) -> Any:
        """The dtype, container or stand-in for a name."""
        known = self.names.get((module, name)) or self._named.get((module, name))
        if known is None:
            if len(self._named) >= _NAMES:
                raise ValueError(f"it names more than {_NAMES} classes and functions")
            known = self._named[module, name] = named(module, name)
        return known

    def persistent_load(self, pid: Any) -> Any:
        """Refuses what lies outside of the pickle."""
        raise ValueError("it refers to something outside of it")

    def pop_mark(self) -> Any:
        """The elements since the last mark, which is gone then."""
        self._cost_left += _COSTS["MARK"]
        return super().pop_mark()

    def _refuse(self) -> None:
        raise ValueError("its pickle has an instruction that torch.save never writes")

    def _pay(self, cost: int) -> None:
        self._cost_left -= cost
        if self._cost_left < 0:
            raise ValueError("its pickle builds far more than it has bytes")

    def _check_key(self, key: Any) -> None:
        if type(key) is not str:
            self._pay(_ELEMENT * _key_parts(key))

    def _members(self, values: Any) -> Any:
        if type(values) is not list:
            raise ValueError(f"a set is made of {type(values).__name__}, expected a list")
        for value in values:
            self._check_key(value)
        return values

    def _load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if type(arguments) is not tuple or not isinstance(function, Named) and function not in _CONTAINERS:
            raise ValueError(f"its pickle calls {type(function).__name__}, which is no class or function")
        self._pay(_ELEMENT * len(arguments))
        made: Any = NotImplemented
        if function in (_SET, _FROZENSET) and len(arguments) == 1:
            made = (set if function is _SET else frozenset)(self._members(arguments[0]))
        elif function in self.makers:
            if arguments and isinstance(arguments[0], _COPIED):
                self._pay(_ELEMENT * len(arguments[0]))
            made = self.makers[function](*arguments)
        self.stack[-1] = function(*arguments) if made is NotImplemented else made

    def _load_newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack[-1]
        if type(arguments) is not tuple or not isinstance(cls, Named) and (cls not in _CONTAINERS or arguments):
            raise ValueError(f"its pickle makes an object of {type(cls).__name__}, which is no class")
        self._pay(_ELEMENT * len(arguments))
        self.stack[-1] = cls.__new__(cls, *arguments)

    def _load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, StandIn):
            made.__setstate__(state)
        elif type(state) is dict and _may_have(made, state):
            self._pay(_ELEMENT * len(state))
            vars(made).update(state)
        else:
            raise ValueError(f"its pickle gives {type(made).__name__} a state of {type(state).__name__}")

    def _put(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, StandIn)):
            raise ValueError(f"its pickle puts entries into {type(target).__name__}, expected a dict")
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            self._check_key(key)
            target[key] = value

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _load_setitems(self) -> None:
        self._put(self.pop_mark())

    def _load_appends(self) -> None:
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, (list, StandIn)):
            raise ValueError(f"its pickle appends to {type(target).__name__}, expected a list")
        target.extend(items)

    def _load_append(self) -> None:
        item = self.stack.pop()
        if not isinstance(self.stack[-1], (list, StandIn)):
            raise ValueError(f"its pickle appends to {type(self.stack[-1]).__name__}, expected a list")
        self.stack[-1].append(item)

    def _load_additems(self) -> None:
        members = self._members(self.pop_mark())
        if type(self.stack[-1]) is not set:
            raise ValueError(f"its pickle adds to {type(self.stack[-1]).__name__}, expected a set")
        self.stack[-1].update(members)

    def _load_frozenset(self) -> None:
        members = frozenset(self._members(self.pop_mark()))
        self.append(members)

    dispatch: dict[int, Any] = dict.fromkeys(range(256), _refuse)
    # Protocols 2 to 4, as picklers write them; the text forms of older ones, extensions and buffers are refused.
    dispatch.update(
        (getattr(pickle, name)[0], _UnpicklerBase.dispatch[getattr(pickle, name)[0]])
        for name in "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 "
        "BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
        "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT EMPTY_SET GLOBAL STACK_GLOBAL BINPERSID BINGET "
        "LONG_BINGET BINPUT LONG_BINPUT MEMOIZE".split()
    )
    dispatch.update(
        {
            pickle.REDUCE[0]: _load_reduce,
            pickle.NEWOBJ[0]: _load_newobj,
            pickle.BUILD[0]: _load_build,
            pickle.SETITEM[0]: _load_setitem,
            pickle.SETITEMS[0]: _load_setitems,
            pickle.APPEND[0]: _load_append,
            pickle.APPENDS[0]: _load_appends,
            pickle.ADDITEMS[0]: _load_additems,
            pickle.FROZENSET[0]: _load_frozenset,
        }
    )


# Instruction -> bytes of memory that it leaves behind, as measured; they have one to five bytes each.
_COSTS = {
    **dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "MARK"), 72),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), 85),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET", "EMPTY_DICT"), 224),
    **dict.fromkeys(("NEWOBJ", "REDUCE"), 128),
}


def _paid(load: Callable[[Unpickler], None], cost: int) -> Callable[[Unpickler], None]:
    def paid(unpickler: Unpickler) -> None:
        unpickler._pay(cost)
        load(unpickler)

    return paid


Unpickler.dispatch.update(
    (code, _paid(Unpickler.dispatch[code], cost))
    for code, cost in ((getattr(pickle, name)[0], cost) for name, cost in _COSTS.items())
)


def _may_have(made: Any, state: Mapping[Any, Any]) -> bool:
    """Whether a container may be given attributes: a module's state dict has its metadata, a Namespace any."""
    if type(made) is collections.OrderedDict:
        return state.keys() <= {"_metadata"}
    return type(made) is argparse.Namespace and all(type(name) is str for name in state)


def _check_spread(value: Any, limit: int) -> None:
    """Refuse a value that is far larger without sharing, as a list of twice the same list of twice the same is."""
    sizes: dict[int, int] = {}
    waiting: list[tuple[Any, bool]] = [(value, False)]
    while waiting:
        part, seen = waiting.pop()
        if seen:
            sizes[id(part)] = 1 + sum(sizes.get(id(inner), 1) for inner in _inside(part))
            if sizes[id(part)] > limit:
                raise ValueError("its value has the same parts again and again, far more than it has bytes")
        elif id(part) not in sizes:
            sizes[id(part)] = 1 if isinstance(part, StandIn) else limit  # for what refers back to it
            waiting.append((part, True))
            waiting.extend((inner, False) for inner in _inside(part) if isinstance(inner, _WALKED))


_WALKED = (list, tuple, dict, argparse.Namespace, StandIn)


def _inside(value: Any) -> list[Any]:
    """What a walk through a value meets next."""
    if isinstance(value, dict):
        return [*value.values(), *vars(value).values()] if hasattr(value, "__dict__") else [*value.values()]
    if isinstance(value, (list, tuple)):
        return [*value]
    if isinstance(value, StandIn):
        entries = [part for entry in value.entries for part in entry]
        return [*value.arguments, *value.states, *value.items, *entries]
    return [*vars(value).values()] if isinstance(value, argparse.Namespace) else []
