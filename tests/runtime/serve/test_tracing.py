"""Spans of OpenTelemetry, from a server that `opentelemetry-instrument` starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from open_inference.grpc import protocol, service

from tests.support.server import start_server, tensor_request
from tests.support.serving_models import images_of

TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{CLIENT}-01"


def spans_in(file: Path) -> list[dict[str, Any]]:
    """Return the objects that the exporter wrote one after the other."""
    text, spans = file.read_text().strip(), []
    while text:
        span, end = json.JSONDecoder().raw_decode(text)
        spans.append(span)
        text = text[end:].strip()
    return spans


def test_requests_are_spans_of_the_clients_trace(toy: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("opentelemetry-instrument")
    others = [option for kind in ("metrics", "logs") for option in (f"--{kind}_exporter", "none")]
    launcher = [str(program), "--traces_exporter", "console", *others]
    server = start_server(toy, "--grpc-port", "-1", launcher=launcher, stdout=tmp_path / "spans")
    path, headers = "/v2/models/toy/infer", {"traceparent": PARENT, "Content-Type": "application/json"}
    assert server.ask("POST", path, json.dumps(tensor_request(images_of(1))), headers).status == 200
    assert server.ask("POST", path, "{}", headers).status == 400
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service.GRPCInferenceServiceStub(channel)
        stub.ModelMetadata(protocol.ModelMetadataRequest(name="toy"), metadata=[("traceparent", PARENT)])
        with pytest.raises(grpc.RpcError, match="tay"):
            stub.ModelMetadata(protocol.ModelMetadataRequest(name="tay"))
    assert server.stop() == 0
    spans = spans_in(tmp_path / "spans")
    found = [
        (span["name"], span["attributes"]["advprop.model"], span["attributes"]["advprop.outcome"]) for span in spans
    ]
    infer, metadata = "POST /v2/models/{model}/infer", "inference.GRPCInferenceService/ModelMetadata"
    assert found == [
        (infer, "toy", "ok"),
        (infer, "toy", "invalid"),
        (metadata, "toy", "ok"),
        (metadata, "tay", "not_found"),
    ]
    assert [span["context"]["trace_id"] == f"0x{TRACE}" for span in spans] == [True, True, True, False]
    assert {span["parent_id"] for span in spans[:3]} == {f"0x{CLIENT}"}
    assert spans[0]["attributes"]["http.response.status_code"] == 200
    assert {span["status"]["status_code"] for span in spans} == {"UNSET"}  # the client's faults are no errors
