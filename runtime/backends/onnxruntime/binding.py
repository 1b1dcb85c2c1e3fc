"""Run ONNX Runtime with I/O binding: read the input in place, keep the outputs on the device.

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
    session: Any, image_input: TensorInfo, outputs: Sequence[TensorInfo], images: NDArray[Any] | DeviceView, device: str
) -> tuple[DeviceArray, ...]:
    """Run a model and keep its outputs on `device`.

    Args:
        session: an `onnxruntime.InferenceSession`.
        image_input: its input.
        outputs: its outputs.
        images: a batch in CPU memory, or on the GPU if no pending work writes it.
        device: `cuda` or `cpu`.

    Returns:
        (N, K) array for each output, completely written.
    """
    binding = session.io_binding()
    if isinstance(images, DeviceView):
        binding.bind_input(image_input.name, device, 0, images.dtype, list(images.shape), images.pointer)
    else:
        binding.bind_cpu_input(image_input.name, np.ascontiguousarray(images))
    for output in outputs:
        binding.bind_output(output.name, device, 0)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    # The values own the memory, not the binding.
    return tuple(
        DeviceArray(
            pointer=value.data_ptr(),
            shape=tuple(value.shape()),
            dtype=output.dtype,
            owner=value,
            to_host=functools.partial(_to_host, value),
            kind=CUDA if device == "cuda" else CPU,
        )
        for output, value in zip(outputs, binding.get_outputs(), strict=True)
    )


def _to_host(value: Any) -> NDArray[Any]:
    output: NDArray[Any] = value.numpy().copy()  # a view if the value is in CPU memory
    return output
