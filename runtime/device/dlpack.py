"""Read and create DLPack capsules, both of version 1 and of the unversioned format before it.

The structures follow dlpack.h: https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h
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


# Separate prototypes, because all libraries in the process share those of `ctypes.pythonapi`.
_python = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(("PyCapsule_New", _python))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_is = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_is_dying = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_keep = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", _python))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """The contents of a capsule. The memory lives as long as the capsule or its exporter."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """In elements; None for contiguous memory."""
    dtype: np.dtype[Any]
    kind: int
    """DLPack's device type: 1 for a CPU, 2 for CUDA."""
    device: int
    """Index among the devices of that type."""
    read_only: bool
    """Whether the owner forbids writing. Capsules before version 1 cannot express it."""


def read_capsule(capsule: Any) -> Tensor:
    """Read a capsule without consuming it: the capsule frees itself when it is dropped.

    Raises:
        InputError: the object is not a DLPack capsule of version 0 or 1, or NumPy does not support
            its element type (bfloat16).
    """
    if _is(capsule, _VERSIONED):
        managed = _ManagedVersioned.from_address(_pointer(capsule, _VERSIONED))
        if managed.major != 1:
            raise InputError(f"found DLPack version {managed.major}.{managed.minor}; expected 1")
        tensor, read_only = managed.tensor, bool(managed.flags & 1)
    elif _is(capsule, _PLAIN):
        tensor, read_only = _Managed.from_address(_pointer(capsule, _PLAIN)).tensor, False
    else:
        raise InputError("__dlpack__ returned no DLPack capsule, or one that was already consumed")
    letter = _LETTERS.get(tensor.code, "")
    if not letter or tensor.lanes != 1 or tensor.bits not in (8, 16, 32, 64):
        name = f"bfloat{tensor.bits}" if tensor.code == 4 else f"{tensor.code} with {tensor.bits} bits (DLPack)"
        raise InputError(
            f"found elements of type {name}, which NumPy does not support", fix="convert them to float32 or float16"
        )
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
    """Create a capsule for contiguous memory. It keeps `owner` alive until it is released.

    Args:
        tensor: description of the memory.
        owner: owner of the memory.
        versioned: use the format of DLPack 1, which consumers request with `max_version`.
    """
    assert tensor.strides is None
    managed: Any = _ManagedVersioned(major=1, minor=0) if versioned else _Managed()
    rank = len(tensor.shape)
    shape = (ctypes.c_int64 * rank)(*tensor.shape)
    steps = [1] * rank
    for place in range(rank - 2, -1, -1):
        steps[place] = steps[place + 1] * max(tensor.shape[place + 1], 1)
    strides = (ctypes.c_int64 * rank)(*steps)  # explicit, because DLPack 1.2 requires strides
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
"""Address of each capsule that a consumer still holds → the objects that it needs."""


# A consumer may outlive this module when the interpreter exits. Therefore these callbacks keep what
# they use in their arguments, and are never freed.
def _delete(address: int, made: dict[int, tuple[Any, ...]] = _made) -> None:
    made.pop(address, None)


def _destroy(
    capsule: int,
    made: dict[int, tuple[Any, ...]] = _made,
    names: tuple[bytes, ...] = (_PLAIN, _VERSIONED),
    is_named: Any = _is_dying,
    pointer: Any = _dying_pointer,
) -> None:
    """Free a capsule that was not consumed. Consumers rename the capsules that they take over."""
    for name in names:
        if is_named(capsule, name):
            made.pop(pointer(capsule, name), None)


_on_delete, _on_destroy = _Deleter(_delete), _Destructor(_destroy)
for _callback in (_on_delete, _on_destroy):
    _keep(_callback)
