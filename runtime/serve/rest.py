"""The HTTP side of the server: the Open Inference Protocol, /predict and /metrics."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.errors import Outcome, RequestError, request_error
from runtime.serve.http_body import read_body, split_parts, unless_disconnected
from runtime.serve.inference import InferenceRequest, infer, model_metadata, timeout_of, top_k_of
from runtime.serve.metrics import CONTENT_TYPE
from runtime.serve.openapi import openapi_document
from runtime.serve.rest_format import JSON_LENGTH_HEADER, decode_request, encode_result, json_length, raw_request
from runtime.serve.state import EXTENSIONS, ServerState
from runtime.serve.tracing import request_span

__all__ = ["http_app"]

_Handler = Callable[[Request], Awaitable[Response]]
_RETRY_AFTER_S = "1"
_LARGE_JSON = 65_536
"""Bytes of JSON above which it is parsed in a thread: parsing takes about 10 ms per megabyte."""


def http_app(state: ServerState) -> ASGIApp:
    """Return the ASGI application of a server."""
    api = _Api(state)
    models = "/v2/models/{model}"
    routes: list[tuple[str, str, _Handler]] = [
        ("GET", "/v2", api.server_metadata),
        ("GET", "/v2/health/live", api.live),
        ("GET", "/v2/health/ready", api.ready),
        ("GET", "/v2/models", api.list_models),
        *(
            (method, f"{prefix}{suffix}", handler)
            for prefix in (models, f"{models}/versions/{{version}}")
            for method, suffix, handler in (
                ("GET", "", api.model_metadata),
                ("GET", "/ready", api.model_ready),
                ("POST", "/infer", api.infer),
            )
        ),
        ("POST", "/v2/repository/index", api.index),
        ("POST", "/v2/repository/models/{model}/load", api.load),
        ("POST", "/v2/repository/models/{model}/unload", api.unload),
        ("POST", "/predict", api.predict),
        ("GET", "/metrics", api.metrics),
        ("GET", "/openapi.json", api.openapi),
    ]
    app = Starlette(
        routes=[Route(path, _answering(handler), methods=[method]) for method, path, handler in routes],
        exception_handlers={HTTPException: _not_routed},
    )
    app.router.redirect_slashes = False
    return _Observed(app, state)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content).encode(), status, headers, "application/json")


def _error(error: RequestError) -> Response:
    status = error.outcome.http_status
    headers = {"retry-after": _RETRY_AFTER_S} if status == 503 else None
    return _json({"error": error.message}, status, headers)


def _answering(handler: _Handler) -> _Handler:
    """Return a handler that answers errors as the protocol describes."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            failure = request_error(error)
            request.scope["outcome"] = failure.outcome
            return _error(failure)

    return answer


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        request.scope["outcome"] = Outcome.WRONG_METHOD
        allowed = (error.headers or {}).get("Allow", "")
        return _json({"error": f"found {found}, expected {allowed}"}, 405, dict(error.headers or {}))
    request.scope["outcome"] = Outcome.NOT_FOUND
    return _json({"error": f"there is no {found}; /openapi.json lists what there is"}, error.status_code)


class _Api:
    """The handlers. Each reads the path's `model` and `version`, which may be missing."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._registry = state.registry
        self._openapi = json.dumps(openapi_document()).encode()

    async def live(self, request: Request) -> Response:
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        return _json({"ready": self._state.is_ready}, 200 if self._state.is_ready else 503)

    async def server_metadata(self, request: Request) -> Response:
        return _json({"name": "advprop", "version": metadata.version("advprop"), "extensions": list(EXTENSIONS)})

    async def list_models(self, request: Request) -> Response:
        return _json({"models": self._registry.names})

    async def model_metadata(self, request: Request) -> Response:
        self._state.check_loaded()
        model = self._registry.get(*_target(request))
        inputs, outputs, properties = model_metadata(model)
        tensors = [
            [{"name": info.name, "datatype": info.datatype, "shape": list(info.shape)} for info in part]
            for part in (inputs, outputs)
        ]
        content = {
            "name": model.name,
            "versions": self._registry.versions(model.name),
            "platform": "advprop",
            "inputs": tensors[0],
            "outputs": tensors[1],
            "properties": properties,
        }
        return _json(content)

    async def model_ready(self, request: Request) -> Response:
        name, version = _target(request)
        ready = self._registry.is_ready(name, version) and self._state.is_ready
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def index(self, request: Request) -> Response:
        states = self._registry.index()
        return _json(
            [{"name": one.name, "version": one.version, "state": one.state, "reason": one.reason} for one in states]
        )

    async def load(self, request: Request) -> Response:
        return await self._change(request, self._registry.load)

    async def unload(self, request: Request) -> Response:
        return await self._change(request, self._registry.unload)

    async def infer(self, request: Request) -> Response:
        self._state.check_loaded()
        name, version = _target(request)
        media = _media_type(request)
        if media not in ("", "application/json", "application/octet-stream", "application/x-www-form-urlencoded"):
            raise RequestError(
                Outcome.WRONG_MEDIA,
                f"found Content-Type {media[:60]!r}, expected application/json or application/octet-stream",
            )
        header = request.headers.get(JSON_LENGTH_HEADER)
        align_at = int(header) if header and header.isascii() and header.isdigit() and len(header) < 12 else 0
        async with read_body(request, self._state, align_at=align_at) as body:
            length = json_length(header, len(body))
            if length == 0:
                inference = raw_request(self._registry.get(name, version), version, body)
            elif (len(body) if length is None else length) > _LARGE_JSON:
                inference = await asyncio.to_thread(decode_request, name, version, body, length)
            else:
                inference = decode_request(name, version, body, length)
            result = await unless_disconnected(request, infer(self._registry, self._with_deadline(inference)))
        content, json_bytes = encode_result(result)
        if json_bytes is None:
            return Response(content, 200, None, "application/json")
        return Response(content, 200, {JSON_LENGTH_HEADER: str(json_bytes)}, "application/octet-stream")

    async def predict(self, request: Request) -> Response:
        self._state.check_loaded()
        name = request.query_params.get("model") or self._registry.default_name
        request.scope["model"] = name
        numbers = {key: _number(request, key) for key in ("top_k", "timeout") if key in request.query_params}
        media = _media_type(request)
        if media.startswith("text/") or media == "application/json":
            raise RequestError(
                Outcome.WRONG_MEDIA,
                f"found Content-Type {media[:60]!r}, expected the bytes of an image, or multipart/form-data",
            )
        async with read_body(request, self._state) as body:
            images = await split_parts(request, body) if media == "multipart/form-data" else [bytes(body)]
            session = self._registry.get(name, request.query_params.get("version", "")).session
            timeout_s = min(timeout_of(numbers), self._state.config.timeout_s)
            top_k = top_k_of(numbers)
            predictions = await unless_disconnected(request, session.apredict(images, timeout_s=timeout_s))
        answers = [
            {
                "label": prediction.label,
                "probability": prediction.probability,
                "classes": [best._asdict() for best in prediction.top(top_k)],
            }
            for prediction in predictions
        ]
        return _json({"model": name, "predictions": answers})

    async def metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self._state.metrics.render), 200, None, CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return Response(self._openapi, 200, None, "application/json")

    async def _change(self, request: Request, change: Callable[[str], None]) -> Response:
        """Load or unload a model. The answer follows when that is done."""
        self._state.check_loaded()
        name, _ = _target(request)
        if self._state.config.workers > 1:
            raise RequestError(
                Outcome.UNSUPPORTED,
                "a server with several workers cannot load or unload models on request; start it with --watch",
            )
        async with read_body(request, self._state) as body:
            try:
                parameters = (json.loads(bytes(body)) or {}).get("parameters") if len(body) else None
            except (ValueError, AttributeError, RecursionError) as error:
                raise RequestError(Outcome.INVALID, "the body is neither empty nor a JSON object") from error
            if parameters and set(parameters) - {"unload_dependents"}:
                raise RequestError(Outcome.INVALID, "a configuration or files in the request are not supported")
        await asyncio.to_thread(change, name)
        return _json({"name": name, "ok": True})

    def _with_deadline(self, request: InferenceRequest) -> InferenceRequest:
        from dataclasses import replace

        return replace(request, timeout_s=min(request.timeout_s, self._state.config.timeout_s))


def _target(request: Request) -> tuple[str, str]:
    """Return model and version of the path, and note the model for metrics and log."""
    name, version = request.path_params["model"], request.path_params.get("version", "")
    request.scope["model"] = name
    return name, version


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _number(request: Request, key: str) -> int:
    text = request.query_params[key]
    if not (text.isascii() and text.isdigit()) or len(text) > 15:
        raise RequestError(Outcome.INVALID, f"{key}: found {text[:60]!r}, expected a whole number")
    return int(text)


class _Observed:
    """Counts requests, logs them, and asks clients to reconnect while the server is draining."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        sent = {"status": 0, "bytes": 0}

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                if self._state.is_draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            else:
                sent["bytes"] += len(message.get("body", b""))
            async with asyncio.timeout(self._state.config.receive_s):  # the client may stop reading
                await send(message)

        self._state.metrics.started()
        headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        with request_span(headers) as span:
            try:
                await self._app(scope, receive, observe)
            except TimeoutError:
                scope["outcome"] = Outcome.SLOW_CLIENT
            finally:
                seconds = time.monotonic() - started_s
                outcome = scope.get("outcome", Outcome.OK)
                self._state.metrics.ended(scope.get("model", ""), "http", outcome, seconds)
                if self._state.config.access_log:
                    _log(scope, outcome, seconds, sent)
                span.end(*_described(scope, outcome, sent["status"]))


def _described(scope: Scope, outcome: Outcome, status: int) -> tuple[str, Outcome, dict[str, str | int]]:
    """Return name, outcome and attributes of a span, named as OpenTelemetry's conventions require."""
    route = getattr(scope.get("route"), "path", "")
    attributes: dict[str, str | int] = {
        "http.request.method": scope["method"],
        "http.response.status_code": status,
        "http.route": route,
        "url.path": scope["path"],
        "advprop.model": scope.get("model", ""),
    }
    return f"{scope['method']} {route}".strip(), outcome, attributes


def _log(scope: Scope, outcome: Outcome, seconds: float, sent: dict[str, int]) -> None:
    line = {
        "time": time.time(),
        "protocol": "http",
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": scope["path"],
        "model": scope.get("model", ""),
        "status": sent["status"],
        "outcome": outcome.label,
        "seconds": round(seconds, 6),
        "bytes_sent": sent["bytes"],
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
