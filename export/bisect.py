"""Find the first module or tensor at which two stages of an export diverge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from export.source import Source
from export.to_onnx import module_tensors
from export.verify import FEW_IMAGES, TOLERANCE, batches
from runtime.graph.compare import (
    TensorError,
    added_error,
    first_above,
    graph_errors,
    relative_error,
    tensor_values,
)
from runtime.graph.rounding import rounded_name
from runtime.spec import ModelSpec

__all__ = ["first_module", "first_tensor", "module_errors"]


def first_module(source: Source, model: onnx.ModelProto) -> Callable[[], str]:
    """Return a function that describes the first module whose output differs in the graph."""

    def find() -> str:
        errors = module_errors(source.model, model, source.spec, next(batches(source))[:FEW_IMAGES])
        return _describe(first_above(errors, TOLERANCE["fp32"]), "layer")

    return find


def first_tensor(
    source: Source, model: onnx.ModelProto, rounded: onnx.ModelProto, tolerance: float
) -> Callable[[], str]:
    """Return a function that describes the first tensor that differs between two graphs."""

    def find() -> str:
        errors = graph_errors(model, rounded, next(batches(source))[:FEW_IMAGES], rounded_name)
        return _describe(first_above(errors, tolerance), "node")

    return find


def module_errors(model: nn.Module, graph: onnx.ModelProto, spec: ModelSpec, batch: NDArray[Any]) -> list[TensorError]:
    """Compare the outputs of a network's modules with the corresponding tensors of its graph.

    Args:
        model: a network in eval mode, on the CPU.
        graph: the graph that `to_onnx` returned for it.
        spec: the spec that was passed to `to_onnx`.
        batch: float32 (N, 3, H, W), a few images: all outputs are held in memory.
    """
    computed = {name for node in graph.graph.node for name in node.output}
    tensors = {path: name for path, name in module_tensors(model, spec).items() if name in computed}
    expected = _module_outputs(model, tensors, batch)
    found = tensor_values(graph, [tensors[path] for path in expected], batch)
    entries = []
    before = 0.0
    for path, output in expected.items():
        error = relative_error(output, found[tensors[path]])
        entries.append(
            TensorError(
                node=path,
                op=type(model.get_submodule(path)).__name__,
                tensor=tensors[path],
                error=error,
                added=added_error(error, before),
            )
        )
        before = error
    return entries


@torch.no_grad()
def _module_outputs(model: nn.Module, wanted: Mapping[str, str], batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
    outputs: dict[str, NDArray[Any]] = {}
    handles = []
    for path, module in model.named_modules():
        if path in wanted:

            def keep(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
                if isinstance(output, torch.Tensor):
                    outputs[path] = output.detach().clone().numpy()

            handles.append(module.register_forward_hook(keep))
    try:
        model(torch.from_numpy(batch))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _describe(entry: TensorError | None, kind: str) -> str:
    if entry is None:
        return f"No single {kind} exceeds the tolerance on {FEW_IMAGES} images: small errors add up"
    how = f"off by {entry.error:.2g} of its largest value" if np.isfinite(entry.error) else "not finite"
    return f"The first {kind} that diverges is {entry.node} ({entry.op}), {how}"
