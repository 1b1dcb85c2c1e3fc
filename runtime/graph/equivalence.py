"""Compare a rewritten graph with the original graph on random images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from runtime.errors import ModelFileError, first_line
from runtime.graph.model import is_large
from runtime.graph.optimize import open_quietly
from runtime.graph.shapes import batch_problem
from runtime.graph.structure import graph_inputs, shape_of

__all__ = ["Layout", "Reference", "image_input"]

Layout: TypeAlias = Literal["NCHW", "NHWC"]

_TOLERANCE = 1e-3
"""Largest difference from the original graph, relative to its largest output."""
_DEFAULT_SIZE = (224, 224)
"""Height and width for graphs with an open image size."""


def image_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return the input of a classifier of images.

    Raises:
        ModelFileError: the graph has other inputs, or its input is not images.
    """
    inputs = graph_inputs(model.graph)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelFileError(f"the graph has {len(inputs)} inputs ({names}); expected one image input")
    value: onnx.ValueInfoProto = inputs[0]
    kind = value.type.tensor_type
    if len(kind.shape.dim) != 4 or kind.elem_type not in (TensorProto.FLOAT, TensorProto.UINT8):
        name = TensorProto.DataType.Name(kind.elem_type).lower()
        raise ModelFileError(
            f"the input {value.name!r} is {name} {list(shape_of(kind))}; expected images: float [N, 3, H, W], or "
            "[N, H, W, 3] with --layout NHWC"
        )
    return value


class Reference:
    """The original graph's output on a few random images; None for graphs that are too large."""

    def __init__(self, model: onnx.ModelProto, output: str, layout: Layout, size: tuple[int, int] | None) -> None:
        value = image_input(model)
        kind = value.type.tensor_type
        declared = shape_of(kind)
        image = declared[1:3] if layout == "NHWC" else declared[2:]
        sizes = zip(image, size or _DEFAULT_SIZE, strict=True)
        height, width = (length if length > 0 else other for length, other in sizes)
        self.is_fixed = declared[0] > 0
        self.batch = max(declared[0], 1)
        self.size = (height, width)
        pixels = kind.elem_type == TensorProto.UINT8
        random = np.random.default_rng(0)
        shape = (self.batch + 1, 3, height, width)
        values = random.integers(0, 256, shape) if pixels else random.normal(size=shape)
        self.images_NCHW = values.astype(np.float32)
        self.outputs: NDArray[Any] | None = None
        if is_large(model):
            return
        first = self.images_NCHW[: self.batch].astype(np.uint8 if pixels else np.float32)
        if layout == "NHWC":
            first = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
        try:
            self.outputs = open_quietly(model).run([output], {value.name: first})[0]
        except Exception as error:  # ONNX Runtime's exceptions have no other common base
            raise ModelFileError(
                f"ONNX Runtime cannot run the graph on {list(first.shape)}: {first_line(error)}"
            ) from error

    def agrees(self, model: onnx.ModelProto, counts: Sequence[int]) -> bool:
        """Return whether `model` has the original output on the first images of larger batches."""
        if self.outputs is None:
            return not any(batch_problem(model, count, self.size) for count in counts)
        name = graph_inputs(model.graph)[0].name
        try:
            session = open_quietly(model)
            found = [session.run(None, {name: self.images_NCHW[:count]})[0] for count in counts]
        except Exception:  # ONNX Runtime has no common base class: the graph does not run with such a batch
            return False
        scale = float(np.abs(self.outputs).max()) or 1.0
        for count, output in zip(counts, found, strict=True):
            shared = min(count, self.batch)
            if output.shape != (count, *self.outputs.shape[1:]) and output.ndim:
                return False
            if not np.abs(output[:shared] - self.outputs[:shared]).max() <= _TOLERANCE * scale:
                return False
        return True
