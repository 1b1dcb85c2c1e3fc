"""Bodies of HTTP requests and answers: JSON, and the binary tensor extension."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.serve.errors import Outcome, RequestError
from runtime.serve.inference import (
    IMAGE_INPUT,
    InferenceInput,
    InferenceRequest,
    InferenceResult,
    OutputRequest,
    OutputTensor,
    timeout_of,
    top_k_of,
)
from runtime.serve.models import ServedModel
from runtime.serve.tensors import (
    BYTES,
    BytesTensor,
    array_from_buffer,
    array_from_json,
    bytes_from_buffer,
    bytes_to_buffer,
    check_shape,
    datatype_of,
    dtype_of,
)

__all__ = ["JSON_LENGTH_HEADER", "decode_request", "encode_result", "json_length", "raw_request"]

JSON_LENGTH_HEADER = "inference-header-content-length"
"""Header with the length of the JSON before binary tensors, in bytes; 0 for a raw body."""


def json_length(header: str | None, body_length: int) -> int | None:
    """Return the length of the JSON in a body; None without binary tensors.

    Raises:
        RequestError: the header is no number, or exceeds the body.
    """
    if header is None:
        return None
    if not (header.isascii() and header.isdigit()) or len(header) > 18 or int(header) > body_length:
        raise RequestError(
            Outcome.INVALID,
            f"Inference-Header-Content-Length: found {header[:60]!r}, expected the length of the JSON, at most "
            f"{body_length} bytes",
        )
    return int(header)


def raw_request(model: ServedModel, version: str, body: memoryview) -> InferenceRequest:
    """Return the request of a body without JSON: one image for the model, or one encoded image.

    A body of exactly the size of one input is the tensor; any other body is an encoded image if the
    model has a spec.

    Raises:
        RequestError: the model accepts neither.
    """
    expected = model.session.backend.input
    image = expected.shape[1:]
    given: InferenceInput
    if -1 not in image and len(body) == math.prod(image) * expected.dtype.itemsize:
        shape = (1, *image)
        array = array_from_buffer(expected.name, body, expected.dtype, shape)
        given = InferenceInput(expected.name, datatype_of(expected.dtype), shape, array)
    elif model.session.backend.spec is not None:
        given = InferenceInput(IMAGE_INPUT, BYTES, (1,), [bytes(body)])
    else:
        raise RequestError(Outcome.INVALID, f"found a raw body of {len(body)} bytes, expected one image for {expected}")
    return InferenceRequest(model=model.name, version=version, inputs=(given,), binary_outputs=True)


def decode_request(name: str, version: str, body: memoryview, header_length: int | None) -> InferenceRequest:
    """Read the body of an inference request.

    Args:
        name: the model.
        version: its version, or "".
        body: the whole body.
        header_length: length of the JSON if binary tensors follow it; otherwise None.

    Raises:
        RequestError: the body is no request of the protocol.
    """
    length = len(body) if header_length is None else header_length
    content = _object(_parse(body[:length]), "the request")
    parameters = _object(content.get("parameters", {}), "parameters")
    inputs, rest = [], body[length:]
    for item in _list(content.get("inputs"), "inputs"):
        tensor = _object(item, "an input")
        given, rest = _read_input(tensor, rest, is_binary=header_length is not None)
        inputs.append(given)
    if len(rest):
        raise RequestError(Outcome.INVALID, f"{len(rest)} bytes follow the tensors that the JSON declares")
    identity = content.get("id", "")
    if not isinstance(identity, str):
        raise RequestError(Outcome.INVALID, f"id: found {str(identity)[:60]!r}, expected a string")
    binary = _flag(parameters, "binary_data_output", False)
    outputs = tuple(_read_output(item, binary) for item in _list(content.get("outputs", []), "outputs"))
    return InferenceRequest(
        model=name,
        version=version,
        inputs=tuple(inputs),
        id=identity,
        outputs=outputs,
        binary_outputs=binary,
        timeout_s=timeout_of(parameters),
        top_k=top_k_of(parameters),
    )


def encode_result(result: InferenceResult) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if binary tensors follow it."""
    tensors, parts = [], []
    for output in result.outputs:
        described: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if output.binary:
            part = _binary_data(output)
            described["parameters"] = {"binary_data_size": len(part)}
            parts.append(part)
        else:
            described["data"] = _json_data(output)
        tensors.append(described)
    content = {"model_name": result.model, "model_version": result.version, "outputs": tensors}
    if result.id:
        content["id"] = result.id
    try:
        text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise RequestError(
            Outcome.FAILED, "the outputs contain NaN or infinity, which JSON cannot express; request binary_data"
        ) from error
    return (b"".join((text, *parts)), len(text)) if parts else (text, None)


def _binary_data(output: OutputTensor) -> bytes | memoryview:
    if isinstance(output.data, np.ndarray):
        return np.ascontiguousarray(output.data).reshape(-1).view(np.uint8).data
    return bytes_to_buffer(output.data)


def _json_data(output: OutputTensor) -> list[Any]:
    if isinstance(output.data, np.ndarray):
        values: list[Any] = output.data.reshape(-1).tolist()
        return values
    return [element.decode(errors="replace") for element in output.data]


def _parse(text: memoryview) -> Any:
    try:
        return json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise RequestError(Outcome.INVALID, f"the body is not JSON: {reason}") from error


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(Outcome.INVALID, f"{what}: found {_kind(value)}, expected an object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(Outcome.INVALID, f"{what}: found {_kind(value)}, expected a list")
    return value


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _flag(parameters: Mapping[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise RequestError(Outcome.INVALID, f"{key}: found {str(value)[:60]!r}, expected true or false")
    return value


def _name(item: Mapping[str, Any], what: str) -> str:
    name = item.get("name")
    if not isinstance(name, str):
        raise RequestError(Outcome.INVALID, f"the name of {what}: found {_kind(name)}, expected a string")
    return name


def _read_output(item: object, binary: bool) -> OutputRequest:
    output = _object(item, "an output")
    parameters = _object(output.get("parameters", {}), "parameters of an output")
    count = parameters.get("classification", 0)
    if type(count) is not int or count < 0:
        raise RequestError(Outcome.INVALID, f"classification: found {str(count)[:60]!r}, expected a number of classes")
    if "shared_memory_region" in parameters:
        raise RequestError(Outcome.INVALID, "shared memory is not supported")
    return OutputRequest(_name(output, "an output"), _flag(parameters, "binary_data", binary), count)


def _read_input(item: Mapping[str, Any], rest: memoryview, *, is_binary: bool) -> tuple[InferenceInput, memoryview]:
    """Return a tensor, and the binary data after it."""
    name = _name(item, "an input")
    shape = check_shape(name, item.get("shape"))
    datatype = item.get("datatype")
    parameters = _object(item.get("parameters", {}), f"parameters of tensor {name!r}")
    dtype = None if datatype == BYTES else dtype_of(name, datatype)
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in item:
            raise RequestError(Outcome.INVALID, f"tensor {name!r} has neither data nor binary_data_size")
        data = item["data"]
        tensor = _images(name, data, shape) if dtype is None else array_from_json(name, data, dtype, shape)
        return InferenceInput(name, str(datatype), shape, tensor), rest
    if not is_binary:
        raise RequestError(Outcome.INVALID, "binary_data_size needs the header Inference-Header-Content-Length")
    if "data" in item:
        raise RequestError(Outcome.INVALID, f"tensor {name!r} has both data and binary_data_size")
    if type(size) is not int or not 0 <= size <= len(rest):
        raise RequestError(
            Outcome.INVALID,
            f"tensor {name!r}: found binary_data_size {str(size)[:60]}, but {len(rest)} bytes are left of the body",
        )
    part = rest[:size]
    if dtype is None:
        return InferenceInput(name, BYTES, shape, bytes_from_buffer(name, part, shape)), rest[size:]
    return InferenceInput(name, str(datatype), shape, array_from_buffer(name, part, dtype, shape)), rest[size:]


def _images(name: str, data: object, shape: tuple[int, ...]) -> BytesTensor:
    """Decode the elements of a BYTES tensor in JSON: encoded images in base64."""
    elements = _flat(data)
    if len(elements) != math.prod(shape):
        raise RequestError(Outcome.INVALID, f"tensor {name!r}: found {len(elements)} elements, but shape {list(shape)}")
    decoded = []
    for element in elements:
        text = element.get("b64") if isinstance(element, dict) else element
        try:
            if not isinstance(text, str):
                raise ValueError(f"found {_kind(text)}")
            decoded.append(base64.b64decode(text, validate=True))
        except (ValueError, binascii.Error) as error:
            raise RequestError(
                Outcome.INVALID, f"tensor {name!r}: BYTES in JSON are strings of base64 ({str(error)[:80]})"
            ) from error
    return decoded


def _flat(data: object) -> Sequence[Any]:
    if not isinstance(data, list):
        return [data]
    return [element for row in data for element in (row if isinstance(row, list) else [row])]
