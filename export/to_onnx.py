"""nn.Module → ONNX: traced with BatchNorms kept, folded by our passes, optimized, described."""

from __future__ import annotations

import ast
import logging
import warnings

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from torch import nn

from export.fold import BatchNormToAffine, FoldBatchNorm
from runtime.errors import ArchError
from runtime.graph.model import check
from runtime.spec import METADATA_KEY, ModelSpec

__all__ = ["INPUT", "OPSET", "OUTPUT", "module_tensors", "to_onnx"]

log = logging.getLogger(__name__)

OPSET = 20
"""FP16 scales of Q/DQ are legal from 19; ONNX Runtime's INT8 tooling fails from 21."""
INPUT, OUTPUT = "input", "logits"
_ALL = 1 << 40
_SCOPES = "pkg.torch.onnx.name_scopes"


def to_onnx(model: nn.Module, spec: ModelSpec, *, free_size: bool = False) -> onnx.ModelProto:
    """Exports `model` with its spec inside.

    Args:
        model: in eval mode, on the CPU; (N, 3, H, W) float32 → (N, K) logits.
        spec: gives the input size, and goes into the file's metadata.
        free_size: leave the height and the width of images open, as `height` and `width`.

    Returns:
        An ONNX model of opset 20: input `input`, output `logits`, batch dimension named
        `batch`, no BatchNormalization node, checked by onnx.checker.

    Raises:
        ArchError: torch.export cannot trace the architecture.
    """
    graph_model = _trace(model, spec, free_size)
    # Without the limits that spare large tensors: standardized weights (NF-nets, BiT) are computed in the trace.
    optimizer.fold_constants(graph_model, input_size_limit=_ALL, output_size_limit=_ALL)
    FoldBatchNorm()(graph_model)
    BatchNormToAffine()(graph_model)
    optimizer.optimize(graph_model)
    graph_model = _clean(graph_model, spec, free_size)
    proto = ir.to_proto(graph_model)
    check(proto)
    return proto


def module_tensors(model: nn.Module, spec: ModelSpec) -> dict[str, str]:
    """Traces `model` once more and returns which tensor of the graph each module's output is.

    Returns:
        Module path, e.g. `blocks.0.conv` → name of the tensor, in the order of computation. A module
        that runs more than once is left out.
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
            last.pop(scope, None)  # to the end: in the order in which modules finish
            last[scope] = str(node.outputs[0].name)
    return {path: name for path, name in last.items() if path and path not in twice}


def _trace(model: nn.Module, spec: ModelSpec, free_size: bool) -> ir.Model:
    example_NCHW = torch.zeros(2, 3, spec.preprocessing.height, spec.preprocessing.width)
    free = {0: torch.export.Dim("batch")}
    if free_size:
        free |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations, nothing a user can act on
        loud = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
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
            reason = str(error).strip().splitlines()[-1]
            hint = "; a fixed size (--img-size N) may go" if free_size else ""
            raise ArchError(f"torch cannot export {spec.arch} to ONNX: {reason}{hint}") from error
        finally:
            logging.getLogger("torch.onnx").setLevel(loud)
    assert program is not None
    return program.model


def _clean(model: ir.Model, spec: ModelSpec, free_size: bool) -> ir.Model:
    """Removes what only the tracer needed: its notes on nodes, stack traces, docstrings."""
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
