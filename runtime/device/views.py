"""`DeviceView`, a view of another library's GPU array, which is read without a copy.

`__dlpack__` is preferred over `__cuda_array_interface__`, because it makes the reading stream wait
for the work that still writes the array. torch does not support that through the other interface.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, first_line

if TYPE_CHECKING:
    from runtime.device.driver import Cuda

__all__ = ["DeviceView", "array_or_view", "stream_handle", "view_of_interface"]

_LEGACY_STREAM = 1
_DLPACK_CUDA, _DLPACK_CUDA_MANAGED = 2, 13
_NO_SYNCHRONIZATION = -1  # `__dlpack__(stream=-1)` waits for nothing


@dataclass(frozen=True, slots=True)
class DeviceView:
    """Contiguous memory on a GPU, and its owner. A slice of the first dimension is a view too."""

    pointer: int
    """Address on the GPU."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any
    """The array that owns the memory, kept alive by the view."""
    stream: int | None = None
    """Stream whose work may still write the memory; None if all of it is done."""
    by_dlpack: bool = False
    """Whether `owner.__dlpack__(stream=…)` makes a stream wait for the work that writes the
    memory."""
    device: int | None = None
    """Index of the GPU; None if it is unknown."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> DeviceView:
        start, stop, step = part.indices(self.shape[0])
        assert step == 1
        image_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, pointer=self.pointer + start * image_bytes, shape=(max(stop - start, 0), *self.shape[1:]))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    def order_after_writes(self, cuda: Cuda, stream: int, event: int) -> None:
        """Make later work on `stream` wait for the work that writes the memory.

        Args:
            cuda: the GPU.
            stream: the stream that reads the memory.
            event: an event, which is overwritten.

        Raises:
            InputError: the owner cannot synchronize with the stream.
        """
        if self.stream is not None:
            cuda.wait_for(stream, self.stream, event)
        elif self.by_dlpack:
            _export_capsule(self.owner, stream)


def array_or_view(images: Any, stream: object = None) -> NDArray[Any] | DeviceView:
    """Return a NumPy array for an array in CPU memory, or a view of GPU memory, without a copy.

    Args:
        images: a NumPy array, or an object with `__dlpack__` or `__cuda_array_interface__`: an
            array of torch, CuPy, JAX or Numba, or pycuda's GPUArray.
        stream: CUDA stream whose work writes the array, if the array does not report it; see
            `stream_handle`.

    Raises:
        InputError: the object is not an array, is not contiguous, or its library cannot export it.
    """
    if isinstance(images, np.ndarray):
        return images
    if hasattr(images, "__dlpack__") and hasattr(images, "__dlpack_device__"):
        kind = int(images.__dlpack_device__()[0])
        if kind in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED):
            return _with_stream(_view_of_dlpack(images), stream)
        return _numpy_of_dlpack(images)
    if hasattr(images, "__cuda_array_interface__"):
        return _with_stream(view_of_interface(images.__cuda_array_interface__, images), stream)
    raise InputError(
        f"run takes a NumPy array, or another library's array with __dlpack__ or __cuda_array_interface__; found "
        f"{type(images).__name__}"
    )


def view_of_interface(interface: Any, owner: Any) -> DeviceView:
    """Return a view for a `__cuda_array_interface__` of version 0 to 3.

    Since version 3 the interface names the stream that writes the memory, or None if all work is
    done. Earlier versions required callers to synchronize. For them, the reading stream waits for
    the default stream, which pycuda uses unless the caller passes another one.

    Args:
        interface: the dictionary.
        owner: the array that exported it.

    Raises:
        InputError: the dictionary is invalid, or describes memory that is not contiguous, is
            masked, or has a type unknown to NumPy.
    """
    try:
        shape: tuple[int, ...] = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        pointer, _read_only = interface["data"]  # the array is only read
        version, strides = int(interface["version"]), interface.get("strides")
        pointer = int(pointer or 0)
        if version < 0 or any(size < 0 for size in shape):
            raise ValueError("negative numbers")
        if strides is not None:
            strides = tuple(int(stride) for stride in strides)
            if len(strides) != len(shape):
                raise ValueError("strides and shape have different lengths")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the __cuda_array_interface__ of a {type(owner).__name__} is invalid: {type(error).__name__} "
            f"{first_line(error)}"
        ) from error
    if interface.get("mask") is not None:
        raise InputError("masked arrays are not supported", fix="fill the masked elements")
    if dtype.kind not in "biufc" or not dtype.isnative:
        raise InputError(f"found elements of type {interface['typestr']!r}; expected numbers in native byte order")
    if pointer == 0 and 0 not in shape:
        raise InputError(f"the {type(owner).__name__} has no memory: its address is 0")
    _check_contiguous(shape, strides, dtype.itemsize)
    stream = interface.get("stream") if version >= 3 else _LEGACY_STREAM
    return DeviceView(pointer, shape, dtype, owner, None if stream is None else _check_stream(stream))


def stream_handle(stream: object) -> int:
    """Return the handle of a CUDA stream: an int, or the stream object of another library.

    Raises:
        InputError: the object is not a stream, or is 0, which is ambiguous: 1 is the legacy default
            stream and 2 the per-thread one.
    """
    if isinstance(stream, int):
        return _check_stream(stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _version, handle = protocol() if callable(protocol) else protocol
        return int(handle) or _LEGACY_STREAM
    for name in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, pycuda and Numba
        handle = getattr(stream, name, None)
        if handle is not None:
            return int(getattr(handle, "value", handle) or 0) or _LEGACY_STREAM
    raise InputError(f"stream takes a CUDA stream or its handle; found {type(stream).__name__}")


def _check_stream(stream: Any) -> int:
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < 1:
        raise InputError(
            f"found the stream {stream!r}; expected 1 (legacy default), 2 (per-thread default) or an address"
        )
    return stream


def _with_stream(view: DeviceView, stream: object) -> DeviceView:
    """Return the view, with the caller's writing stream if one is passed."""
    return view if stream is None else replace(view, stream=stream_handle(stream), by_dlpack=False)


def _check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> None:
    """Check strides, in bytes, except those of dimensions of size 1 and of empty arrays."""
    if strides is None or math.prod(shape) == 0:
        return
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise InputError(
                f"an array of shape {shape} with strides of {strides} bytes is not contiguous",
                fix="copy it (torch: images.contiguous(), CuPy: cupy.ascontiguousarray(images))",
            )
        expected *= size


def _numpy_of_dlpack(images: Any) -> NDArray[Any]:
    try:
        return np.from_dlpack(images)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the {type(images).__name__} cannot be read as a NumPy array: {first_line(error)}",
            fix="pass float32 or float16 in CPU or NVIDIA GPU memory (torch: images.detach())",
        ) from error


def _view_of_dlpack(images: Any) -> DeviceView:
    from runtime.device.dlpack import read_capsule

    tensor = read_capsule(_export_capsule(images, _NO_SYNCHRONIZATION))
    strides = tensor.strides and tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    _check_contiguous(tensor.shape, strides, tensor.dtype.itemsize)
    return DeviceView(tensor.pointer, tensor.shape, tensor.dtype, images, by_dlpack=True, device=tensor.device)


def _export_capsule(images: Any, stream: int) -> Any:
    try:
        try:
            return images.__dlpack__(stream=stream, max_version=(1, 1))
        except TypeError:  # a library that predates versions of DLPack
            return images.__dlpack__(stream=stream)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the {type(images).__name__} cannot be exported by DLPack: {first_line(error)}") from error
