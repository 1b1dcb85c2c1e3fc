"""`DeviceView`: an array of another library, on the GPU, that is read where it lies.

`__dlpack__` is preferred over `__cuda_array_interface__` where an array has both, since by it the array's library
itself makes our stream wait for the work that still writes the array; torch leaves that out of the other.
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
_NO_ORDER = -1  # the stream argument by which `__dlpack__` waits for nothing


@dataclass(frozen=True, slots=True)
class DeviceView:
    """Contiguous memory on a GPU, and whose it is. Slices of its first dimension are views too."""

    pointer: int
    """Address on the GPU."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any
    """Kept alive, since the memory is its own."""
    stream: int | None = None
    """Stream whose work may still write the memory; None where all is done."""
    by_dlpack: bool = False
    """Whether `owner.__dlpack__(stream=…)` lets a stream wait for the work that writes the memory."""
    device: int | None = None
    """Number of the GPU; None where it was not told."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> DeviceView:
        start, stop, step = part.indices(self.shape[0])
        assert step == 1
        image_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, pointer=self.pointer + start * image_bytes, shape=(max(stop - start, 0), *self.shape[1:]))

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * self.dtype.itemsize

    def order(self, cuda: Cuda, stream: int, event: int) -> None:
        """Lets what comes next on `stream` wait for the work that writes the memory.

        Raises InputError where the owner refuses.
        """
        if self.stream is not None:
            cuda.wait_for(stream, self.stream, event)
        elif self.by_dlpack:
            _capsule(self.owner, stream)


def array_or_view(images: Any, stream: object = None) -> NDArray[Any] | DeviceView:
    """Takes an array of any library, without a copy: on the CPU as NumPy array, on a GPU as a view.

    Args:
        images: a NumPy array, or whatever has `__dlpack__` or `__cuda_array_interface__`: torch, CuPy, JAX, Numba,
            pycuda's GPUArray.
        stream: CUDA stream whose work writes the array, where the array does not tell; see `stream_handle`.

    Raises:
        InputError: not an array, not contiguous, or one that its library does not let go of.
    """
    if isinstance(images, np.ndarray):
        return images
    if hasattr(images, "__dlpack__") and hasattr(images, "__dlpack_device__"):
        kind = int(images.__dlpack_device__()[0])
        if kind in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED):
            return _told(_view_of_dlpack(images), stream)
        return _on_host(images)
    if hasattr(images, "__cuda_array_interface__"):
        return _told(view_of_interface(images.__cuda_array_interface__, images), stream)
    raise InputError(
        f"run takes an array of NumPy, or of another library by __dlpack__ or __cuda_array_interface__; found "
        f"{type(images).__name__}"
    )


def view_of_interface(interface: Any, owner: Any) -> DeviceView:
    """Reads a `__cuda_array_interface__`, version 0 to 3.

    Since version 3 it names the stream that the memory is written on, or None where all is done. Before, users had to
    see to that by themselves; then our work waits for the default stream, which pycuda uses unless it is told another.

    Args:
        interface: the dictionary.
        owner: the array that it is of.

    Raises:
        InputError: not contiguous, masked, of a type that NumPy does not have, or not such a dictionary.
    """
    try:
        shape: tuple[int, ...] = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        pointer, _read_only = interface["data"]  # we only read
        version, strides = int(interface["version"]), interface.get("strides")
        pointer = int(pointer or 0)
        if version < 0 or any(size < 0 for size in shape):
            raise ValueError("negative numbers in it")
        if strides is not None:
            strides = tuple(int(stride) for stride in strides)
            if len(strides) != len(shape):
                raise ValueError("strides and shape are of different lengths")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"the __cuda_array_interface__ of a {type(owner).__name__} is not one: {type(error).__name__} "
            f"{first_line(error)}"
        ) from error
    if interface.get("mask") is not None:
        raise InputError("masked arrays are not taken; fill the masked elements")
    if dtype.kind not in "biufc" or not dtype.isnative:
        raise InputError(
            f"found elements of type {interface['typestr']!r}; expected plain numbers as the CPU stores them"
        )
    if pointer == 0 and 0 not in shape:
        raise InputError(f"the {type(owner).__name__} has no memory: its address is 0")
    _check_contiguous(shape, strides, dtype.itemsize)
    stream = interface.get("stream") if version >= 3 else _LEGACY_STREAM
    return DeviceView(pointer, shape, dtype, owner, None if stream is None else _checked_stream(stream))


def stream_handle(stream: object) -> int:
    """Returns the number of a CUDA stream: an int, or a stream of torch, CuPy, pycuda, Numba or cuda.core.

    Raises:
        InputError: none of these, or 0, which does not say which default stream is meant: 1 is the legacy one, 2 the
            thread's.
    """
    if isinstance(stream, int):
        return _checked_stream(stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        _version, handle = protocol() if callable(protocol) else protocol
        return int(handle) or _LEGACY_STREAM
    for name in ("cuda_stream", "ptr", "handle"):  # torch, CuPy, pycuda and Numba
        handle = getattr(stream, name, None)
        if handle is not None:
            return int(getattr(handle, "value", handle) or 0) or _LEGACY_STREAM
    raise InputError(f"stream takes a CUDA stream or its number; found {type(stream).__name__}")


def _checked_stream(stream: Any) -> int:
    if isinstance(stream, bool) or not isinstance(stream, int) or stream < 1:
        raise InputError(
            f"found the stream {stream!r}; expected 1 (the legacy default), 2 (the thread's) or an address"
        )
    return stream


def _told(view: DeviceView, stream: object) -> DeviceView:
    """A view of memory that the work on `stream` writes, whatever the array itself says."""
    return view if stream is None else replace(view, stream=stream_handle(stream), by_dlpack=False)


def _check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int) -> None:
    """Strides are in bytes. Those of dimensions of size 1 do not matter, nor do any where there are no elements."""
    if strides is None or math.prod(shape) == 0:
        return
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise InputError(
                f"an array of shape {shape} with strides of {strides} bytes is not contiguous; copy it to one that is "
                "(torch: images.contiguous(), CuPy: cupy.ascontiguousarray(images))"
            )
        expected *= size


def _on_host(images: Any) -> NDArray[Any]:
    try:
        return np.from_dlpack(images)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the {type(images).__name__} cannot be read as a NumPy array: {first_line(error)}. "
            "Give float32 or float16 in the CPU's or an NVIDIA GPU's memory (torch: images.detach())"
        ) from error


def _view_of_dlpack(images: Any) -> DeviceView:
    from runtime.device.dlpack import read_capsule

    tensor = read_capsule(_capsule(images, _NO_ORDER))
    strides = tensor.strides and tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    _check_contiguous(tensor.shape, strides, tensor.dtype.itemsize)
    return DeviceView(tensor.pointer, tensor.shape, tensor.dtype, images, by_dlpack=True, device=tensor.device)


def _capsule(images: Any, stream: int) -> Any:
    try:
        try:
            return images.__dlpack__(stream=stream, max_version=(1, 1))
        except TypeError:  # written before DLPack had versions
            return images.__dlpack__(stream=stream)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the {type(images).__name__} cannot be taken by DLPack: {first_line(error)}") from error
