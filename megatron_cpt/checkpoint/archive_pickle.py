"""The pickle inside a torch.save archive: read without running or importing anything, and written the same way.

Each class or function that it names, other than plain containers, becomes an inert stand-in that keeps what the
pickle says; written again, it has the name it stood for. A tensor becomes an `Array`: where it lies, no data.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.checkpoint.reader import num_bytes
from megatron_cpt.checkpoint.stand_ins import Named, NamedPickler, PicklerBase, StandIn, named

# The class in Python: that in C keeps its memo in a table, which a few bytes can make gigabytes large.
_UnpicklerBase: Any = pickle._Unpickler  # type: ignore[attr-defined]

_NAMES = 10_000  # different names in a pickle; each takes about 1 KiB in memory
_KEY_PARTS = 100  # elements of a tuple that is a key, with those of the tuples in it
_DIMENSIONS, _LIMIT = 64, 2**63


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor in an archive: its place; nothing of it is read.

    Args:
        offset: byte of the file where its first element lies, or -1 for one that is to be written.
        shape: its size in each dimension.
        strides: elements from one index to the next, for each dimension.
        dtype: its elements' type.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that tensors lie in: a record of the archive, or one that is to be written (offset -1)."""

    offset: int
    size: int
    kind: Any  # the stand-in for the name of torch's storage class
    key: str


_KINDS = {
    named("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }.items()
}
_KIND_OF = {dtype: kind for kind, dtype in _KINDS.items()}
_UNTYPED = named("torch.storage", "UntypedStorage")
_KINDS[_UNTYPED] = torch.uint8
# Quantised: their tensors stay stand-ins, whose storages are looked at no further.
_QUANTISED = {named("torch", f"{name}Storage") for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")}
_UNTYPED_DTYPES = {  # those without a storage class: `_rebuild_tensor_v3` names the dtype
    getattr(torch, name)
    for name in "uint16 uint32 uint64 complex32 float8_e5m2 float8_e4m3fn float8_e5m2fnuz float8_e4m3fnuz "
    "float8_e8m0fnu".split()
    if hasattr(torch, name)
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_TENSOR_V2, _TENSOR_V3 = (named("torch._utils", f"_rebuild_tensor_v{version}") for version in (2, 3))
_PARAMETER = named("torch._utils", "_rebuild_parameter")
_FROM_TYPE, _TENSOR = named("torch._tensor", "_rebuild_from_type_v2"), named("torch", "Tensor")
_SIZE, _ENCODE = named("torch", "Size"), named("_codecs", "encode")  # the latter is how protocol 2 writes bytes
_TORCHS = (_TENSOR_V2, _TENSOR_V3, _PARAMETER, _FROM_TYPE, _TENSOR, _SIZE, _ENCODE)
_SET, _FROZENSET, _BYTES, _BYTEARRAY, _COMPLEX = (
    named("__builtin__", name) for name in ("set", "frozenset", "bytes", "bytearray", "complex")
)
_KNOWN: dict[tuple[str, str], Any] = {
    **{kind.stands_for: kind for kind in (*_KINDS, *_QUANTISED, *_TORCHS)},
    **{
        (module, kind.stands_for[1]): kind
        for kind in (_SET, _FROZENSET, _BYTES, _BYTEARRAY, _COMPLEX)
        for module in ("__builtin__", "builtins")
    },
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
}
_CONTAINERS = (collections.OrderedDict, argparse.Namespace)
_COPIED = (str, bytes, tuple, list)  # what containers and bytes are made of
_KEYS = (str, int, float, bool, bytes, type(None), torch.dtype, StandIn, Named)


def _check_key(key: Any) -> None:
    """Refuse a key whose hash costs more than it has bytes: a few nested tuples hash for years."""
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
        elif type(part) is int and not -_LIMIT <= part < 2 * _LIMIT:
            raise ValueError(f"a key or element of a set is a number of {part.bit_length()} bits, expected 64 at most")


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _DIMENSIONS:
        raise ValueError(f"a tensor's {what} is no tuple of at most {_DIMENSIONS} numbers")
    for value in values:
        if type(value) is not int or not 0 <= value < _LIMIT:
            raise ValueError(f"a tensor's {what} holds something else than integers of 0 to 2^63")
    return tuple(values)


def _array(storage: Any, first: Any, shape: Any, strides: Any, dtype: torch.dtype) -> Array:
    """The array of a tensor, after it is proven to lie in its storage."""
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor lies in {type(storage).__name__}, expected a storage")
    (first,) = _numbers((first,), "storage offset")
    shape, strides = _numbers(shape, "shape"), _numbers(strides, "stride")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if 0 in shape:  # no element, and torch keeps whatever offset a view of nothing had
        return Array(storage.offset, shape, strides, dtype)
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if (last + 1) * dtype.itemsize > storage.size:
        raise ValueError(
            f"a tensor of shape {shape} and strides {strides} from element {first} leaves its storage data/"
            f"{storage.key} of {storage.size} bytes"
        )
    return Array(storage.offset + first * dtype.itemsize, shape, strides, dtype)


def _tensor_v2(
    storage: Any, first: Any, shape: Any, strides: Any, _gradient: Any, _hooks: Any, view: Any = None
) -> Any:
    # A view flag says that the bytes are those of the conjugate or the negative.
    if view or (isinstance(storage, Storage) and storage.kind in _QUANTISED):
        return NotImplemented
    return _array(storage, first, shape, strides, _KINDS[storage.kind] if isinstance(storage, Storage) else torch.uint8)


def _tensor_v3(
    storage: Any, first: Any, shape: Any, strides: Any, _gradient: Any, _hooks: Any, dtype: Any, view: Any = None
) -> Any:
    if view or dtype not in (*_UNTYPED_DTYPES, *_KIND_OF):
        return NotImplemented
    return _array(storage, first, shape, strides, dtype)


def _of_type(function: Any, kind: Any, arguments: Any, _attributes: Any) -> Any:
    """A plain tensor with attributes in Python, as Megatron's masters have; these are left out."""
    plain = kind is _TENSOR and function in (_TENSOR_V2, _TENSOR_V3) and type(arguments) is tuple
    return _MAKERS[function](*arguments) if plain and len(arguments) < 10 else NotImplemented


def _encoded(text: Any, encoding: Any) -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding in ("latin1", "latin-1") else NotImplemented


def _bytearray(content: Any = b"", encoding: Any = None) -> Any:
    content = _encoded(content, encoding) if isinstance(content, str) else content
    return bytearray(content) if isinstance(content, bytes) else NotImplemented


def _members(values: Any) -> Any:
    if type(values) is not list:
        raise ValueError(f"a set is made of {type(values).__name__}, expected a list")
    for value in values:
        _check_key(value)
    return values


# Function or class -> what makes the value from the arguments; a stand-in where it is NotImplemented.
_MAKERS: dict[Any, Callable[..., Any]] = {
    _TENSOR_V2: _tensor_v2,
    _TENSOR_V3: _tensor_v3,
    _FROM_TYPE: _of_type,
    _PARAMETER: lambda data, _gradient, _hooks: data if isinstance(data, Array) else NotImplemented,
    _SIZE: lambda sizes: torch.Size(_numbers(sizes, "size")),
    _ENCODE: _encoded,
    _SET: lambda values: set(_members(values)),
    _FROZENSET: lambda values: frozenset(_members(values)),
    _BYTES: lambda *given: NotImplemented if given else b"",
    _BYTEARRAY: _bytearray,
    _COMPLEX: lambda real, imaginary: complex(float(real), float(imaginary)),
    collections.OrderedDict: lambda: collections.OrderedDict(),
    argparse.Namespace: lambda: argparse.Namespace(),
}


class Unpickler(_UnpicklerBase):  # type: ignore[misc]
    """Reads the pickle of an archive.

    Args:
        data: the pickle.
        find: from the key of a storage, the byte of the file where it begins and its size in bytes.
    """

    def __init__(self, data: bytes, find: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._find = find
        self._named: dict[tuple[str, str], Named] = {}
        # Elements that may be copied: a pickle can come back to a value that it has built as often as it likes.
        self._copies_left = 4 * len(data) + 4096

    def _refuse(self) -> None:
        raise ValueError("its pickle has an instruction that torch.save never writes")

    def find_class(self, module: str, name: str) -> Any:
        """The dtype, container or stand-in for a name."""
        known = _KNOWN.get((module, name)) or self._named.get((module, name))
        if known is None:
            if len(self._named) >= _NAMES:
                raise ValueError(f"it names more than {_NAMES} classes and functions")
            known = self._named[module, name] = named(module, name)
        return known

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a tensor names, after its record is proven to have its size."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("it refers to something else than a storage")
        _, kind, key, _location, count = pid
        if type(key) is not str or type(count) is not int or not 0 <= count < _LIMIT:
            raise ValueError("a storage has no key, or a size that is no integer of 0 to 2^63")
        if not isinstance(kind, Named) or kind not in _KINDS and kind not in _QUANTISED:
            told = ".".join(kind.stands_for) if isinstance(kind, Named) else type(kind).__name__
            raise ValueError(f"storage data/{key} is of {told}, which is none of torch's storage types")
        offset, size = self._find(key)
        if kind in _KINDS and count * _KINDS[kind].itemsize != size:
            raise ValueError(
                f"storage data/{key} should have {count} elements of {_KINDS[kind]}, and its record has {size} bytes"
            )
        return Storage(offset, size, kind, key)

    def _copy(self, count: int) -> None:
        self._copies_left -= count
        if self._copies_left < 0:
            raise ValueError("its pickle builds far more than it has bytes")

    def _load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if type(arguments) is not tuple or not isinstance(function, Named) and function not in _CONTAINERS:
            raise ValueError(f"its pickle calls {type(function).__name__}, which is no class or function")
        self._copy(len(arguments))
        made = NotImplemented
        if function in _MAKERS:
            if arguments and isinstance(arguments[0], _COPIED):
                self._copy(len(arguments[0]))
            made = _MAKERS[function](*arguments)
        self.stack[-1] = function(*arguments) if made is NotImplemented else made

    def _load_newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack[-1]
        if type(arguments) is not tuple or not isinstance(cls, Named) and (cls not in _CONTAINERS or arguments):
            raise ValueError(f"its pickle makes an object of {type(cls).__name__}, which is no class")
        self._copy(len(arguments))
        self.stack[-1] = cls.__new__(cls, *arguments)

    def _load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, StandIn):
            made.__setstate__(state)
        elif type(made) in _CONTAINERS and type(state) is dict and all(type(name) is str for name in state):
            self._copy(len(state))
            vars(made).update(state)
        else:
            raise ValueError(f"its pickle gives {type(made).__name__} a state of {type(state).__name__}")

    def _put(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, (dict, StandIn)):
            raise ValueError(f"its pickle puts entries into {type(target).__name__}, expected a dict")
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            if type(key) is not str:
                _check_key(key)
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
        members = _members(self.pop_mark())
        if type(self.stack[-1]) is not set:
            raise ValueError(f"its pickle adds to {type(self.stack[-1]).__name__}, expected a set")
        self.stack[-1].update(members)

    def _load_frozenset(self) -> None:
        members = frozenset(_members(self.pop_mark()))
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


class _ArchivePickler(NamedPickler):
    dispatch: dict[type, Any] = dict(PicklerBase.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.arrays: list[Array] = []

    def _save_array(self, array: Array) -> None:
        """Write what torch.save writes of a dense tensor in a storage of its own."""
        kind = _KIND_OF.get(array.dtype)
        if kind is None and array.dtype not in _UNTYPED_DTYPES:
            raise ValueError(f"a tensor of {array.dtype} cannot be written into an archive")
        storage = Storage(-1, num_bytes(array.shape, array.dtype), kind or _UNTYPED, str(len(self.arrays)))
        self.arrays.append(array)
        last = () if kind else (array.dtype,)
        told = (storage, 0, array.shape, dense_strides(array.shape), False, collections.OrderedDict(), *last)
        self.save_reduce(_TENSOR_V2 if kind else _TENSOR_V3, told, obj=array)

    def _save_storage(self, storage: Storage) -> None:
        if storage.offset >= 0:
            raise ValueError("a storage outside a plain tensor (a quantised one's, say) cannot be written")
        count = storage.size // _KINDS[storage.kind].itemsize
        self.save_pers(("storage", storage.kind, storage.key, "cpu", count))

    def _save_tensor(self, tensor: torch.Tensor) -> None:
        raise TypeError(f"a tensor of shape {tuple(tensor.shape)} in a value to lay out, expected an Array")

    dispatch.update({Array: _save_array, Storage: _save_storage})
    dispatch.update({torch.Tensor: _save_tensor, torch.nn.Parameter: _save_tensor})


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next, for each dimension of a tensor in row-major order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def pickled(value: Any) -> tuple[bytes, list[Array]]:
    """The pickle (protocol 2) of a value that holds an Array for each tensor, and those in the order of their keys."""
    file = io.BytesIO()
    pickler = _ArchivePickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.arrays
