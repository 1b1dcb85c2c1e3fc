"""Report which quantized layers an engine computes in INT8, and why it does not compute the others.

Q/DQ nodes in a graph are only a request. A builder may dequantize the inputs and multiply in
floating point, and still store the weights as int8 in the plan. The size and bytes of a plan do not
show this, but the types that each kernel reads do.

The behavior of TensorRT-RTX 1.7.1 was determined with engines of single layers and of whole
networks: docs/results/int8_plans.md.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from runtime.engine.layers import EngineLayer
from runtime.graph.read import read_onnx
from runtime.graph.structure import WEIGHTED_OPS, node_macs

__all__ = [
    "LayerReport",
    "Reason",
    "int8_layers",
    "summary_of",
    "warn_about_floats",
    "warn_about_padding",
    "warn_about_size",
]

log = logging.getLogger(__name__)

INT8 = "int8"
UNKNOWN = "unknown"

_AUXILIARY_KINDS = ("kgen", "signal", "wait", "shape_call")
"""Kinds of engine layers that do not multiply by weights."""
_OVERHEAD_BYTES = 500_000
"""Size of a TensorRT-RTX FP16 plan without its weights: from 0.5 MB (ResNet-18) to 4 MB."""
_WORTHWHILE_SHARE = 0.5
"""Share of the quantized MACs that should be in INT8."""


class Reason(StrEnum):
    """Why a quantized layer is not computed in INT8. Sidecars store the values."""

    NONE = "none"
    """The layer is computed in INT8, or is not quantized."""
    UNSTATED = "unstated"
    """The sidecar was written by an earlier version, which stored only a text."""
    NOT_FOUND = "not_found"
    BUILDER_CHOICE = "builder_choice"
    NO_KERNEL = "no_kernel"
    OLD_TARGET = "old_target"
    LIST_SCALE = "list_scale"


_REASON_TEXTS = {
    Reason.NONE: "",
    Reason.NOT_FOUND: "the layer was not found in the engine",
    Reason.BUILDER_CHOICE: "the builder chose floating point",
    Reason.NO_KERNEL: "TensorRT-RTX has no INT8 ConvTranspose",
    Reason.OLD_TARGET: "TensorRT-RTX has no INT8 convolutions for SM {sm}, and then uses none for the other targets",
    Reason.LIST_SCALE: "the scale of its input is a list with one number; TensorRT-RTX requires a scalar",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """A convolution or matrix product of the ONNX file, and how the engine computes it."""

    node: str
    """Name of the node."""
    op: str
    """Operator of the node."""
    macs: int
    """Multiply-accumulates per image; 0 if shapes are unknown."""
    quantized: bool
    """Whether both inputs come from DequantizeLinear."""
    computes: str
    """Type of the multiplication: `int8`, `fp16`, `bf16`, `fp32`, or `unknown`."""
    why: str
    """Text for `reason`, or the extra memory traffic of an INT8 layer; empty if neither applies."""
    reason: Reason = Reason.UNSTATED
    """Why a quantized layer is not computed in INT8."""
    channels: int = 0
    """Input channels of a grouped INT8 convolution; 0 for other layers."""
    padded_channels: int = 0
    """Input channels of a grouped INT8 convolution in the engine, including padding; 0 for other
    layers."""
    writes_fp32: bool = False
    """Whether an INT8 convolution writes FP32, which takes four bytes per value."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LayerReport:
        """Return a report from a sidecar's fields.

        Raises:
            TypeError, ValueError: a field is missing, unknown or invalid.
        """
        return cls(**{**fields, "reason": Reason(fields.get("reason", Reason.UNSTATED))})

    @property
    def int8(self) -> bool:
        """Whether the layer multiplies int8 by int8."""
        return self.computes == INT8

    @property
    def is_padded(self) -> bool:
        """Whether the engine pads the channels of the layer in INT8."""
        return self.padded_channels > self.channels


def int8_layers(
    onnx: Path, layers: Sequence[EngineLayer], *, flavor: str = "tensorrt_rtx", sms: Collection[int] = ()
) -> tuple[LayerReport, ...]:
    """Find each convolution and matrix product of `onnx` among the layers of its engine.

    Args:
        onnx: the file that the engine was built from.
        layers: the engine's layers, from `runtime.engine.layers`.
        flavor: the library that built it, whose limits explain its choices.
        sms: target compute capabilities; empty for the default.

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
        layer = _find_layer(node, layers)
        quantized = all(graph.is_dequantized(name) for name in node.input[:2])
        computes = _compute_type(layer)
        fields: dict[str, Any] = {"reason": Reason.NONE, "why": ""}
        if quantized and computes == INT8:
            fields |= _int8_traffic(graph, node, layer)
        elif quantized:
            reason = _reason(graph, node, layer, flavor, sms)
            fields = {"reason": reason, "why": _REASON_TEXTS[reason].format(sm=min(sms, default=0))}
        reports.append(
            LayerReport(
                node=node.name or node.output[0],
                op=node.op_type,
                macs=macs.get(node.name or f"{node.op_type}_{number}", 0),
                quantized=quantized,
                computes=computes,
                **fields,
            )
        )
    return tuple(reports)


def summary_of(reports: Sequence[LayerReport]) -> str:
    """Return the number of INT8 layers and their share of the MACs, as one line."""
    in_int8 = [report for report in reports if report.int8]
    counts = f"{len(in_int8)} of {len(reports)} layers"
    total = sum(report.macs for report in reports)
    return counts + (f", {sum(report.macs for report in in_int8) / total:.1%} of the MACs" if total else "")


def warn_about_floats(reports: Sequence[LayerReport]) -> None:
    """Warn about quantized layers that the engine computes in floating point."""
    quantized = [report for report in reports if report.quantized]
    floats = [report for report in quantized if not report.int8 and report.computes != UNKNOWN]
    if not floats:
        return
    reasons = "; ".join(dict.fromkeys(report.why for report in floats))
    total = sum(report.macs for report in quantized)
    share = sum(report.macs for report in quantized if report.int8) / total if total else 0.0
    advice = "" if share >= _WORTHWHILE_SHARE else "; INT8 does not speed up this engine: build FP16 (--trt fp16)"
    log.warning(
        "%d of %d quantized layers are computed in floating point, starting with %s (%s)%s",
        len(floats),
        len(quantized),
        floats[0].node,
        reasons,
        advice,
    )


def warn_about_padding(reports: Sequence[LayerReport]) -> None:
    """Warn about grouped convolutions that need padding in INT8."""
    padded = [report for report in reports if report.is_padded]
    if padded:
        log.warning(
            "%d grouped convolutions, starting with %s (%s), move more memory in INT8 than in FP16; keep them in "
            "floating point (advprop calibrate --keep NODE)",
            len(padded),
            padded[0].node,
            padded[0].why,
        )


def warn_about_size(plan_bytes: int, weights: int) -> None:
    """Warn about an INT8 plan that is larger than an FP16 plan is expected to be.

    Args:
        plan_bytes: size of the plan, in bytes.
        weights: number of weight elements in all convolutions and matrix products.
    """
    if plan_bytes > 2 * weights + _OVERHEAD_BYTES:
        log.warning(
            "the INT8 plan has %.1f MB, and the weights alone have %.1f MB in FP16: padding and the source code of the "
            "kernels between INT8 layers outweigh the savings; build FP16 too (--trt fp16) and compare",
            plan_bytes / 1e6,
            2 * weights / 1e6,
        )


def _find_layer(node: Any, layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """Return the layer that multiplies. TensorRT names a node without a name after its output."""
    name = node.name or f"node_of_{node.output[0]}"
    found = [layer for layer in layers if name in layer.nodes and layer.kind not in _AUXILIARY_KINDS]
    return min(found, key=lambda layer: not layer.name.startswith(name), default=None)


def _compute_type(layer: EngineLayer | None) -> str:
    """Return the type of both factors, or the floating-point one if they differ.

    The activation is the first input. The weights are a constant, or an input if another kernel
    dequantizes them. A residual that the kernel adds is an input too.
    """
    if layer is None or not layer.inputs:
        return UNKNOWN
    first = layer.inputs[0].type
    others = [tensor.type for tensor in (*layer.inputs[1:], *layer.constants)]
    if first == INT8 and others and INT8 not in others:
        return others[0]
    return first


def _reason(graph: _Graph, node: Any, layer: EngineLayer | None, flavor: str, sms: Collection[int]) -> Reason:
    if layer is None:
        return Reason.NOT_FOUND
    if flavor != "tensorrt_rtx":
        return Reason.BUILDER_CHOICE
    if node.op_type == "ConvTranspose":
        return Reason.NO_KERNEL
    if node.op_type == "Conv" and any(sm < 80 for sm in sms):
        return Reason.OLD_TARGET
    if node.op_type == "Conv" and graph.scale_rank(node.input[0]) > 0:
        return Reason.LIST_SCALE
    return Reason.BUILDER_CHOICE


def _int8_traffic(graph: _Graph, node: Any, layer: EngineLayer | None) -> dict[str, Any]:
    """Return the fields of a report on the extra memory traffic of an INT8 convolution."""
    if layer is None or node.op_type != "Conv":
        return {}
    fields: dict[str, Any] = {"writes_fp32": bool(layer.outputs) and layer.outputs[0].type == "fp32"}
    texts = ["writes fp32"] if fields["writes_fp32"] else []
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    channels = groups * graph.shape(node.input[1])[1] if len(graph.shape(node.input[1])) > 1 else 0
    held = layer.inputs[0].shape[1] if layer.inputs and len(layer.inputs[0].shape) == 4 else channels
    if groups > 1:
        fields |= {"channels": channels, "padded_channels": held}
        if held > channels:
            texts.insert(0, f"its {channels} channels are padded to {held}")
    return fields | {"why": ", ".join(texts)}


class _Graph:
    """Look-ups in an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self._producers = {output: node for node in graph.node for output in node.output}
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def is_dequantized(self, name: str) -> bool:
        """Return whether `name` is the output of a DequantizeLinear."""
        return name in self._producers and self._producers[name].op_type == "DequantizeLinear"

    def scale_rank(self, name: str) -> int:
        """Return the rank of the scale that dequantizes `name`; 0 for a scalar or if unknown."""
        scale = self._producers[name].input[1]
        return len(self._tensors[scale].dims) if scale in self._tensors else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the weights behind `name`; () if they are not constant."""
        if self.is_dequantized(name):
            name = self._producers[name].input[0]
        return tuple(self._tensors[name].dims) if name in self._tensors else ()
