"""Export a network to ONNX: trace it, fold its BatchNorms, optimize the graph and add the spec."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from torch import nn

from export.fold import BatchNormToAffine, FoldBatchNorm
from runtime.errors import ArchError, first_line
from runtime.graph.model import OPSET, check
from runtime.graph.norms import NORMS_KEY, adaptable, find_norms, norms_to_json
from runtime.spec import METADATA_KEY, ModelSpec

__all__ = ["INPUT", "OUTPUT", "module_tensors", "to_onnx"]

log = logging.getLogger(__name__)

INPUT, OUTPUT = "input", "logits"
_NO_LIMIT = 1 << 40
_TORCH_LOGGERS = ("torch.onnx", "torch._subclasses.fake_tensor", "torch.export._trace")
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which the exporter stores the path of a node's module, as the text of a Python
list."""


def to_onnx(model: nn.Module, spec: ModelSpec, *, free_size: bool = False) -> onnx.ModelProto:
    """Export a network with its spec.

    Args:
        model: a network in eval mode on the CPU that maps float32 (N, 3, H, W) to logits (N, K).
        spec: provides the input size and is stored in the model's metadata.
        free_size: leave height and width of the input open, as the dimensions `height` and `width`.

    Returns:
        An ONNX model of opset `OPSET` with input `input`, output `logits` and batch dimension
        `batch`. It has no BatchNormalization nodes and passes onnx.checker. Its metadata records what
        the BatchNorms did, see `runtime.graph.norms`.

    Raises:
        ArchError: torch.export cannot trace the architecture.
    """
    graph_model = _trace(model, spec, free_size)
    # No size limits: standardized weights (NF-Nets, BiT) are computed in the traced graph.
    optimizer.fold_constants(graph_model, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT)
    norms = find_norms(graph_model.graph)
    FoldBatchNorm()(graph_model)
    BatchNormToAffine()(graph_model)
    optimizer.optimize(graph_model)
    graph_model = _clean(graph_model, spec, free_size)
    if norms:
        graph_model.metadata_props[NORMS_KEY] = norms_to_json(adaptable(graph_model.graph, norms))
    proto = ir.to_proto(graph_model)
    check(proto)
    return proto


def module_tensors(model: nn.Module, spec: ModelSpec) -> dict[str, str]:
    """Trace `model` again and return the name of each module's output tensor.

    Returns:
        Module path, such as `blocks.0.conv` → tensor name, in the order of computation. Modules
        that run repeatedly are omitted.
    """
    last: dict[str, str] = {}
    done: set[str] = set()
    twice: set[str] = set()
    inside: set[str] = set()
    for node in _trace(model, spec, free_size=False).graph:
        scopes = set(ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))[:-1])
        done |= inside - scopes
        twice |= scopes & done
        inside = scopes
        for scope in scopes:
            last.pop(scope, None)  # move to the end: modules are listed in the order in which they finish
            last[scope] = str(node.outputs[0].name)
    return {path: name for path, name in last.items() if path and path not in twice}


def _trace(model: nn.Module, spec: ModelSpec, free_size: bool) -> ir.Model:
    example_NCHW = torch.zeros(2, 3, spec.preprocessing.height, spec.preprocessing.width)
    free = {0: torch.export.Dim("batch")}
    if free_size:
        free |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with warnings.catch_warnings(), torch.no_grad(), _silent_loggers():
        warnings.simplefilter("ignore")  # deprecations inside torch, which users cannot act on
        try:
            program = torch.onnx.export(
                model,
                (example_NCHW,),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=(free,),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            size = f"{spec.preprocessing.height}x{spec.preprocessing.width}"
            hint = "try a fixed image size (--img-size N)" if free_size else "try another image size (--img-size N)"
            # torch's own text is advice to developers; the error that it wraps is the reason.
            reason = first_line(error.__cause__ or error)
            raise ArchError(f"torch cannot export {spec.arch} at {size} px to ONNX: {reason}; {hint}") from error
    assert program is not None
    return program.model


@contextmanager
def _silent_loggers() -> Iterator[None]:
    """Silence torch's logs, which repeat an error with its stack trace."""
    loggers = [logging.getLogger(name) for name in _TORCH_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _clean(model: ir.Model, spec: ModelSpec, free_size: bool) -> ir.Model:
    """Remove what the tracer added, add the spec, and name the open dimensions."""
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "advprop", None
    model.metadata_props.clear()
    model.metadata_props[METADATA_KEY] = spec.to_json()
    model.graph.name = spec.arch
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape[0] = ir.SymbolicDim("batch")
    shape = model.graph.inputs[0].shape
    if free_size and shape is not None:
        shape[2], shape[3] = ir.SymbolicDim("height"), ir.SymbolicDim("width")
    return model
