"""What became of each quantized layer: whether its multiplications are in INT8 in the engine, and why not.

A graph with Q/DQ nodes is a wish. A builder may as well dequantize and multiply in floating point, and then still keep
the weights as int8 in the plan: neither the plan's size nor its bytes tell. The types that a kernel reads do.

What TensorRT-RTX 1.7.1 does was found with engines of single layers and of whole networks: docs/results/int8_plans.md.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engine.layers import EngineLayer
from runtime.graph.read import read_onnx
from runtime.graph.structure import WEIGHTED_OPS, node_macs

__all__ = ["LayerReport", "int8_layers", "summary_of", "warn_of_floats", "warn_of_padding", "warn_of_size"]

log = logging.getLogger(__name__)

INT8 = "int8"
UNKNOWN = "unknown"

_NO_WORK = ("kgen", "signal", "wait", "shape_call")
"""Kinds of layers that multiply nothing with weights."""
_BESIDES = 500_000
"""What an FP16 plan of TensorRT-RTX has beside its weights, in bytes: from half a megabyte (ResNet-18) to four."""
_WORTH_IT = 0.5
"""Share of the quantized work that should be in INT8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """A convolution or matrix product of the ONNX file, and how the engine computes it."""

    node: str
    """Its name."""
    op: str
    """Its operator."""
    macs: int
    """Multiply-accumulates for one image; 0 where shapes are unknown."""
    quantized: bool
    """Whether both its inputs come through DequantizeLinear."""
    computes: str
    """`int8`, `fp16`, `bf16`, `fp32`, or `unknown`."""
    why: str
    """The reason, where it is quantized and not in INT8; else what INT8 costs there, if anything."""

    @property
    def int8(self) -> bool:
        """Whether it multiplies int8 by int8."""
        return self.computes == INT8


def int8_layers(
    onnx: Path, layers: Sequence[EngineLayer], *, flavor: str = "tensorrt_rtx", sms: Collection[int] = ()
) -> tuple[LayerReport, ...]:
    """Finds each convolution and matrix product of `onnx` among the layers of its engine.

    Args:
        onnx: the file the engine was built from.
        layers: from `runtime.engine.layers`.
        flavor: the library that built it: what it cannot do explains what it did not do.
        sms: compute capabilities it was built for; empty for the default.

    Raises:
        ModelFileError: `onnx` cannot be read.
    """
    model = read_onnx(onnx)
    graph = _Graph(model.graph)
    macs = node_macs(model)
    reports = []
    for number, node in enumerate(model.graph.node):
        if node.op_type not in WEIGHTED_OPS:
            continue
        layer = _layer_of(node, layers)
        quantized = all(graph.dequantized(name) for name in node.input[:2])
        computes = _computes(layer)
        why = ""
        if quantized:
            why = _cost(graph, node, layer) if computes == INT8 else _reason(graph, node, layer, flavor, sms)
        reports.append(
            LayerReport(
                node=node.name or node.output[0],
                op=node.op_type,
                macs=macs.get(node.name or f"{node.op_type}_{number}", 0),
                quantized=quantized,
                computes=computes,
                why=why,
            )
        )
    return tuple(reports)


def summary_of(reports: Sequence[LayerReport]) -> str:
    """Returns in a line how many of the layers are in INT8."""
    own = [report for report in reports if report.int8]
    counts = f"{len(own)} of {len(reports)} layers"
    total = sum(report.macs for report in reports)
    return counts + (f", {sum(report.macs for report in own) / total:.1%} of the MACs" if total else "")


def warn_of_floats(reports: Sequence[LayerReport]) -> None:
    """Warns of quantized layers that the engine computes in floating point."""
    quantized = [report for report in reports if report.quantized]
    floats = [report for report in quantized if not report.int8 and report.computes != UNKNOWN]
    if not floats:
        return
    reasons = "; ".join(dict.fromkeys(report.why for report in floats))
    whole = sum(report.macs for report in quantized)
    share = sum(report.macs for report in quantized if report.int8) / whole if whole else 0.0
    advice = "" if share >= _WORTH_IT else "; this engine gains nothing from INT8, build FP16 (--trt fp16)"
    log.warning(
        "%d of %d quantized layers are computed in floating point, from %s on (%s)%s",
        len(floats),
        len(quantized),
        floats[0].node,
        reasons,
        advice,
    )


def warn_of_padding(reports: Sequence[LayerReport]) -> None:
    """Warns of grouped convolutions that INT8 makes larger."""
    padded = [report for report in reports if "padded" in report.why]
    if padded:
        log.warning(
            "%d grouped convolutions, from %s on (%s), move more memory in INT8 than in FP16; leave them in floating "
            "point (advprop calibrate --keep NODE)",
            len(padded),
            padded[0].node,
            padded[0].why,
        )


def warn_of_size(plan_bytes: int, weights: int) -> None:
    """Warns of an INT8 plan larger than one in FP16 can be expected to be.

    Args:
        plan_bytes: size of the plan.
        weights: elements of the weights of all convolutions and matrix products.
    """
    if plan_bytes > 2 * weights + _BESIDES:
        log.warning(
            "the INT8 plan has %.1f MB, in FP16 its weights would have %.1f MB: no space is saved, as padding and the "
            "source text of the kernels between the INT8 layers come on top; build FP16 too (--trt fp16) and compare",
            plan_bytes / 1e6,
            2 * weights / 1e6,
        )


def _layer_of(node: Any, layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """The layer that multiplies; a nameless node is called by its output."""
    name = node.name or f"node_of_{node.output[0]}"
    found = [layer for layer in layers if name in layer.nodes and layer.kind not in _NO_WORK]
    return min(found, key=lambda layer: not layer.name.startswith(name), default=None)


def _computes(layer: EngineLayer | None) -> str:
    """The type of both factors; where they differ, the floating one.

    The activation comes first. The weights are a constant, or an input where another kernel dequantizes them; a
    residual that the kernel adds is an input too.
    """
    if layer is None or not layer.inputs:
        return UNKNOWN
    first = layer.inputs[0].type
    others = [tensor.type for tensor in (*layer.inputs[1:], *layer.constants)]
    if first == INT8 and others and INT8 not in others:
        return others[0]
    return first


def _reason(graph: _Graph, node: Any, layer: EngineLayer | None, flavor: str, sms: Collection[int]) -> str:
    if layer is None:
        return "it was not found among the engine's layers"
    if flavor != "tensorrt_rtx":
        return "the builder chose so"
    if node.op_type == "ConvTranspose":
        return "TensorRT-RTX has no INT8 ConvTranspose"
    if node.op_type == "Conv" and any(sm < 80 for sm in sms):
        return f"TensorRT-RTX has no INT8 convolutions for SM {min(sms)}, nor then for the engine's other targets"
    if node.op_type == "Conv" and graph.scale_rank(node.input[0]) > 0:
        return "the scale of its input is a list of one number; TensorRT-RTX needs a scalar"
    return "the builder chose so"


def _cost(graph: _Graph, node: Any, layer: EngineLayer | None) -> str:
    """What INT8 costs a convolution in memory traffic."""
    if layer is None or node.op_type != "Conv":
        return ""
    costs = []
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    channels = groups * graph.shape(node.input[1])[1] if len(graph.shape(node.input[1])) > 1 else 0
    held = layer.inputs[0].shape[1] if layer.inputs and len(layer.inputs[0].shape) == 4 else channels
    if groups > 1 and held > channels:
        costs.append(f"its {channels} channels are padded to {held}")
    if layer.outputs and layer.outputs[0].type == "fp32":
        costs.append("writes fp32")
    return ", ".join(costs)


class _Graph:
    """Look-ups in an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self._producers = {output: node for node in graph.node for output in node.output}
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def dequantized(self, name: str) -> bool:
        """Whether DequantizeLinear gives `name`."""
        return name in self._producers and self._producers[name].op_type == "DequantizeLinear"

    def scale_rank(self, name: str) -> int:
        """Dimensions of the scale of the DequantizeLinear that gives `name`; 0 for a scalar, or where unknown."""
        scale = self._producers[name].input[1]
        return len(self._tensors[scale].dims) if scale in self._tensors else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of the weights behind `name`; () where they are not constant."""
        if self.dequantized(name):
            name = self._producers[name].input[0]
        return tuple(self._tensors[name].dims) if name in self._tensors else ()
