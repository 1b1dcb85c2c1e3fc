"""`Backend`, the base class of all backends, with the checks that they share.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.device.arrays import DeviceArray
from runtime.device.views import DeviceView, array_or_view
from runtime.errors import AdvPropError, InputError, RunFailed, first_line
from runtime.spec import ModelSpec

if TYPE_CHECKING:
    from runtime.device.driver import DeviceTimes

__all__ = ["Backend", "TensorInfo"]

_Output = TypeVar("_Output", NDArray[Any], DeviceArray)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, NumPy dtype and shape of an input or output. A dynamic dimension is -1."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = ", ".join("any" if size < 0 else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} ({sizes})"


class Backend(ABC):
    """A loaded model with one image input. Thread-safe.

    A subclass implements `_run` and `close`. If it has several execution contexts, it sets
    `contexts`, and its `_run` borrows a free one, or waits for one.
    """

    name: str
    """Short name, e.g. `onnxruntime`."""
    device: str
    """`cpu` or `cuda`."""
    input: TensorInfo
    outputs: tuple[TensorInfo, ...]
    """Logits or probabilities. A `topk` file has two outputs: the probabilities and their
    classes."""
    spec: ModelSpec | None
    """The spec inside the model file; None if advprop did not write the file."""
    reasons: tuple[str, ...] = ()
    """One line per decision (device, kernels, threads) and why it was taken."""
    contexts: int = 1
    """Number of batches that can run at the same time."""

    @property
    def batch_range(self) -> tuple[int, int]:
        """Smallest and largest batch of one `_run`. Other batches are padded or split."""
        fixed = self.input.shape[0]
        return (fixed, fixed) if fixed > 0 else (1, sys.maxsize)

    @property
    def device_bytes(self) -> int:
        """Bytes of GPU memory that the backend allocated itself; 0 if unknown."""
        return 0

    def run(self, images_NCHW: Any, *, stream: object = None) -> tuple[NDArray[Any], ...]:
        """Run the model on a preprocessed batch.

        Args:
            images_NCHW: finite values of `self.input`'s dtype and image shape, any N ≥ 1. A NumPy
                array, or another library's array, which is read in place. It may be on the GPU if
                the model runs there; its values are then not validated.
            stream: CUDA stream whose work writes the images, if their array does not report it.

        Returns:
            (N, K) array for each of `self.outputs`.

        Raises:
            InputError: wrong type, dtype, rank, size or layout, an empty batch, NaN or infinity.
            RunFailed: the library failed.
        """
        return self.run_checked(self.accept(images_NCHW, stream=stream))

    def run_on_device(self, images_NCHW: Any, *, stream: object = None) -> tuple[DeviceArray, ...]:
        """Run like `run`, but keep the outputs on the GPU.

        Raises:
            InputError: the model runs on the CPU, or as for `run`.
            RunFailed: the library failed.
        """
        if self.device != "cuda":
            raise InputError(f"{self.name} runs on the CPU, and cannot keep outputs on a GPU", fix="use run")
        accepted = self.accept(images_NCHW, stream=stream)
        return self._outputs_of(accepted, self._run_on_device)

    def accept(self, images_NCHW: Any, *, stream: object = None) -> NDArray[Any] | DeviceView:
        """Return a batch for `run_checked`, without a copy. Arguments and errors as in `run`."""
        accepted = array_or_view(images_NCHW, stream)
        self.check(accepted)
        return accepted

    def check(self, images_NCHW: NDArray[Any] | DeviceView) -> None:
        """Raise InputError for a batch that `run` does not accept."""
        self.check_form(images_NCHW)
        if isinstance(images_NCHW, np.ndarray):
            _check_values(images_NCHW)

    def check_form(self, images_NCHW: NDArray[Any] | DeviceView) -> None:
        """Raise InputError for a wrong device, dtype or shape. The values are not validated."""
        expected = self.input
        if isinstance(images_NCHW, DeviceView) and self.device != "cuda":
            raise InputError(
                f"the images are on the GPU, but {self.name} runs the model on the CPU",
                fix="copy them to the CPU (torch: images.cpu()), or load the model with device='cuda'",
            )
        if images_NCHW.dtype != expected.dtype:
            raise InputError(
                f"the model expects {expected}; found dtype {images_NCHW.dtype}",
                fix="convert the images, or pass them to predict",
            )
        if not _fits(images_NCHW.shape[1:], expected) or images_NCHW.size == 0:
            detail, fix = _explain_shape(images_NCHW.shape, expected)
            raise InputError(f"the model expects {expected}; found shape {images_NCHW.shape}{detail}", fix=fix)

    def run_checked(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        """Run a batch that `check` accepted, padded or split to fit `batch_range`.

        Raises:
            InputError: the batch is on the GPU and smaller than `batch_range`.
            RunFailed: the library failed.
        """
        smallest, largest = self.batch_range
        count = len(images_NCHW)
        if smallest <= count <= largest:
            return self._outputs_of(images_NCHW, self._run)
        parts = []
        for start in range(0, count, largest):
            part_NCHW = images_NCHW[start : start + largest]
            missing = smallest - len(part_NCHW)
            if missing > 0:
                if isinstance(part_NCHW, DeviceView):
                    raise InputError(
                        f"the model accepts batches of {smallest} images; found {count} on the GPU", fix="pad the batch"
                    )
                padding = np.broadcast_to(part_NCHW[-1:], (missing, *part_NCHW.shape[1:]))
                outputs = self._outputs_of(np.concatenate([part_NCHW, padding]), self._run)
                parts.append(tuple(output[: len(part_NCHW)] for output in outputs))
            else:
                parts.append(self._outputs_of(part_NCHW, self._run))
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))

    def device_times(self, images_NCHW: NDArray[Any]) -> DeviceTimes | None:
        """Run a checked batch within `batch_range`, and return its GPU times, or None if unknown.

        Raises:
            RunFailed: the library failed.
        """
        return None

    def _outputs_of(
        self, images_NCHW: NDArray[Any] | DeviceView, run: Callable[[NDArray[Any] | DeviceView], tuple[_Output, ...]]
    ) -> tuple[_Output, ...]:
        """Call `run`, convert its exceptions, and check the number of output rows."""
        try:
            outputs = run(images_NCHW)
        except AdvPropError:
            raise
        except Exception as error:  # libraries' exceptions have no other common base class
            raise RunFailed(
                f"{self.name} on {self.device} failed on a batch of shape {images_NCHW.shape}: {first_line(error)}",
                fix="use a smaller batch if it is out of memory",
            ) from error
        for info, output in zip(self.outputs, outputs, strict=True):
            if len(output) != len(images_NCHW):
                raise RunFailed(
                    f"the model returned {len(output)} rows of {info.name} for {len(images_NCHW)} images, which cannot "
                    "be assigned to them",
                    fix="export it with a batch dimension that reaches the output",
                )
        return outputs

    @abstractmethod
    def _run(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        """Run a checked batch within `batch_range`. Several threads may call it at once.

        Only a backend on a GPU receives a `DeviceView`.
        """

    def _run_on_device(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[DeviceArray, ...]:
        """Run a checked batch of any size and keep the outputs on the GPU."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Free all resources. No call may be in flight, and none may follow."""


def _fits(image_shape: tuple[int, ...], expected: TensorInfo) -> bool:
    sizes = expected.shape[1:]
    return len(image_shape) == len(sizes) and all(
        size in (-1, found) for size, found in zip(sizes, image_shape, strict=True)
    )


def _explain_shape(shape: tuple[int, ...], expected: TensorInfo) -> tuple[str, str]:
    """Return what is probably wrong with a shape, and how to fix it; empty if unknown."""
    if len(shape) == len(expected.shape) - 1 and _fits(shape, expected):
        return ": one image without its batch dimension", "pass images[None]"
    if len(shape) == 4 and 0 not in shape:
        count, *image = shape
        if _fits((image[2], image[0], image[1]), expected):
            return f" ({count} images, channels last)", "transpose them: images.transpose(0, 3, 1, 2)"
        if _fits((image[1], image[2], image[0]), expected):
            return f" ({count} images, channels first)", "transpose them: images.transpose(0, 2, 3, 1)"
    return (": an empty batch" if 0 in shape[:1] else ""), ""


def _check_values(images_NCHW: NDArray[Any]) -> None:
    if images_NCHW.dtype.kind != "f":
        return
    # One image at a time fits into the CPU cache: 20 µs at 224 pixels.
    for index, image_CHW in enumerate(images_NCHW):
        if not np.isfinite(image_CHW).all():
            kind = "NaN" if np.isnan(image_CHW).any() else "infinity"
            raise InputError(f"image {index} of the batch contains {kind}; expected finite numbers")
