"""ONNX Runtime by I/O binding: input read where it lies, and outputs left where they are made.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import TensorInfo
from runtime.device.arrays import CPU, CUDA, DeviceArray
from runtime.device.views import DeviceView

__all__ = ["run_bound"]


def run_bound(
    session: Any, image_input: TensorInfo, outputs: Sequence[TensorInfo], images: NDArray[Any] | DeviceView, place: str
) -> tuple[DeviceArray, ...]:
    """Runs a model and leaves its outputs in the memory of `place`.

    Args:
        session: an `onnxruntime.InferenceSession`.
        image_input: its input.
        outputs: its outputs.
        images: a batch in the CPU's memory, or one on the GPU that nothing writes any more.
        place: `cuda` or `cpu`.

    Returns:
        (N, K) of each output, all written.
    """
    binding = session.io_binding()
    if isinstance(images, DeviceView):
        binding.bind_input(image_input.name, place, 0, images.dtype, list(images.shape), images.pointer)
    else:
        binding.bind_cpu_input(image_input.name, np.ascontiguousarray(images))
    for output in outputs:
        binding.bind_output(output.name, place, 0)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    # The values, not the binding, own the memory.
    return tuple(
        DeviceArray(
            pointer=value.data_ptr(),
            shape=tuple(value.shape()),
            dtype=output.dtype,
            owner=value,
            to_host=functools.partial(_to_host, value),
            kind=CUDA if place == "cuda" else CPU,
        )
        for output, value in zip(outputs, binding.get_outputs(), strict=True)
    )


def _to_host(value: Any) -> NDArray[Any]:
    answers: NDArray[Any] = value.numpy().copy()  # of CPU memory it is a view
    return answers
