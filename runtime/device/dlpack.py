"""DLPack capsules, read and made: version 1, and the format before it.

The structures are those of dlpack.h: https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import InputError

__all__ = ["Tensor", "make_capsule", "read_capsule"]

_PLAIN, _VERSIONED = b"dltensor", b"dltensor_versioned"
_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
_LETTERS = {code: letter for letter, code in _KINDS.items()}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


# Prototypes of our own: those of `ctypes.pythonapi` itself are shared with every other library.
_python = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _python))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_is_dying = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_keep = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", _python))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """What a capsule says. The memory lives as long as the capsule, or the array that gave it."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """In elements; None for contiguous memory."""
    dtype: np.dtype[Any]
    kind: int
    """DLPack's number of the kind of device: 1 for a CPU, 2 for CUDA."""
    device: int
    """Number of the device among its kind."""
    read_only: bool
    """Whether its owner forbids writing; before version 1 nobody could."""


def read_capsule(capsule: Any) -> Tensor:
    """Reads a capsule without taking it over: it frees itself when it is dropped.

    Raises:
        InputError: not a DLPack capsule of version 0 or 1, or elements that NumPy does not have (bfloat16).
    """
    if _is(capsule, _VERSIONED):
        managed = _ManagedVersioned.from_address(_pointer(capsule, _VERSIONED))
        if managed.major != 1:
            raise InputError(f"found DLPack version {managed.major}.{managed.minor}; expected 1")
        tensor, read_only = managed.tensor, bool(managed.flags & 1)
    elif _is(capsule, _PLAIN):
        tensor, read_only = _Managed.from_address(_pointer(capsule, _PLAIN)).tensor, False
    else:
        raise InputError("__dlpack__ gave no DLPack capsule, or one that was used before")
    letter = _LETTERS.get(tensor.code, "")
    if not letter or tensor.lanes != 1 or tensor.bits not in (8, 16, 32, 64):
        name = f"bfloat{tensor.bits}" if tensor.code == 4 else f"DLPack type {tensor.code} of {tensor.bits} bits"
        raise InputError(f"found elements of {name}, which NumPy does not have; convert them to float32 or float16")
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    return Tensor(
        pointer=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=strides,
        dtype=np.dtype(f"{letter}{tensor.bits // 8}"),
        kind=tensor.device_type,
        device=tensor.device_id,
        read_only=read_only,
    )


def make_capsule(tensor: Tensor, owner: Any, *, versioned: bool) -> Any:
    """Makes a capsule of contiguous memory, which keeps `owner` alive until its consumer is done with it.

    Args:
        tensor: what to say of the memory.
        owner: whose memory it is.
        versioned: in the format of DLPack 1, which consumers ask for by `max_version`.
    """
    assert tensor.strides is None
    managed: Any = _ManagedVersioned(major=1, minor=0) if versioned else _Managed()
    rank = len(tensor.shape)
    shape = (ctypes.c_int64 * rank)(*tensor.shape)
    steps = [1] * rank
    for place in range(rank - 2, -1, -1):
        steps[place] = steps[place + 1] * max(tensor.shape[place + 1], 1)
    strides = (ctypes.c_int64 * rank)(*steps)  # said outright: DLPack 1.2 forbids to leave them out
    managed.tensor = _DLTensor(
        tensor.pointer,
        tensor.kind,
        tensor.device,
        rank,
        _KINDS[tensor.dtype.kind],
        tensor.dtype.itemsize * 8,
        1,
        ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64)),
        0,
    )
    managed.deleter = _on_delete
    if versioned:
        managed.flags = int(tensor.read_only)
    address = ctypes.addressof(managed)
    _made[address] = (managed, shape, strides, owner)
    return _new(address, _VERSIONED if versioned else _PLAIN, _on_destroy)


_made: dict[int, tuple[Any, ...]] = {}
"""What consumers still hold, by the address that they know it by."""


# A consumer may outlive this module at the interpreter's end; what they use is in their arguments, and never freed.
def _delete(address: int, made: dict[int, tuple[Any, ...]] = _made) -> None:
    made.pop(address, None)


def _destroy(
    capsule: int,
    made: dict[int, tuple[Any, ...]] = _made,
    names: tuple[bytes, ...] = (_PLAIN, _VERSIONED),
    is_named: Any = _is_dying,
    pointer: Any = _dying_pointer,
) -> None:
    """Of a capsule that nobody took over: those that somebody did are renamed."""
    for name in names:
        if is_named(capsule, name):
            made.pop(pointer(capsule, name), None)


_on_delete, _on_destroy = _Deleter(_delete), _Destructor(_destroy)
for _callback in (_on_delete, _on_destroy):
    _keep(_callback)
