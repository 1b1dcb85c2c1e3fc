"""Where a network and its graph part: module by module, in the order they are computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from export.to_onnx import module_tensors
from runtime.graph.compare import TensorError, relative_error, tensors_of
from runtime.spec import ModelSpec

__all__ = ["module_errors"]


def module_errors(model: nn.Module, graph: onnx.ModelProto, spec: ModelSpec, batch: NDArray[Any]) -> list[TensorError]:
    """Compares the outputs of a network's modules with the tensors that `graph` has of them.

    Args:
        model: in eval mode, on the CPU.
        graph: what `to_onnx` made of it.
        spec: the one `graph` was made with.
        batch: float32 (N, 3, H, W); a few images.
    """
    made = {name for node in graph.graph.node for name in node.output}
    tensors = {path: name for path, name in module_tensors(model, spec).items() if name in made}
    expected = _module_outputs(model, tensors, batch)
    found = tensors_of(graph, [tensors[path] for path in expected], batch)
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
                added=max(0.0, error - before) if np.isfinite(before) else 0.0,
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
