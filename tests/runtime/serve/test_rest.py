"""The HTTP side of `advprop serve`, with raw requests to a real server."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

import runtime
from tests.support.server import Server, binary_request, damaged_request, tensor_request
from tests.support.serving_models import images_of

INFER = "/v2/models/toy/infer"


def encoded(color: tuple[int, int, int], size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return file.getvalue()


def random_images(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(count).normal(size=(count, 3, 4, 4)).astype(np.float32)


def test_the_server_describes_itself_and_its_models(server: Server) -> None:
    assert server.ask("GET", "/v2/health/live").status == 200
    assert server.ask("GET", "/v2/health/ready").json == {"ready": True}
    assert "binary_tensor_data" in server.ask("GET", "/v2").json["extensions"]
    assert server.ask("GET", "/v2/models").json == {"models": ["toy"]}
    for path in ("/v2/models/toy", "/v2/models/toy/versions/1"):
        model = server.ask("GET", path).json
        assert model["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 4, 4]}]
        assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
        assert model["versions"] == ["1"]
        assert server.ask("GET", f"{path}/ready").json["ready"] is True
    states = server.ask("POST", "/v2/repository/index").json
    assert states == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("count", [1, 3])
def test_json_returns_the_bits_of_the_session(server: Server, session: runtime.Session, count: int) -> None:
    images_NCHW = random_images(count)
    answer = server.post_json(INFER, tensor_request(images_NCHW, id="abc")).json
    (output,) = answer["outputs"]
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("abc", "toy", "1")
    assert output["shape"] == [count, 3]
    np.testing.assert_array_equal(np.float32(output["data"]).reshape(count, 3), session.run(images_NCHW))


def test_binary_tensors_return_the_bits_of_the_session(server: Server, session: runtime.Session) -> None:
    images_NCHW = random_images(2)
    for content in (
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]},
    ):
        answer = server.ask("POST", f"/v2/models/toy/versions/1{INFER[-6:]}", *binary_request(images_NCHW, **content))
        length = int(answer.headers["inference-header-content-length"])
        (output,) = json.loads(answer.body[:length])["outputs"]
        assert output["parameters"]["binary_data_size"] == len(answer.body) - length == 24
        logits = np.frombuffer(answer.body[length:], np.float32).reshape(2, 3)
        np.testing.assert_array_equal(logits, session.run(images_NCHW))


def test_a_raw_body_is_one_tensor_or_one_encoded_image(server: Server, session: runtime.Session) -> None:
    raw = {"Inference-Header-Content-Length": "0"}
    images_NCHW = random_images(1)
    answer = server.ask("POST", INFER, images_NCHW.tobytes(), raw)
    length = int(answer.headers["inference-header-content-length"])
    np.testing.assert_array_equal(np.frombuffer(answer.body[length:], np.float32), session.run(images_NCHW)[0])
    answer = server.ask("POST", INFER, encoded((0, 200, 0)), raw)
    assert b"\x05\x00\x00\x00green" in answer.body


def test_encoded_images_return_labels_and_probabilities(server: Server, session: runtime.Session) -> None:
    images = [encoded((200, 10, 10)), encoded((10, 10, 200), form="JPEG")]
    data = [base64.b64encode(image).decode() for image in images]
    request = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [2], "data": data}]}
    outputs = {one["name"]: one for one in server.post_json(INFER, request).json["outputs"]}
    expected = session.predict(images)
    assert outputs["label"]["data"] == ["red", "blue"]
    assert outputs["class"]["data"] == [0, 2]
    assert outputs["probability"]["data"] == [one.probability for one in expected]

    ranked = server.post_json(INFER, {**request, "parameters": {"top_k": 2}}).json["outputs"]
    assert ranked[0]["shape"] == [2, 2]
    assert ranked[2]["data"] == [best.index for one in expected for best in one.top(2)]
    assert server.post_json(INFER, {**request, "parameters": {"top_k": 9}}).json["outputs"][0]["shape"] == [2, 3]

    wanted = {**request, "outputs": [{"name": "logits"}, {"name": "label"}]}
    assert [one["name"] for one in server.post_json(INFER, wanted).json["outputs"]] == ["logits", "label"]


def test_classification_follows_the_extension_of_triton(server: Server) -> None:
    outputs = [{"name": "logits", "parameters": {"classification": 2}}]
    request = tensor_request(
        np.array([[[[1]], [[3]], [[2]]]], np.float32) * np.ones((1, 3, 4, 4), np.float32), outputs=outputs
    )
    (output,) = server.post_json(INFER, request).json["outputs"]
    assert (output["datatype"], output["data"]) == ("BYTES", ["3.000000:1:green", "2.000000:2:blue"])


def test_predict_accepts_what_curl_sends(server: Server, session: runtime.Session) -> None:
    image = encoded((0, 0, 200), form="JPEG")
    (expected,) = session.predict([image])
    answer = server.ask("POST", "/predict?top_k=3", image, {"Content-Type": "application/x-www-form-urlencoded"}).json
    (found,) = answer["predictions"]
    assert (found["label"], found["probability"]) == ("blue", expected.probability)
    assert [one["index"] for one in found["classes"]] == [best.index for best in expected.top(3)]
    parts = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n' + one + b"\r\n"
        for one in (image, encoded((200, 0, 0)))
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = server.ask("POST", "/predict", parts + b"--x--\r\n", headers).json
    assert [one["label"] for one in answer["predictions"]] == ["blue", "red"]


ONE = images_of(1.0)
TENSOR = tensor_request(ONE)["inputs"][0]


def bad(**changes: Any) -> bytes:
    """Return a request whose tensor has other fields; None removes a field."""
    tensor = {key: value for key, value in {**TENSOR, **changes}.items() if value is not None}
    return json.dumps({"inputs": [tensor]}).encode()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not JSON"),
        (b"[1", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "the request: found list, expected an object"),
        (b"{}", "inputs: found nothing, expected a list"),
        (b'{"inputs": []}', "found 0 inputs, expected one: input: float32 (any, 3, 4, 4)"),
        (b'{"inputs": [5]}', "an input: found int"),
        (bad(name=None), "name of an input"),
        (bad(name="x"), "found an input 'x', expected input: float32 (any, 3, 4, 4)"),
        (bad(datatype="FP31"), "found datatype 'FP31', expected one of BOOL"),
        (bad(datatype="INT32"), "are not INT32 numbers"),
        (bad(datatype="FP64"), "expects input: float32 (any, 3, 4, 4); found dtype float64"),
        (bad(shape=[1, 3, 4, 5]), "they have shape"),
        (bad(shape=[-1, 3, 4, 4]), "expected a list of 1 to 8 whole numbers"),
        (bad(shape="1344"), "expected a list"),
        (bad(shape=[1, 48], data=[0] * 48), "found shape (1, 48)"),
        (bad(shape=[0, 3, 4, 4], data=[]), "an empty batch"),
        (bad(data=None), "neither data nor binary_data_size"),
        (bad(data=["a"] * 48), "they are of another type"),
        (bad(data=[[1], [2, 3]]), "are not FP32 numbers"),
        (bad(data=[float("nan")] * 48), "contains NaN"),
        (bad(data=[1e300] * 48), "contains infinity"),
        (bad(parameters={"binary_data_size": 192}), "needs the header"),
        (bad(name="image", datatype="BYTES", shape=[1], data=["%"]), "strings of base64"),
        (bad(name="image", datatype="BYTES", shape=[2], data=["aaaa"]), "found 1 elements"),
        (json.dumps(tensor_request(ONE, outputs=[{"name": "y"}])).encode(), "no output 'y'; expected some of logits"),
        (json.dumps(tensor_request(ONE, id=5)).encode(), "id: found '5', expected a string"),
        (json.dumps(tensor_request(ONE, parameters={"timeout": "1"})).encode(), "number of microseconds"),
        (json.dumps(tensor_request(ONE, parameters={"top_k": 0})).encode(), "top_k: found '0'"),
    ],
)
def test_invalid_requests_state_what_was_found_and_expected(server: Server, body: bytes, text: str) -> None:
    answer = server.ask("POST", INFER, body)
    assert (answer.status, text in answer.error) == (400, True), answer.body


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v2/models/tay", 404, "there is no model 'tay'; did you mean toy?"),
        ("GET", "/v2/models/toy/versions/2", 404, "loaded versions: 1"),
        ("GET", "/v3", 404, "there is no GET /v3"),
        ("GET", INFER, 405, "expected POST"),
        ("POST", "/v2", 405, "expected"),
        ("POST", "/predict?model=x", 404, "no model 'x'"),
        ("POST", "/predict?top_k=x", 400, "found 'x', expected a whole number"),
    ],
)
def test_paths_and_methods_that_do_not_exist(server: Server, method: str, path: str, status: int, text: str) -> None:
    answer = server.ask(method, path)
    assert (answer.status, text in answer.error) == (status, True), answer.body


def test_media_types_encodings_and_limits(server: Server) -> None:
    for path, media in ((INFER, "image/png"), ("/predict", "application/json"), ("/predict", "text/plain")):
        assert server.ask("POST", path, b"x", {"Content-Type": media}).status == 415
    assert "expected none" in server.ask("POST", INFER, b"x", {"Content-Encoding": "gzip"}).error
    too_large = server.ask("POST", "/predict", b"x" * (2**20 + 1))
    assert (too_large.status, "limit is 1048576" in too_large.error) == (413, True)
    chunks = server.ask("POST", "/predict", iter([b"x" * 600_000] * 2))
    assert chunks.status == 413
    assert "limit is 10,000 pixels" in server.ask("POST", "/predict", encoded((1, 2, 3), (101, 100))).error
    for body in (b"", b"no image", encoded((1, 2, 3), form="JPEG")[:300]):
        answer = server.ask("POST", "/predict", body)
        assert (answer.status, "cannot decode" in answer.error) == (422, True)
    assert server.ask("POST", "/predict", b"x", {"Content-Type": "multipart/form-data"}).status == 400
    assert server.ask("GET", "/v2", headers={"X": "a" * 70_000}).status == 431
    assert server.ask("GET", "/v2" + "a" * 70_000).status == 431


def test_slow_and_half_open_clients_are_disconnected(server: Server) -> None:
    started_s = time.monotonic()
    silent, half, slow = (socket.create_connection(("127.0.0.1", server.http_port), timeout=20) for _ in range(3))
    half.sendall(b"GET /v2 HTTP/1.1\r\nHo")
    slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nab")
    assert silent.recv(100) == b""
    assert half.recv(100) == b""
    assert b"408" in slow.recv(1000)
    assert time.monotonic() - started_s < 15
    for one in (silent, half, slow):
        one.close()
    broken = socket.create_connection(("127.0.0.1", server.http_port), timeout=20)
    broken.sendall(b"what?\r\n\r\n")
    assert broken.recv(1000).startswith(b"HTTP/1.1 400")
    broken.close()


def test_several_requests_on_one_connection(server: Server) -> None:
    head = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port), timeout=20) as connection:
        connection.sendall((head + b"\r\n") * 3 + head + b"Connection: close\r\n\r\n")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.count(b"HTTP/1.1 200") == 4


def test_malformed_binary_requests_get_documented_answers(server: Server) -> None:
    random = np.random.default_rng(0)
    statuses = []
    for _ in range(500):
        body, headers = damaged_request(random)
        answer = server.ask("POST", INFER, body, headers)
        statuses.append(answer.status)
        assert answer.status in (200, 400, 422), (answer, body, headers)
        assert answer.status == 200 or answer.error
    assert statuses.count(400) > 300
    assert server.ask("GET", "/v2/health/ready").status == 200


def test_metrics_count_requests(server: Server) -> None:
    server.post_json(INFER, tensor_request(ONE))
    text = server.ask("GET", "/metrics").body.decode()
    for name in (
        'advprop_requests_total{model="toy",outcome="ok",protocol="http"}',
        'advprop_request_seconds_bucket{le="0.005",model="toy",protocol="http"}',
        'advprop_queue_seconds_count{model="toy",version="1"}',
        'advprop_compute_seconds_sum{model="toy",version="1"}',
        'advprop_batch_size_bucket{le="1.0",model="toy",version="1"}',
        'advprop_queue_images{model="toy",version="1"} 0.0',
        "advprop_requests_in_flight 1.0",
    ):
        assert name in text, name
    assert 'model="tay"' not in text


def test_the_openapi_document_lists_every_path(server: Server) -> None:
    document = server.ask("GET", "/openapi.json").json
    assert document["openapi"].startswith("3.1")
    for path, item in document["paths"].items():
        for method in {"get", "post"} & set(item):
            found = server.ask(method.upper(), path.replace("{model}", "nothing").replace("{version}", "1"))
            assert found.status != 405, path
            assert found.status == 200 or str(found.status) in item[method]["responses"], (path, found)
