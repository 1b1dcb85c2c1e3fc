"""`Backend`: the checks every backend shares. A backend itself writes `_run` and `close`.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.device.arrays import DeviceArray
from runtime.device.times import DeviceTimes
from runtime.device.views import DeviceView, array_or_view
from runtime.errors import AdvPropError, InputError, RunFailed, first_line
from runtime.spec import ModelSpec

__all__ = ["Backend", "TensorInfo"]

_Answer = TypeVar("_Answer", NDArray[Any], DeviceArray)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output: its name, its NumPy dtype, its shape with -1 where it is free."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        sizes = ", ".join("any" if size < 0 else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} ({sizes})"


class Backend(ABC):
    """A loaded model with one image input. Safe to share by threads.

    A backend that holds several execution contexts says so in `contexts`; its `_run` then borrows a free one for
    the call. Whoever calls may do so from any number of threads: where all contexts are taken, `_run` waits.
    """

    name: str
    """Short name, e.g. `onnxruntime`."""
    device: str
    """`cpu` or `cuda`."""
    input: TensorInfo
    outputs: tuple[TensorInfo, ...]
    """Logits or probabilities; of a `topk` file, the probabilities and their classes."""
    spec: ModelSpec | None
    """The description inside the model file; None for a file that advprop did not write."""
    reasons: tuple[str, ...] = ()
    """Why it runs as it does (device, kernels, threads), a sentence each."""
    contexts: int = 1
    """Batches that are worth running at the same time."""

    @property
    def batch_range(self) -> tuple[int, int]:
        """The fewest and the most images that one `_run` takes. Other batches are padded and split to fit."""
        fixed = self.input.shape[0]
        return (fixed, fixed) if fixed > 0 else (1, sys.maxsize)

    @property
    def device_bytes(self) -> int:
        """GPU memory that the backend allocated by itself and holds; 0 where its library keeps that to itself."""
        return 0

    def run(self, images_NCHW: Any, *, stream: object = None) -> tuple[NDArray[Any], ...]:
        """Runs the model on an already preprocessed batch.

        Args:
            images_NCHW: of exactly `self.input`'s dtype and image shape, finite; any N ≥ 1. A NumPy array, or one of
                another library, on the GPU too where the model runs there, which is read where it lies. Values are
                not looked at on the GPU.
            stream: CUDA stream whose work writes the images, where their array does not tell.

        Returns:
            (N, K) of each of `self.outputs`.

        Raises:
            InputError: wrong type, dtype, rank, size or layout, an empty batch, NaN or infinity.
            RunFailed: the library failed on it.
        """
        return self.run_checked(self.accept(images_NCHW, stream=stream))

    def run_on_device(self, images_NCHW: Any, *, stream: object = None) -> tuple[DeviceArray, ...]:
        """Does what `run` does, and leaves the answers on the GPU, all written. Raises InputError on a CPU."""
        if self.device != "cuda":
            raise InputError(
                f"outputs stay on the GPU where the model runs there; {self.name} runs on the CPU: use run"
            )
        accepted = self.accept(images_NCHW, stream=stream)
        return self._answers(accepted, self._run_on_device)

    def accept(self, images_NCHW: Any, *, stream: object = None) -> NDArray[Any] | DeviceView:
        """Takes a batch as `run` does, without a copy; what it returns has passed `check`. Raises InputError."""
        accepted = array_or_view(images_NCHW, stream)
        self.check(accepted)
        return accepted

    def check(self, images_NCHW: NDArray[Any] | DeviceView) -> None:
        """Raises InputError for a batch that `run` does not take."""
        self.check_form(images_NCHW)
        if isinstance(images_NCHW, np.ndarray):
            _check_values(images_NCHW)

    def check_form(self, images_NCHW: NDArray[Any] | DeviceView) -> None:
        """Does what `check` does but for the values."""
        expected = self.input
        if isinstance(images_NCHW, DeviceView) and self.device != "cuda":
            raise InputError(
                f"the images are on the GPU and the model runs on the CPU, by {self.name}; bring them here "
                "(torch: images.cpu()), or load the model by device='cuda'"
            )
        if images_NCHW.dtype != expected.dtype:
            raise InputError(
                f"the model expects {expected}; found dtype {images_NCHW.dtype}. "
                "Convert it, or give the images to predict"
            )
        if not _fits(images_NCHW.shape[1:], expected) or images_NCHW.size == 0:
            advice = _advice(images_NCHW.shape, expected)
            raise InputError(f"the model expects {expected}; found shape {images_NCHW.shape}{advice}")

    def run_checked(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        """Runs a batch that `check` has passed, padded or split where the file's batch is bounded."""
        fewest, most = self.batch_range
        count = len(images_NCHW)
        if fewest <= count <= most:
            return self._answers(images_NCHW, self._run)
        parts = []
        for start in range(0, count, most):
            part_NCHW = images_NCHW[start : start + most]
            missing = fewest - len(part_NCHW)
            if missing > 0:
                if isinstance(part_NCHW, DeviceView):
                    raise InputError(
                        f"the model takes batches of {fewest} images; found {count}, on the GPU: fill the batch up"
                    )
                padding = np.broadcast_to(part_NCHW[-1:], (missing, *part_NCHW.shape[1:]))
                answers = self._answers(np.concatenate([part_NCHW, padding]), self._run)
                parts.append(tuple(answer[: len(part_NCHW)] for answer in answers))
            else:
                parts.append(self._answers(part_NCHW, self._run))
        return tuple(np.concatenate(answers) for answers in zip(*parts, strict=True))

    def device_times(self, images_NCHW: NDArray[Any]) -> DeviceTimes | None:
        """Runs a checked batch within `batch_range`, and returns the GPU's own times; None where nothing tells them.

        Raises RunFailed.
        """
        return None

    def _answers(
        self, images_NCHW: NDArray[Any] | DeviceView, run: Callable[[NDArray[Any] | DeviceView], tuple[_Answer, ...]]
    ) -> tuple[_Answer, ...]:
        """One `run`, whose failures are ours, and which answers every image."""
        try:
            answers = run(images_NCHW)
        except AdvPropError:
            raise
        except Exception as error:  # libraries' exceptions share no base but this
            raise RunFailed(
                f"{self.name} on {self.device} failed on a batch of shape {images_NCHW.shape}: {first_line(error)}. "
                "If it is out of memory, give it fewer images at once"
            ) from error
        for output, answer in zip(self.outputs, answers, strict=True):
            if len(answer) != len(images_NCHW):
                raise RunFailed(
                    f"the model gave {len(answer)} rows of {output.name} for {len(images_NCHW)} images; "
                    "its answers cannot be told apart. Export it with a batch dimension that reaches the output"
                )
        return answers

    @abstractmethod
    def _run(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        """Runs a checked batch of `batch_range` images; called from several threads at once.

        A view comes to backends on the GPU only.
        """

    def _run_on_device(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[DeviceArray, ...]:
        """Runs a checked batch of any size, and leaves the answers on the GPU. For backends whose device is `cuda`."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """Frees what the backend holds. Nothing runs when it is called, and nothing may afterwards."""


def _fits(image_shape: tuple[int, ...], expected: TensorInfo) -> bool:
    wanted = expected.shape[1:]
    return len(image_shape) == len(wanted) and all(
        want in (-1, found) for want, found in zip(wanted, image_shape, strict=True)
    )


def _advice(shape: tuple[int, ...], expected: TensorInfo) -> str:
    """What to do about a shape that is nearly right."""
    if len(shape) == len(expected.shape) - 1 and _fits(shape, expected):
        return ": one image without its batch dimension; give images[None]"
    if len(shape) == 4 and 0 not in shape:
        count, *image = shape
        if _fits((image[2], image[0], image[1]), expected):
            return f" ({count} images, channels last): transpose them, images.transpose(0, 3, 1, 2)"
        if _fits((image[1], image[2], image[0]), expected):
            return f" ({count} images, channels first): transpose them, images.transpose(0, 2, 3, 1)"
    return ": an empty batch" if 0 in shape[:1] else ""


def _check_values(images_NCHW: NDArray[Any]) -> None:
    if images_NCHW.dtype.kind != "f":
        return
    for number, image_CHW in enumerate(images_NCHW):  # one by one: each fits in the CPU's cache, 20 µs at 224 pixels
        if not np.isfinite(image_CHW).all():
            kind = "NaN" if np.isnan(image_CHW).any() else "infinity"
            raise InputError(f"image {number} of the batch holds {kind}; expected finite numbers")
