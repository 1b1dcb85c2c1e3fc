"""The gRPC side of `advprop serve`, with the protocol's stubs."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from open_inference.grpc import protocol, service
from PIL import Image

import runtime
from tests.runtime.serve.conftest import Start
from tests.support.server import Server
from tests.support.serving_models import LONG, SLOW, images_of, serving_model


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield service.GRPCInferenceServiceStub(channel)


def request_of(images_NCHW: np.ndarray[Any, Any], *, raw: bool = True, **fields: Any) -> Any:
    """Return a request for the model `toy`."""
    datatype = {np.dtype(np.float32): "FP32", np.dtype(np.float16): "FP16"}[images_NCHW.dtype]
    request = protocol.ModelInferRequest(model_name="toy", **fields)
    tensor = request.inputs.add(name="input", datatype=datatype, shape=images_NCHW.shape)
    if raw:
        request.raw_input_contents.append(images_NCHW.tobytes())
    else:
        tensor.contents.fp32_contents.extend(images_NCHW.reshape(-1).tolist())
    return request


def test_the_server_describes_itself_and_its_models(stub: Any) -> None:
    assert stub.ServerLive(protocol.ServerLiveRequest()).live
    assert stub.ServerReady(protocol.ServerReadyRequest()).ready
    assert "binary_tensor_data" in stub.ServerMetadata(protocol.ServerMetadataRequest()).extensions
    assert stub.ModelReady(protocol.ModelReadyRequest(name="toy")).ready
    assert not stub.ModelReady(protocol.ModelReadyRequest(name="toy", version="7")).ready
    model = stub.ModelMetadata(protocol.ModelMetadataRequest(name="toy"))
    assert (model.inputs[0].name, model.inputs[0].datatype, list(model.inputs[0].shape)) == (
        "input",
        "FP32",
        [-1, 3, 4, 4],
    )
    assert list(model.versions) == ["1"]


@pytest.mark.parametrize("raw", [True, False])
def test_raw_and_typed_contents_return_the_bits_of_the_session(stub: Any, session: runtime.Session, raw: bool) -> None:
    images_NCHW = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    answer = stub.ModelInfer(request_of(images_NCHW, raw=raw, id="abc"))
    assert (answer.id, answer.model_name, answer.model_version) == ("abc", "toy", "1")
    logits = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
    np.testing.assert_array_equal(logits, session.run(images_NCHW))


def test_encoded_images_return_labels(stub: Any) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (0, 0, 200)).save(file, "PNG")
    request = protocol.ModelInferRequest(model_name="toy")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(file.getvalue())
    answer = stub.ModelInfer(request)
    assert [output.name for output in answer.outputs] == ["label", "probability", "class"]
    assert answer.raw_output_contents[0] == b"\x04\x00\x00\x00blue"
    tensor.contents.bytes_contents[0] = b"no image"
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(request)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot decode the image" in failed.value.details()


def invalid(stub: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as failed:
        stub.ModelInfer(request)
    return failed.value.code(), failed.value.details()


def test_invalid_requests_have_status_codes(stub: Any) -> None:
    one = images_of(1.0)
    request = request_of(one)
    request.model_name = "tay"
    assert invalid(stub, request) == (grpc.StatusCode.NOT_FOUND, "there is no model 'tay'; did you mean toy?")
    assert invalid(stub, request_of(one, model_version="2"))[0] is grpc.StatusCode.NOT_FOUND
    for change, text in (
        (lambda request: request.raw_input_contents.append(b""), "found 2 raw_input_contents, but 1 inputs"),
        (lambda request: request.inputs[0].contents.fp32_contents.append(1), "contents next to raw_input_contents"),
        (lambda request: request.inputs[0].shape.append(2), "found 192 bytes, but FP32"),
        (lambda request: request.inputs.clear(), "1 raw_input_contents, but 0 inputs"),
        (lambda request: setattr(request.inputs[0], "datatype", "FP8"), "found datatype 'FP8'"),
        (lambda request: request.outputs.add(name="y"), "no output 'y'"),
    ):
        request = request_of(one)
        change(request)
        status, details = invalid(stub, request)
        assert (status, text in details) == (grpc.StatusCode.INVALID_ARGUMENT, True), details
    half = request_of(one.astype(np.float16))
    del half.raw_input_contents[:]
    assert "FP16 needs raw_input_contents" in invalid(stub, half)[1]
    assert "contains NaN" in invalid(stub, request_of(images_of(math.nan)))[1]
    large = np.zeros((6000, 3, 4, 4), np.float32)
    assert invalid(stub, request_of(large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_deadlines_full_queues_and_cancellation(start: Start, tmp_path: Path) -> None:
    onnx.save(serving_model(SLOW), tmp_path / "toy.onnx")
    server = start(tmp_path / "toy.onnx", "--grpc-port", "-1", "--max-queued", "2", "--max-batch", "1")
    with grpc.insecure_channel(server.grpc) as channel:
        stub = service.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as late:
            stub.ModelInfer(request_of(images_of(LONG)), timeout=0.1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        short = request_of(images_of(LONG))
        short.parameters["timeout"].int64_param = 50_000
        assert invalid(stub, short)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        calls = [stub.ModelInfer.future(request_of(images_of(LONG))) for _ in range(8)]
        codes = [call.exception().code() if call.exception() else grpc.StatusCode.OK for call in calls]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        wait_for_metric(server, f"{IN_FLIGHT} 1.0")  # the request for the metrics itself
        before = cancelled(server)  # the client may report its deadline before the server does
        running, waiting = (stub.ModelInfer.future(request_of(images_of(LONG))) for _ in range(2))
        wait_for_metric(server, f"{IN_FLIGHT} 3.0")
        waiting.cancel()
        assert running.result().model_name == "toy"
    wait_for_metric(server, f"{CANCELLED} {before + 1}")
    assert server.stop() == 0


IN_FLIGHT = "advprop_requests_in_flight"
CANCELLED = 'advprop_requests_total{model="toy",outcome="cancelled",protocol="grpc"}'


def cancelled(server: Server) -> float:
    text = server.ask("GET", "/metrics").body.decode()
    found = [float(line.removeprefix(CANCELLED)) for line in text.splitlines() if line.startswith(CANCELLED)]
    return sum(found, start=0.0)


def wait_for_metric(server: Server, line: str) -> None:
    for _ in range(600):
        if line in server.ask("GET", "/metrics").body.decode().splitlines():
            return
        time.sleep(0.05)
    raise AssertionError(f"{line} is not in {server.ask('GET', '/metrics').body.decode()}")
