"""The OpenAPI document of the server's HTTP side."""

from __future__ import annotations

from importlib import metadata
from typing import Any

__all__ = ["openapi_document"]

_ERRORS = {
    "400": "The request is invalid; `error` states what was found and what is expected.",
    "404": "There is no such model or version.",
    "405": "The path has other methods.",
    "408": "The body did not arrive in time.",
    "413": "The body exceeds the limit.",
    "415": "The type or encoding of the body is not supported.",
    "422": "An image cannot be decoded, or exceeds the limit of pixels.",
    "499": "The client disconnected.",
    "500": "The model failed.",
    "501": "Not possible with several workers.",
    "503": "Not ready, overloaded, or the deadline has passed. Retry later.",
}
_NAME = {"type": "string", "minLength": 1}
_SHAPE = {"type": "array", "items": {"type": "integer", "minimum": -1}}
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def openapi_document() -> dict[str, Any]:
    """Return the document, OpenAPI 3.1."""
    model, version = _path_parameter("model"), _path_parameter("version")
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("Describe the server", "ServerMetadata")},
        "/v2/health/live": {"get": _operation("Whether the server runs", "Live")},
        "/v2/health/ready": {"get": _readiness("Whether the server accepts requests", "Ready")},
        "/v2/models": {"get": _operation("List the models", "Models")},
        "/v2/repository/index": {"post": _operation("List all versions and their states", "Index")},
        "/predict": {"post": _predict()},
        "/metrics": {"get": _operation("Metrics for Prometheus", None, media="text/plain")},
        "/openapi.json": {"get": _operation("This document", None)},
    }
    for prefix, parameters in (
        ("/v2/models/{model}", [model]),
        ("/v2/models/{model}/versions/{version}", [model, version]),
    ):
        described = _operation("Describe a model", "ModelMetadata", ("404", "503"))
        paths[prefix] = {"parameters": parameters, "get": described}
        ready = _readiness("Whether a model accepts requests", "ModelReady", ("404",))
        paths[f"{prefix}/ready"] = {"parameters": parameters, "get": ready}
        paths[f"{prefix}/infer"] = {"parameters": parameters, "post": _infer()}
    for action in ("load", "unload"):
        codes = ("400", "404", "501", "503")
        change = _operation(f"{action.capitalize()} a model's files", "Changed", codes)
        paths[f"/v2/repository/models/{{model}}/{action}"] = {"parameters": [model], "post": change}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "advprop",
            "version": metadata.version("advprop"),
            "description": "Image classifiers behind the Open Inference Protocol v2.",
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _NAME}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def _operation(
    summary: str, schema: str | None, errors: tuple[str, ...] = (), media: str = "application/json"
) -> dict[str, Any]:
    content = {media: {"schema": {"$ref": f"#/components/schemas/{schema}"} if schema else {}}}
    responses: dict[str, Any] = {"200": {"description": "Success.", "content": content}}
    responses |= {code: {"description": _ERRORS[code], "content": _ERROR} for code in errors}
    return {"summary": summary, "responses": responses}


def _readiness(summary: str, schema: str, errors: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an operation that answers what is not ready in the same form, with 503."""
    operation = _operation(summary, schema, errors)
    operation["responses"]["503"] = operation["responses"]["200"] | {"description": "Not ready."}
    return operation


def _infer() -> dict[str, Any]:
    errors = ("400", "404", "408", "413", "415", "422", "499", "500", "503")
    operation = _operation("Run a model", "InferenceResponse", errors)
    binary = {"schema": {"type": "string", "format": "binary"}}
    operation["responses"]["200"]["content"]["application/octet-stream"] = binary
    operation["parameters"] = [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 0},
            "description": "Length of the JSON before binary tensors; 0 for a raw body.",
        }
    ]
    operation["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}},
            "application/octet-stream": binary,
        },
    }
    return operation


def _predict() -> dict[str, Any]:
    errors = ("400", "404", "408", "413", "415", "422", "499", "500", "503")
    operation = _operation("Classify images", "Predictions", errors)
    number = {"type": "integer", "minimum": 1, "maximum": 10**14}
    operation["parameters"] = [
        _query("model", {"type": "string"}, "Name of the model; not needed if there is one."),
        _query("version", {"type": "string"}, "Version of the model (default: the highest)."),
        _query("top_k", number, "Classes per image (default: 1)."),
        _query("timeout", number, "Deadline in microseconds."),
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}}
    content = {"image/*": binary, "application/octet-stream": binary, "multipart/form-data": files}
    operation["requestBody"] = {"required": True, "content": content}
    return operation


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _schemas() -> dict[str, Any]:
    text, flag, parameters = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
    described = {"name": text, "datatype": text, "shape": _SHAPE}
    tensor = _object(described)
    filled = _object(described, {"data": {"type": "array"}, "parameters": parameters})
    requested = _object({"name": text}, {"parameters": parameters})
    ranked = _object({"label": text, "probability": {"type": "number"}, "index": {"type": "integer"}})
    prediction = _object({"label": text, "probability": {"type": "number"}, "classes": _list_of(ranked)})
    state = _object({"name": text, "version": text, "state": {"enum": ["READY", "UNAVAILABLE"]}, "reason": text})
    model = {
        "name": text,
        "versions": _list_of(text),
        "platform": text,
        "inputs": _list_of(tensor),
        "outputs": _list_of(tensor),
    }
    request = {"id": text, "parameters": parameters, "outputs": _list_of(requested)}
    response = {"model_version": text, "id": text, "parameters": parameters}
    return {
        "Error": _object({"error": text}),
        "ServerMetadata": _object({"name": text, "version": text, "extensions": _list_of(text)}),
        "Live": _object({"live": flag}),
        "Ready": _object({"ready": flag}),
        "ModelReady": _object({"name": text, "ready": flag}),
        "Models": _object({"models": _list_of(text)}),
        "Index": _list_of(state),
        "Changed": _object({"name": text, "ok": flag}),
        "Predictions": _object({"model": text, "predictions": _list_of(prediction)}),
        "ModelMetadata": _object(model, {"properties": {"type": "object", "additionalProperties": text}}),
        "InferenceRequest": _object({"inputs": _list_of(filled)}, request),
        "InferenceResponse": _object({"model_name": text, "outputs": _list_of(filled)}, response),
    }
