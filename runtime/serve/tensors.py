"""Tensors of the Open Inference Protocol: datatypes, and their binary and JSON forms.

Source: the protocol's "Tensor Data" and Triton's "Binary Tensor Data Extension".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.serve.errors import Outcome, RequestError

__all__ = [
    "BYTES",
    "BytesTensor",
    "Tensor",
    "array_from_buffer",
    "array_from_json",
    "bytes_from_buffer",
    "bytes_to_buffer",
    "check_shape",
    "datatype_of",
    "dtype_of",
]

BYTES = "BYTES"
_MAX_RANK = 8
_MAX_ELEMENTS = 2**40

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

BytesTensor = list[bytes]
"""The elements of a BYTES tensor, flat."""
Tensor = NDArray[Any] | BytesTensor


def datatype_of(dtype: np.dtype[Any]) -> str:
    """Return the protocol's name of a NumPy dtype."""
    return _NAMES.get(dtype, str(dtype).upper())


def dtype_of(name: str, datatype: object) -> np.dtype[Any]:
    """Return the NumPy dtype of a datatype other than BYTES.

    Raises:
        RequestError: the datatype of the tensor `name` is unknown.
    """
    if not isinstance(datatype, str) or datatype not in _DTYPES:
        expected = ", ".join((*_DTYPES, BYTES))
        raise RequestError(
            Outcome.INVALID, f"tensor {name!r}: found datatype {_short(datatype)}, expected one of {expected}"
        )
    return _DTYPES[datatype]


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return a shape from a request.

    Raises:
        RequestError: it is not a list of at most 8 whole numbers of at least 0.
    """
    valid = (
        isinstance(shape, Sequence)
        and not isinstance(shape, str)
        and 1 <= len(shape) <= _MAX_RANK
        and all(type(size) is int and 0 <= size <= _MAX_ELEMENTS for size in shape)
        and math.prod(shape) <= _MAX_ELEMENTS
    )
    if not valid:
        raise RequestError(
            Outcome.INVALID,
            f"tensor {name!r}: found shape {_short(shape)}, expected a list of 1 to {_MAX_RANK} whole numbers",
        )
    assert isinstance(shape, Sequence)
    return tuple(shape)


def array_from_buffer(
    name: str, data: memoryview | bytes, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> NDArray[Any]:
    """Return an array that shares the memory of a request, or a copy if its elements are not aligned.

    Raises:
        RequestError: the number of bytes differs from that of the shape.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise RequestError(
            Outcome.INVALID,
            f"tensor {name!r}: found {len(data)} bytes, but {datatype_of(dtype)} of shape {list(shape)} has {expected}",
        )
    return np.require(np.frombuffer(data, dtype).reshape(shape), requirements="A")


def bytes_from_buffer(name: str, data: memoryview | bytes, shape: tuple[int, ...]) -> BytesTensor:
    """Split the binary form of a BYTES tensor, a little-endian uint32 length before each element.

    Raises:
        RequestError: a length exceeds the data, or the number of elements differs from the shape.
    """
    count = math.prod(shape)
    elements: BytesTensor = []
    position = 0
    while position < len(data) and len(elements) < count:
        size = int.from_bytes(data[position : position + 4], "little")
        start, position = position + 4, position + 4 + size
        if position > len(data):
            follow = max(len(data) - start, 0)
            raise RequestError(
                Outcome.INVALID, f"tensor {name!r}: element {len(elements)} has {size} bytes, but only {follow} follow"
            )
        elements.append(bytes(data[start:position]))
    if len(elements) != count or position != len(data):
        raise RequestError(
            Outcome.INVALID,
            f"tensor {name!r}: found {len(elements)} elements and {len(data) - position} more bytes, but shape "
            f"{list(shape)} has {count} elements",
        )
    return elements


def bytes_to_buffer(elements: BytesTensor) -> bytes:
    """Return the binary form of a BYTES tensor."""
    return b"".join(part for element in elements for part in (len(element).to_bytes(4, "little"), element))


def array_from_json(name: str, data: object, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Convert numbers from JSON, flat or nested, to an array without loss of information.

    Raises:
        RequestError: they are no numbers of this dtype, or their count differs from the shape.
    """
    try:
        found = np.asarray(data)
        kinds = {"b": "b", "u": "iu", "i": "iu", "f": "fiu"}[dtype.kind]
        if found.size and found.dtype.kind not in kinds:
            raise ValueError("they are of another type")
        if found.shape != shape and (found.ndim != 1 or found.size != math.prod(shape)):
            raise ValueError(f"they have shape {list(found.shape)}")
        with np.errstate(over="ignore"):
            array = found.astype(dtype).reshape(shape)
        if dtype.kind in "iu" and not np.array_equal(array.reshape(-1), found.reshape(-1)):
            raise ValueError("they exceed its range")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise RequestError(
            Outcome.INVALID,
            f"tensor {name!r}: its data are not {datatype_of(dtype)} numbers of shape {list(shape)}: {reason}",
        ) from error
    return array


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
