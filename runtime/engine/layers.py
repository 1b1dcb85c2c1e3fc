"""What an engine is made of, by the builder's own account.

TensorRT-RTX logs the listing of a DETAILED build, which needs no GPU; full TensorRT gives the same facts
as JSON through its engine inspector, which needs the GPU that the engine is for.
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
"""How the message of TensorRT-RTX's log begins that lists the layers."""

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_TYPES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8"}  # of layers of the compiler backend
_WORDS = {"Int8": "int8", "FP16": "fp16", "Half": "fp16", "BF16": "bf16", "FP32": "fp32", "Float": "fp32"}

_NODES = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[ONNX|$)")
_LAYER = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*, Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[([-\d,]*)\], .*?Datatype: (\w+)")


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor that a layer reads or gives."""

    type: str
    """`fp32`, `fp16`, `bf16` or `int8`; another type as TensorRT calls it."""
    shape: tuple[int, ...]
    """As the engine holds it, padding included; -1 where the batch is open, () where unknown."""

    @property
    def bytes(self) -> int:
        """Of one image; 0 for shapes and the like."""
        return _BYTES.get(self.type, 0) * math.prod(abs(size) for size in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One kernel, or one group of kernels."""

    name: str
    """The engine's name for it."""
    kind: str
    """TensorRT's word: `correlation`, `gemm`, `kgen` (elementwise code), `CaskConvolution`, …"""
    inputs: tuple[EngineTensor, ...]
    """Activations."""
    constants: tuple[EngineTensor, ...]
    """Weights, scales, biases."""
    outputs: tuple[EngineTensor, ...]
    """Activations."""
    nodes: frozenset[str]
    """ONNX nodes that it does, wholly or partly."""

    @property
    def moved(self) -> int:
        """Bytes of activations that it reads and writes for one image."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))


def layers_of_log(listing: str) -> list[EngineLayer]:
    """Reads the listing that TensorRT-RTX logs; nothing where it is not as TensorRT-RTX 1.7 writes it."""
    found = [_LAYER.fullmatch(line) for line in listing.removeprefix(LISTING).split("\n")]
    return [
        EngineLayer(
            name=match["name"],
            kind=match["kind"],
            inputs=_tensors(match["inputs"]),
            constants=_tensors(match["constants"]),
            outputs=_tensors(match["outputs"]),
            nodes=frozenset(_NODES.findall(match["metadata"])),
        )
        for match in found
        if match
    ]


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(_TYPES.get(kind, kind), tuple(int(size) for size in sizes.split(",") if size))
        for sizes, kind in _TENSOR.findall(text)
    )


def inspected_layers(trt: Any, logger: Any, plan: memoryview, *, host_code: bool = False) -> list[EngineLayer]:
    """Asks the engine inspector; nothing where the plan cannot be deserialized here.

    Args:
        trt: the TensorRT that built it.
        logger: its logger.
        plan: the engine, fresh from the builder.
        host_code: whether it carries code for the CPU, as version-compatible plans do.

    Written against the API and NVIDIA's published examples; never run, for want of a GPU that full TensorRT takes.
    """
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return layers_of_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layers_of_json(text: str) -> list[EngineLayer]:
    """Reads what an engine inspector says of a DETAILED engine; nothing where it only has names, or is no JSON."""
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return []
    return [
        EngineLayer(
            name=str(entry.get("Name", "")),
            kind=str(entry.get("LayerType", "")),
            inputs=_described(entry.get("Inputs")),
            constants=_described(entry.get("Constants")) or _weights(entry.get("Weights")),
            outputs=_described(entry.get("Outputs")),
            nodes=frozenset(_NODES.findall(str(entry.get("Metadata", "")))),
        )
        for entry in entries
        if isinstance(entry, dict)
    ]


def _described(entries: Any) -> tuple[EngineTensor, ...]:
    """Tensors; their type is a word of its own or, up to TensorRT 10, one in the description of the format."""
    return tuple(
        EngineTensor(
            _worded(str(entry.get("Datatype") or entry.get("Format/Datatype", ""))), tuple(entry.get("Dimensions", ()))
        )
        for entry in entries or ()
        if isinstance(entry, dict)
    )


def _weights(entry: Any) -> tuple[EngineTensor, ...]:
    return (EngineTensor(_worded(str(entry.get("Type", ""))), ()),) if isinstance(entry, dict) else ()


def _worded(text: str) -> str:
    return next((name for word, name in _WORDS.items() if word in text), text)
