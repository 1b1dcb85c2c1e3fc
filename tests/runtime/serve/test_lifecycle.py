"""Start, reload, overload and end of `advprop serve`, with real processes and threads of clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest

from runtime.serve.server import bind
from tests.runtime.serve.conftest import Start
from tests.support import ROOT
from tests.support.server import Answer, Server, tensor_request
from tests.support.serving_models import LONG, MEAN, SLOW, images_of, serving_model

INFER = "/v2/models/toy/infer"
TIMES = "p = GlobalAveragePool(input) q = Flatten(p) f = Constant <value = float {%d}> () logits = Mul(q, f)"
"""Multiplies the mean colors by a number, which identifies the version in every answer."""


def scaled(path: Path, factor: int) -> None:
    """Write a model whose logits are `factor` times the mean colors, as one rename."""
    model = serving_model(TIMES % factor)
    onnx.save(model, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def logits(answer: Answer) -> list[float]:
    found: list[float] = answer.json["outputs"][0]["data"]
    return found


def until(condition: Any, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_are_sent_without_delay(host: str) -> None:
    """With Nagle's algorithm, the body of an answer waits 40 ms for the client to confirm its headers."""

    async def is_nagle_off() -> bool:
        accepted: list[asyncio.StreamWriter] = []
        listening = bind(host, 0)
        server = await asyncio.start_server(lambda reader, writer: accepted.append(writer), sock=listening)
        async with server:
            _, client = await asyncio.open_connection(host, listening.getsockname()[1])
            while not accepted:
                await asyncio.sleep(0.01)
            option = accepted[0].get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for writer in (client, *accepted):
                writer.close()
        return bool(option)

    assert asyncio.run(is_nagle_off())


class Clients:
    """Threads that send requests on their own connections until they are stopped."""

    def __init__(self, server: Server, count: int = 8, images: int = 2) -> None:
        self._server = server
        self._images = images_of(*range(1, images + 1))
        self._stop = threading.Event()
        self.answers: list[Answer] = []
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._server.post_json(INFER, tensor_request(self._images)))
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(error)
                if isinstance(error, ConnectionRefusedError):
                    return


def test_a_server_that_loads_is_live_and_not_ready(start: Start, tmp_path: Path) -> None:
    """The warm-up of this model runs a long loop."""
    body = SLOW.replace("trips = Cast <to=7> (largest)", "trips = Constant <value = int64 {4000000}> ()")
    onnx.save(serving_model(body), tmp_path / "toy.onnx")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(tmp_path / "toy.onnx", "--http-port", str(port), wait=False)
    server.http_port = port

    def is_live() -> bool:
        try:
            return server.ask("GET", "/v2/health/live").status == 200
        except ConnectionRefusedError:
            return False

    until(is_live)
    assert server.ask("GET", "/v2/health/ready").status == 503
    answer = server.post_json(INFER, tensor_request(images_of(1)))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert server.stop() == 0


def test_every_request_is_answered_after_sigterm(start: Start, tmp_path: Path) -> None:
    """A connection that the server has not accepted when it closes its port is refused or reset."""
    onnx.save(serving_model(MEAN), tmp_path / "toy.onnx")
    log = tmp_path / "access.log"
    server = start(tmp_path / "toy.onnx", "--drain-s", "10", "--access-log", stdout=log)
    with Clients(server) as clients:
        until(lambda: len(clients.answers) > 50)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.process.wait(30) == 0
    assert {answer.status for answer in clients.answers} == {200}
    assert {type(error) for error in clients.errors} <= {ConnectionRefusedError, ConnectionResetError}
    accepted = [line for line in map(json.loads, log.read_text().splitlines()) if line["path"] == INFER]
    assert len(accepted) == len(clients.answers)


def test_a_long_request_is_answered_after_sigterm(start: Start, tmp_path: Path) -> None:
    onnx.save(serving_model(SLOW), tmp_path / "toy.onnx")
    server = start(tmp_path / "toy.onnx")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post_json, INFER, tensor_request(images_of(6 * LONG)))
        until(lambda: b"advprop_requests_in_flight 2.0" in server.ask("GET", "/metrics").body)
        assert server.stop() == 0
        assert answer.result().status == 200


def test_reload_under_load_loses_and_mixes_nothing(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    scaled(path, 1)
    server = start(path)
    with Clients(server) as clients:
        for factor in range(2, 8):
            scaled(path, factor)
            assert server.post_json("/v2/repository/models/toy/load", {}).status == 200
            time.sleep(0.1)
        path.write_bytes(b"broken")
        broken = server.post_json("/v2/repository/models/toy/load", {})
        assert (broken.status, "is not an ONNX file" in broken.error) == (400, True)
        assert "is not an ONNX file" in server.ask("POST", "/v2/repository/index").json[0]["reason"]
        time.sleep(0.2)
    assert {answer.status for answer in clients.answers} == {200}
    assert clients.errors == []
    factors = set()
    for answer in clients.answers:
        found = logits(answer)
        assert found == [found[0]] * 3 + [2 * found[0]] * 3, "one answer of two versions"
        factors.add(found[0])
    assert len(factors) >= 5
    assert logits(clients.answers[-1])[0] == 7.0
    assert server.stop() == 0


def test_changed_files_are_loaded_and_broken_ones_are_not(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    for version in (1, 2):
        (folder / str(version)).mkdir(parents=True)
        scaled(folder / str(version) / "model.onnx", version)
    server = start(folder, "--watch")
    one = tensor_request(images_of(1))

    def factor(version: str = "") -> float | None:
        path = f"/v2/models/toy/versions/{version}/infer" if version else INFER
        answer = server.post_json(path, one)
        return logits(answer)[0] if answer.status == 200 else None

    assert (factor(), factor("1"), factor("2")) == (2.0, 1.0, 2.0)
    assert server.ask("GET", "/v2/models/toy").json["versions"] == ["1", "2"]
    (folder / "10").mkdir()
    scaled(folder / "10" / "model.onnx", 10)
    until(lambda: factor() == 10.0)
    scaled(folder / "1" / "model.onnx", 5)
    until(lambda: factor("1") == 5.0)
    (folder / "10" / "model.onnx").write_bytes(b"broken")
    until(lambda: b'advprop_failed_loads_total{model="toy"} 1.0' in server.ask("GET", "/metrics").body)
    assert factor() == 10.0
    shutil.rmtree(folder / "10")
    until(lambda: factor() == 2.0)
    assert server.stop() == 0


def test_unloaded_models_are_loaded_on_request(start: Start, toy: Path) -> None:
    server = start(toy, f"other={toy}")
    one = tensor_request(images_of(1))
    assert server.ask("GET", "/v2/models").json == {"models": ["toy", "other"]}
    assert "one of toy, other" in server.ask("POST", "/predict", b"x").error
    assert server.ask("POST", "/v2/repository/models/toy/unload").json == {"name": "toy", "ok": True}
    answer = server.post_json(INFER, one)
    assert (answer.status, "toy/load" in answer.error) == (503, True)
    assert server.ask("GET", "/v2/models/toy/ready").status == 503
    assert server.ask("GET", "/v2/health/ready").status == 200
    assert server.post_json("/v2/models/other/infer", one).status == 200
    assert server.ask("POST", "/v2/repository/models/toy/load", b'{"parameters": {"config": "{}"}}').status == 400
    assert server.ask("POST", "/v2/repository/models/toy/load", b"{}").status == 200
    assert server.post_json(INFER, one).status == 200
    assert server.stop() == 0


def test_overload_deadlines_and_clients_that_leave(start: Start, tmp_path: Path) -> None:
    onnx.save(serving_model(SLOW), tmp_path / "toy.onnx")
    server = start(tmp_path / "toy.onnx", "--max-queued", "2", "--max-batch", "1")
    long = tensor_request(images_of(LONG))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.post_json(INFER, long), range(8)))
    assert {answer.status for answer in answers} == {200, 503}
    refused = next(answer for answer in answers if answer.status == 503)
    assert (refused.headers["retry-after"], "of at most 2 images wait" in refused.error) == ("1", True)
    late = server.post_json(INFER, {**long, "parameters": {"timeout": 50_000}})
    assert (late.status, "deadline of 0.05 s" in late.error) == (503, True)
    with pytest.raises(TimeoutError):
        server.ask("POST", INFER, *body_of(images_of(20 * LONG)), timeout_s=0.5)
    until(lambda: b'outcome="cancelled",protocol="http"' in server.ask("GET", "/metrics").body)
    assert server.stop() == 0


def body_of(images_NCHW: Any) -> tuple[bytes, dict[str, str]]:
    return json.dumps(tensor_request(images_NCHW)).encode(), {}


def test_a_worker_that_is_killed_is_started_again(start: Start, toy: Path) -> None:
    server = start(toy, "--workers", "2", "--grpc-port", "-1")
    one = tensor_request(images_of(1))
    parent = psutil.Process(server.process.pid)

    def workers() -> set[int]:
        """Return the process ids of the workers that run."""
        return {
            child.pid
            for child in parent.children()
            if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline())
        }

    before = workers()
    assert len(before) == 2
    until(lambda: b'worker="0"' in (text := server.ask("GET", "/metrics").body) and b'worker="1"' in text)
    answer = server.ask("POST", "/v2/repository/models/toy/load")
    assert (answer.status, "--watch" in answer.error) == (501, True)
    os.kill(max(before), signal.SIGKILL)
    until(lambda: len(workers() - before) == 1 and len(workers()) == 2)
    for _ in range(50):
        assert server.post_json(INFER, one).status == 200
    last = [psutil.Process(pid) for pid in workers()]
    assert server.stop() == 0
    assert psutil.wait_procs(last, timeout=10)[1] == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.onnx"], "missing.onnx does not exist"),
        (["README.md"], "is not"),
        (["a b=x.onnx"], "a model's name consists of"),
        (["x/toy.onnx", "y/toy.onnx"], "several models are named 'toy'"),
        (["m.onnx", "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ],
)
def test_invalid_models_and_addresses_end_the_command(arguments: list[str], text: str) -> None:
    command = [sys.executable, "-m", "advprop", "serve", "--http-port", "0", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, text in " ".join(run.stderr.split())) == (2, True), run.stderr
    assert "Traceback" not in run.stderr


def test_open_hosts_are_warned_about(start: Start, toy: Path) -> None:
    server = start(toy, "--host", "0.0.0.0")
    assert "TLS and authentication" in " ".join("".join(server.log).split())
    assert server.stop() == 0


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "grpc", "open_inference", "prometheus_client"])
def test_a_missing_extra_ends_with_its_name(toy: Path, package: str) -> None:
    """The help works without the extra. A None in sys.modules is a package that cannot be imported."""
    program = f"import sys; sys.modules[{package!r}] = None; from advprop.cli import main; main()"
    for arguments, code, text in ((["-h"], 0, "--grpc-port"), ([str(toy)], 3, "[serve]'")):
        run = subprocess.run(
            [sys.executable, "-c", program, "serve", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert (run.returncode, text in run.stdout + run.stderr) == (code, True), run.stderr
