"""`Backend`: the checks every backend shares. A backend itself writes `_run` and `close`.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.spec import ModelSpec

__all__ = ["Backend", "TensorInfo"]


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
    """A loaded model with one image input. Safe to share by threads."""

    name: str
    """Short name, e.g. `onnxruntime`."""
    device: str
    """`cpu` or `cuda`."""
    input: TensorInfo
    outputs: tuple[TensorInfo, ...]
    """Logits or probabilities; of a `topk` file, the probabilities and their classes."""
    spec: ModelSpec | None
    """The description inside the model file; None for a file that advprop did not write."""

    def run(self, images_NCHW: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Runs the model once on an already preprocessed batch.

        Args:
            images_NCHW: of exactly `self.input`'s dtype and shape; N ≥ 1.

        Returns:
            (N, K) of each of `self.outputs`.

        Raises:
            InputError: wrong type, dtype, rank, size or an empty batch.
        """
        expected = self.input
        if not isinstance(images_NCHW, np.ndarray):
            raise InputError(f"run takes a NumPy array; found {type(images_NCHW).__name__}")
        if images_NCHW.dtype != expected.dtype:
            raise InputError(
                f"the model expects {expected}; found dtype {images_NCHW.dtype}. "
                "Convert it, or give the images to predict"
            )
        fits = images_NCHW.ndim == len(expected.shape) and all(
            want in (-1, found) for want, found in zip(expected.shape, images_NCHW.shape, strict=True)
        )
        if not fits or images_NCHW.size == 0:
            raise InputError(f"the model expects {expected}; found shape {images_NCHW.shape}")
        return self._run(images_NCHW)

    @abstractmethod
    def _run(self, images_NCHW: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """Runs a checked batch."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the backend holds. Running afterwards is an error."""
