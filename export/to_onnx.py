"""nn.Module → ONNX: traced with BatchNorms kept, folded by our passes, optimised, described."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from torch import nn

from export.fold import BatchNormToAffine, FoldBatchNorm
from runtime.errors import ArchError
from runtime.files import write_bytes
from runtime.spec import METADATA_KEY, ModelSpec

__all__ = ["INPUT", "OPSET", "OUTPUT", "save_onnx", "to_onnx"]

log = logging.getLogger(__name__)

OPSET = 20
"""FP16 scales of Q/DQ are legal from 19; ONNX Runtime's INT8 tooling fails from 21."""
INPUT, OUTPUT = "input", "logits"
_ALL = 1 << 40


def to_onnx(model: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """Exports `model` with its spec inside.

    Args:
        model: in eval mode, on the CPU; (N, 3, H, W) float32 → (N, K) logits.
        spec: gives the input size, and goes into the file's metadata.

    Returns:
        An ONNX model of opset 20: input `input`, output `logits`, batch dimension named
        `batch`, no BatchNormalization node, checked by onnx.checker.

    Raises:
        ArchError: torch.export cannot trace the architecture.
    """
    size = spec.preprocessing
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if weights >= 2**31:
        raise ArchError(
            f"{spec.arch} has {weights / 2**30:.1f} GiB of weights; an ONNX file holds less than 2 GiB, and weights "
            "beside the file are not supported yet"
        )
    example_NCHW = torch.zeros(2, 3, size.height, size.width)
    graph_model = _trace(model, example_NCHW, spec.arch)
    # Without the limits that spare large tensors: standardised weights (NF-nets, BiT) are computed in the trace.
    optimizer.fold_constants(graph_model, input_size_limit=_ALL, output_size_limit=_ALL)
    FoldBatchNorm()(graph_model)
    BatchNormToAffine()(graph_model)
    optimizer.optimize(graph_model)
    graph_model = _clean(graph_model, spec)
    proto = ir.to_proto(graph_model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _trace(model: nn.Module, example_NCHW: torch.Tensor, arch: str) -> ir.Model:
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
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ArchError(f"torch cannot export {arch} to ONNX: {reason}") from error
        finally:
            logging.getLogger("torch.onnx").setLevel(loud)
    assert program is not None
    return program.model


def _clean(model: ir.Model, spec: ModelSpec) -> ir.Model:
    """Removes what only the tracer needed: its notes on nodes, stack traces, docstrings."""
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "advprop", None
    model.metadata_props.clear()
    model.metadata_props[METADATA_KEY] = spec.to_json()
    model.graph.name = spec.arch
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape[0] = ir.SymbolicDim("batch")
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Writes `model` atomically; the same model gives the same bytes. Raises OutputError."""
    write_bytes(path, model.SerializeToString(deterministic=True))
