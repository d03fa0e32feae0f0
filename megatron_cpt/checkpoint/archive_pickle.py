"""The pickle inside a torch.save archive: read without running or importing anything, and written the same way.

What it names, other than plain containers, becomes an inert stand-in (see `unpickler`); written again, that has the
name it stood for. A tensor becomes an `Array`: where it lies, no data.
"""

from __future__ import annotations

import collections
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_cpt.checkpoint.reader import num_bytes
from megatron_cpt.checkpoint.stand_ins import Named, NamedPickler, PicklerBase, named
from megatron_cpt.checkpoint.unpickler import LIMIT, PLAIN_MAKERS, PLAIN_NAMES, numbers
from megatron_cpt.checkpoint.unpickler import Unpickler as Plain


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
_TENSOR_V2, _TENSOR_V3 = (named("torch._utils", f"_rebuild_tensor_v{version}") for version in (2, 3))
_PARAMETER = named("torch._utils", "_rebuild_parameter")
_FROM_TYPE, _TENSOR = named("torch._tensor", "_rebuild_from_type_v2"), named("torch", "Tensor")
_TORCHS = (_TENSOR_V2, _TENSOR_V3, _PARAMETER, _FROM_TYPE, _TENSOR)


def _array(storage: Any, first: Any, shape: Any, strides: Any, dtype: torch.dtype) -> Array:
    """The array of a tensor, after it is proven to lie in its storage."""
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor lies in {type(storage).__name__}, expected a storage")
    (first,) = numbers((first,), "a tensor's storage offset")
    shape, strides = numbers(shape, "a tensor's shape"), numbers(strides, "a tensor's stride")
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
    return (
        (_tensor_v2 if function is _TENSOR_V2 else _tensor_v3)(*arguments)
        if plain and len(arguments) < 10
        else NotImplemented
    )


class Unpickler(Plain):
    """Reads the pickle of an archive.

    Args:
        data: the pickle.
        find: from the key of a storage, the byte of the file where it begins and its size in bytes.
    """

    names = {**PLAIN_NAMES, **{kind.stands_for: kind for kind in (*_KINDS, *_QUANTISED, *_TORCHS)}}
    makers = {
        **PLAIN_MAKERS,
        _TENSOR_V2: _tensor_v2,
        _TENSOR_V3: _tensor_v3,
        _FROM_TYPE: _of_type,
        _PARAMETER: lambda data, _gradient, _hooks: data if isinstance(data, Array) else NotImplemented,
    }

    def __init__(self, data: bytes, find: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(data)
        self._find = find

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a tensor names, after its record is proven to have its size."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("it refers to something else than a storage")
        _, kind, key, _location, count = pid
        if type(key) is not str or type(count) is not int or not 0 <= count < LIMIT:
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
