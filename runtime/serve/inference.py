"""Run a request on a model: the part that HTTP and gRPC share.

A request has one input: the preprocessed tensor that the model file declares, or encoded images as
a BYTES tensor named `image`, which are preprocessed as the file describes. Its outputs are those of
the file, and for files with a spec `label`, `probability` and `class`.

Shape suffixes: N images, K classes.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import SessionClosed
from runtime.prediction import predictions_of
from runtime.serve.errors import Outcome, RequestError
from runtime.serve.models import Registry, ServedModel
from runtime.serve.tensors import BYTES, BytesTensor, Tensor, datatype_of
from runtime.session import Session

__all__ = [
    "IMAGE_INPUT",
    "InferenceInput",
    "InferenceRequest",
    "InferenceResult",
    "OutputRequest",
    "OutputTensor",
    "TensorMetadata",
    "infer",
    "model_metadata",
    "timeout_of",
    "top_k_of",
]

IMAGE_INPUT = "image"
"""Name of the input for encoded images."""
_CLASS_OUTPUTS = {"label": BYTES, "probability": "FP32", "class": "INT64"}
"""Outputs of files with a spec → their datatypes."""


@dataclass(frozen=True, slots=True)
class InferenceInput:
    """A tensor of a request."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """An output that the client requests."""

    name: str
    binary: bool = False
    """Whether HTTP returns it in the binary form."""
    classification: int = 0
    """If above 0: return this many classes as BYTES, "value:index:label", as Triton does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """An inference request."""

    model: str
    version: str
    inputs: tuple[InferenceInput, ...]
    id: str = ""
    outputs: tuple[OutputRequest, ...] = ()
    """Empty: all outputs of the file, or the class outputs for encoded images."""
    binary_outputs: bool = False
    """Whether HTTP returns outputs in the binary form that are not in `outputs`."""
    timeout_s: float = math.inf
    top_k: int = 1
    """Classes per image in the class outputs."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of an answer."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Tensor
    binary: bool = False


@dataclass(frozen=True, slots=True)
class InferenceResult:
    """The answer to a request."""

    model: str
    version: str
    id: str
    outputs: list[OutputTensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output of a model. A dynamic size is -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


async def infer(registry: Registry, request: InferenceRequest) -> InferenceResult:
    """Run a request. Canceling the task cancels the request.

    Raises:
        RequestError: the request does not fit the model.
        AdvPropError: the request failed; see `Session.submit` and `Session.submit_predict`.
    """
    while True:
        model = registry.get(request.model, request.version)
        try:
            future = _submit(model.session, request)
            break
        except SessionClosed:  # replaced after `get`
            if model in registry.loaded():
                raise
    outputs = await asyncio.wrap_future(future)
    return InferenceResult(model.name, model.version, request.id, _answer(model.session, request, outputs))


def model_metadata(model: ServedModel) -> tuple[list[TensorMetadata], list[TensorMetadata], dict[str, str]]:
    """Return a model's inputs, its outputs, and properties that the protocol has no field for."""
    backend = model.session.backend
    inputs = [TensorMetadata(backend.input.name, datatype_of(backend.input.dtype), backend.input.shape)]
    outputs = [TensorMetadata(info.name, datatype_of(info.dtype), info.shape) for info in backend.outputs]
    properties = {"backend": backend.name, "device": backend.device}
    if backend.spec is not None:
        properties |= {
            "arch": backend.spec.arch,
            "classes": str(len(backend.spec.classes)),
            "encoded_images": f"instead of {backend.input.name}: {IMAGE_INPUT}, BYTES of shape [-1]",
            "class_outputs": ", ".join(f"{name} {datatype}" for name, datatype in _CLASS_OUTPUTS.items()),
        }
    return inputs, outputs, properties


def timeout_of(parameters: dict[str, Any]) -> float:
    """Return the deadline in seconds of a request's `timeout`, in microseconds; 0 means none.

    Raises:
        RequestError: it is no whole number of at least 0.
    """
    timeout_us = parameters.get("timeout", 0)
    if type(timeout_us) is not int or timeout_us < 0:
        raise RequestError(
            Outcome.INVALID, f"timeout: found {str(timeout_us)[:60]!r}, expected a whole number of microseconds"
        )
    return timeout_us * 1e-6 if timeout_us else math.inf


def top_k_of(parameters: dict[str, Any]) -> int:
    """Return the number of classes per image, the parameter `top_k`.

    Raises:
        RequestError: it is no whole number of at least 1.
    """
    top_k = parameters.get("top_k", 1)
    if type(top_k) is not int or top_k < 1:
        raise RequestError(Outcome.INVALID, f"top_k: found {str(top_k)[:60]!r}, expected a whole number of at least 1")
    return top_k


def _submit(session: Session, request: InferenceRequest) -> Future[dict[str, NDArray[Any]]]:
    expected = session.backend.input
    has_spec = session.backend.spec is not None
    if len(request.inputs) != 1:
        raise RequestError(Outcome.INVALID, f"found {len(request.inputs)} inputs, expected one: {expected}")
    (given,) = request.inputs
    _check_outputs(session, request)
    images = f", or {IMAGE_INPUT}: BYTES (any) with encoded images" if has_spec else ""
    if isinstance(given.data, np.ndarray):
        if given.name != expected.name:
            raise RequestError(Outcome.INVALID, f"found an input {given.name[:60]!r}, expected {expected}{images}")
        return session.submit_outputs(given.data, timeout_s=request.timeout_s)
    if not has_spec or given.name not in (IMAGE_INPUT, expected.name):
        raise RequestError(
            Outcome.INVALID, f"found an input {given.name[:60]!r} of datatype BYTES, expected {expected}{images}"
        )
    if not (len(given.shape) == 1 or (len(given.shape) == 2 and given.shape[1] == 1)):
        raise RequestError(
            Outcome.INVALID, f"found encoded images of shape {list(given.shape)}, expected [N] or [N, 1]"
        )
    return session.submit_images(given.data, timeout_s=request.timeout_s)


def _check_outputs(session: Session, request: InferenceRequest) -> None:
    of_file = [info.name for info in session.backend.outputs]
    derived = [] if session.backend.spec is None else [name for name in _CLASS_OUTPUTS if name not in of_file]
    for output in request.outputs:
        if output.name not in (*of_file, *derived):
            expected = ", ".join((*of_file, *derived))
            raise RequestError(Outcome.INVALID, f"there is no output {output.name[:60]!r}; expected some of {expected}")
        if output.classification and output.name in derived:
            raise RequestError(
                Outcome.INVALID, f"classification applies to {', '.join(of_file)}, not to {output.name}; use top_k"
            )


def _answer(session: Session, request: InferenceRequest, outputs: dict[str, NDArray[Any]]) -> list[OutputTensor]:
    wanted = request.outputs
    if not wanted:
        encoded = not isinstance(request.inputs[0].data, np.ndarray)
        wanted = tuple(OutputRequest(name, request.binary_outputs) for name in (_CLASS_OUTPUTS if encoded else outputs))
    derived: dict[str, OutputTensor] = {}
    answer = []
    for output in wanted:
        if output.name in outputs:
            array = outputs[output.name]
            if output.classification:
                answer.append(_classification(session, output, array))
            else:
                answer.append(OutputTensor(output.name, datatype_of(array.dtype), array.shape, array, output.binary))
        else:
            derived = derived or _classes(session, outputs, request.top_k)
            found = derived[output.name]
            answer.append(OutputTensor(found.name, found.datatype, found.shape, found.data, output.binary))
    return answer


def _classes(session: Session, outputs: dict[str, NDArray[Any]], top_k: int) -> dict[str, OutputTensor]:
    """Return the class outputs, of shape (N,), or (N, top_k) for several classes per image."""
    spec = session.spec
    ranked = [prediction.top(top_k) for prediction in predictions_of(tuple(outputs.values()), spec)]
    count = len(ranked[0])
    shape = (len(ranked),) if top_k == 1 else (len(ranked), count)
    indices = np.array([best.index for image in ranked for best in image], np.int64)
    probabilities = np.array([best.probability for image in ranked for best in image], np.float32)
    data: dict[str, Tensor] = {
        "label": [best.label.encode() for image in ranked for best in image],
        "probability": probabilities.reshape(shape),
        "class": indices.reshape(shape),
    }
    return {name: OutputTensor(name, datatype, shape, data[name]) for name, datatype in _CLASS_OUTPUTS.items()}


def _classification(session: Session, output: OutputRequest, values_NK: NDArray[Any]) -> OutputTensor:
    """Return the largest values as "value:index:label", as Triton's classification extension does."""
    spec = session.backend.spec
    labels = spec.classes if spec is not None and len(spec.classes) == values_NK.shape[-1] else ()
    count = min(output.classification, values_NK.shape[-1])
    texts: BytesTensor = []
    for values_K in values_NK:
        for index in (-values_K).argsort(kind="stable")[:count]:
            label = f":{labels[index]}" if labels else ""
            texts.append(f"{values_K[index]:f}:{index}{label}".encode())
    return OutputTensor(output.name, BYTES, (len(values_NK), count), texts, output.binary)
