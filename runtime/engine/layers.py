"""Read the list of an engine's layers from the builder.

TensorRT-RTX logs the list during a DETAILED build, which needs no GPU. Full TensorRT provides the
same facts as JSON through its engine inspector, which needs the GPU that the engine was built for.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt

__all__ = ["LISTING", "EngineLayer", "EngineTensor", "inspected_layers", "layers_of_json", "layers_of_log"]

LISTING = "Layers:\n"
"""Start of the log message in which TensorRT-RTX lists the layers."""

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
# Names of types in TensorRT-RTX's list, and in the engine inspector's JSON.
_TYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8"}
_FORMAT_WORDS = {"Int8": "int8", "FP16": "fp16", "Half": "fp16", "BF16": "bf16", "FP32": "fp32", "Float": "fp32"}

_NODES = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[ONNX|$)")
_LAYER = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*, Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[([-\d,]*)\], .*?Datatype: (\w+)")


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """An input, constant or output of a layer."""

    type: str
    """`fp32`, `fp16`, `bf16` or `int8`; TensorRT's name for other types."""
    shape: tuple[int, ...]
    """Shape in the engine, including padding. A dynamic batch is -1; () if unknown."""

    @property
    def bytes(self) -> int:
        """Bytes per image; 0 for shape tensors and other types."""
        return _BYTES.get(self.type, 0) * math.prod(abs(size) for size in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One kernel, or one group of kernels."""

    name: str
    """The engine's name for it."""
    kind: str
    """TensorRT's type name, such as `gemm`, `kgen` (elementwise code) or `CaskConvolution`."""
    inputs: tuple[EngineTensor, ...]
    """Input activations."""
    constants: tuple[EngineTensor, ...]
    """Weights, scales and biases."""
    outputs: tuple[EngineTensor, ...]
    """Output activations."""
    nodes: frozenset[str]
    """ONNX nodes that it computes, completely or partly."""

    @property
    def moved_bytes(self) -> int:
        """Bytes of activations that it reads and writes per image."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))


def layers_of_log(listing: str) -> list[EngineLayer]:
    """Parse the list that TensorRT-RTX logs. Return [] for another format than that of 1.7."""
    found = [_LAYER.fullmatch(line) for line in listing.removeprefix(LISTING).split("\n")]
    return [
        EngineLayer(
            name=match["name"],
            kind=match["kind"],
            inputs=_tensors_of_log(match["inputs"]),
            constants=_tensors_of_log(match["constants"]),
            outputs=_tensors_of_log(match["outputs"]),
            nodes=frozenset(_NODES.findall(match["metadata"])),
        )
        for match in found
        if match
    ]


def _tensors_of_log(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(_TYPES.get(kind, kind), tuple(int(size) for size in sizes.split(",") if size))
        for sizes, kind in _TENSOR.findall(text)
    )


def inspected_layers(trt: Any, logger: Any, plan: memoryview, *, host_code: bool = False) -> list[EngineLayer]:
    """Return the layers from the engine inspector, or [] if the plan cannot be deserialized here.

    The function follows the API and NVIDIA's published examples. It has not run on a GPU yet.

    Args:
        trt: the TensorRT module that built the plan.
        logger: its logger.
        plan: the serialized engine.
        host_code: whether the plan contains code for the CPU, as version-compatible plans do.
    """
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return layers_of_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layers_of_json(text: str) -> list[EngineLayer]:
    """Parse the engine inspector's JSON. Return [] if it is not JSON or has no details."""
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return []
    return [
        EngineLayer(
            name=str(entry.get("Name", "")),
            kind=str(entry.get("LayerType", "")),
            inputs=_tensors_of_json(entry.get("Inputs")),
            constants=_tensors_of_json(entry.get("Constants")) or _weights_of_json(entry.get("Weights")),
            outputs=_tensors_of_json(entry.get("Outputs")),
            nodes=frozenset(_NODES.findall(str(entry.get("Metadata", "")))),
        )
        for entry in entries
        if isinstance(entry, dict)
    ]


def _tensors_of_json(entries: Any) -> tuple[EngineTensor, ...]:
    """Return the tensors. Up to TensorRT 10 their type is a word in a description."""
    return tuple(
        EngineTensor(
            _type_in(str(entry.get("Datatype") or entry.get("Format/Datatype", ""))), tuple(entry.get("Dimensions", ()))
        )
        for entry in entries or ()
        if isinstance(entry, dict)
    )


def _weights_of_json(entry: Any) -> tuple[EngineTensor, ...]:
    return (EngineTensor(_type_in(str(entry.get("Type", ""))), ()),) if isinstance(entry, dict) else ()


def _type_in(text: str) -> str:
    return next((name for word, name in _FORMAT_WORDS.items() if word in text), text)
