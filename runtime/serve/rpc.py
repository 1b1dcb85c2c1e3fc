"""The gRPC side of the server: the service `inference.GRPCInferenceService`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any, NoReturn, TypeVar

import grpc
import numpy as np
from open_inference.grpc import protocol, service

from runtime.serve.errors import Outcome, RequestError, request_error
from runtime.serve.inference import (
    InferenceInput,
    InferenceRequest,
    InferenceResult,
    OutputRequest,
    infer,
    model_metadata,
    timeout_of,
    top_k_of,
)
from runtime.serve.state import EXTENSIONS, ServerState
from runtime.serve.tensors import (
    BYTES,
    Tensor,
    array_from_buffer,
    array_from_json,
    bytes_from_buffer,
    bytes_to_buffer,
    check_shape,
    dtype_of,
)
from runtime.serve.tracing import request_span

__all__ = ["start_grpc_server"]

_Answer = TypeVar("_Answer")
_SERVICE = "inference.GRPCInferenceService"
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Datatype → field of typed contents. FP16 has none."""


async def start_grpc_server(state: ServerState, address: str) -> tuple[grpc.aio.Server, int]:
    """Start to listen, and return the server and its port.

    Raises:
        RuntimeError: the address cannot be used.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", state.config.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", state.config.max_header_bytes),
            ("grpc.so_reuseport", int(state.config.workers > 1)),
        ],
    )
    service.add_GRPCInferenceServiceServicer_to_server(_Servicer(state), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port


class _Servicer(service.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated without types
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._registry = state.registry

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return protocol.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return protocol.ServerReadyResponse(ready=self._state.is_ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return protocol.ServerMetadataResponse(
            name="advprop", version=metadata.version("advprop"), extensions=list(EXTENSIONS)
        )

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        async def answer() -> Any:
            ready = self._registry.is_ready(request.name, request.version) and self._state.is_ready
            return protocol.ModelReadyResponse(ready=ready)

        return await self._answering("ModelReady", answer(), context, request.name)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        async def answer() -> Any:
            self._state.check_loaded()
            model = self._registry.get(request.name, request.version)
            inputs, outputs, properties = model_metadata(model)
            described = [
                [
                    protocol.ModelMetadataResponse.TensorMetadata(
                        name=info.name, datatype=info.datatype, shape=info.shape
                    )
                    for info in part
                ]
                for part in (inputs, outputs)
            ]
            return protocol.ModelMetadataResponse(
                name=model.name,
                versions=self._registry.versions(model.name),
                platform="advprop",
                inputs=described[0],
                outputs=described[1],
                properties=properties,
            )

        return await self._answering("ModelMetadata", answer(), context, request.name)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answering("ModelInfer", self._infer(request, context), context, request.model_name)

    async def _infer(self, request: Any, context: Any) -> Any:
        self._state.check_loaded()
        with self._state.memory_for(request.ByteSize()):
            inference = _decode(request)
            remaining_s = context.time_remaining()
            limits = [
                inference.timeout_s,
                self._state.config.timeout_s,
                *([] if remaining_s is None else [remaining_s]),
            ]
            result = await infer(self._registry, replace(inference, timeout_s=min(limits)))
        return _encode(result)

    async def _answering(self, method: str, work: Awaitable[_Answer], context: Any, model: str) -> _Answer:
        """Await an answer, count it, and convert its error to a status of gRPC."""
        metrics, started_s, outcome = self._state.metrics, time.monotonic(), Outcome.OK
        metrics.started()
        headers = ((key, value) for key, value in context.invocation_metadata() if isinstance(value, str))
        with request_span(headers) as span:
            try:
                return await work
            except asyncio.CancelledError:  # the client left
                outcome = Outcome.CANCELLED
                raise
            except Exception as error:
                failure = request_error(error)
                outcome = failure.outcome
                await _abort(context, failure)
            finally:
                seconds = time.monotonic() - started_s
                metrics.ended(model, "grpc", outcome, seconds)
                if self._state.config.access_log:
                    _log(context, model, outcome, seconds)
                attributes = {"rpc.system.name": "grpc", "advprop.model": model}
                span.end(f"{_SERVICE}/{method}", outcome, attributes)


async def _abort(context: Any, failure: RequestError) -> NoReturn:
    await context.abort(grpc.StatusCode[failure.outcome.grpc_status], failure.message)
    raise AssertionError("abort raises")


def _decode(request: Any) -> InferenceRequest:
    """Convert a request.

    Raises:
        RequestError: it is invalid.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            Outcome.INVALID, f"found {len(raw)} raw_input_contents, but {len(request.inputs)} inputs; expected one each"
        )
    inputs = tuple(_input(tensor, raw[index] if raw else None) for index, tensor in enumerate(request.inputs))
    parameters = _parameters(request.parameters)
    outputs = []
    for output in request.outputs:
        count = _parameters(output.parameters).get("classification", 0)
        if type(count) is not int or count < 0:
            raise RequestError(
                Outcome.INVALID, f"classification: found {str(count)[:60]!r}, expected a number of classes"
            )
        outputs.append(OutputRequest(output.name, True, count))
    return InferenceRequest(
        model=request.model_name,
        version=request.model_version,
        inputs=inputs,
        id=request.id,
        outputs=tuple(outputs),
        binary_outputs=True,
        timeout_s=timeout_of(parameters),
        top_k=top_k_of(parameters),
    )


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for key, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        values[key] = getattr(parameter, kind) if kind else None
    return values


def _input(tensor: Any, raw: bytes | None) -> InferenceInput:
    name = tensor.name
    shape = check_shape(name, list(tensor.shape))
    data: Tensor
    if raw is not None:
        if tensor.HasField("contents"):
            raise RequestError(Outcome.INVALID, f"tensor {name!r} has contents next to raw_input_contents")
        if tensor.datatype == BYTES:
            data = bytes_from_buffer(name, memoryview(raw), shape)
        else:
            data = array_from_buffer(name, raw, dtype_of(name, tensor.datatype), shape)
        return InferenceInput(name, tensor.datatype, shape, data)
    if tensor.datatype not in _CONTENTS:
        dtype_of(name, tensor.datatype)  # raises for unknown datatypes
        raise RequestError(Outcome.INVALID, f"tensor {name!r}: {tensor.datatype} needs raw_input_contents")
    contents = getattr(tensor.contents, _CONTENTS[tensor.datatype])
    if tensor.datatype == BYTES:
        data = list(contents)
        if len(data) != int(np.prod(shape)):
            raise RequestError(Outcome.INVALID, f"tensor {name!r}: found {len(data)} elements, but shape {list(shape)}")
    else:
        data = array_from_json(name, list(contents), dtype_of(name, tensor.datatype), shape)
    return InferenceInput(name, tensor.datatype, shape, data)


def _encode(result: InferenceResult) -> Any:
    answer = protocol.ModelInferResponse(model_name=result.model, model_version=result.version, id=result.id)
    for output in result.outputs:
        answer.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        data = output.data
        answer.raw_output_contents.append(data.tobytes() if isinstance(data, np.ndarray) else bytes_to_buffer(data))
    return answer


def _log(context: Any, model: str, outcome: Outcome, seconds: float) -> None:
    line = {
        "time": time.time(),
        "protocol": "grpc",
        "client": context.peer(),
        "model": model,
        "status": outcome.grpc_status,
        "outcome": outcome.label,
        "seconds": round(seconds, 6),
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
