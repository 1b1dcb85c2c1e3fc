"""The example services, started as a user would, with real servers."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.support import ROOT
from tests.support.serving_models import serving_model

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
Start = Callable[..., str]


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def environment(model: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MODEL": str(model),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN": "0" * 64,
    }


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a server as a module of Python, and returns its address."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(port: int, path: str, *command: str) -> str:
        with (tmp_path / "log").open("w") as log:
            options = {"cwd": ROOT, "env": environment(model), "stdout": log, "stderr": log}
            server = subprocess.Popen([sys.executable, *command], start_new_session=True, **options)  # type: ignore[call-overload]
        servers.append(server)
        address = f"http://127.0.0.1:{port}{path}"
        for _ in range(900):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            try:
                if ask(address, png((9, 0, 0)))[0] == 200:
                    return address
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError((tmp_path / "log").read_text()[-3000:])

    yield start
    for server in servers:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(address: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        content = error.read()
        # While it starts, Ray answers with text.
        return error.code, json.loads(content) if content.startswith(b"{") else content.decode()


def check_answers(address: str, count: int) -> None:
    """Send images from 16 threads, and one file that is not an image."""
    names = [list(COLORS)[number % 3] for number in range(count)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda name: ask(address, png(COLORS[name])), names))
    assert [status for status, _ in answers] == [200] * count
    assert [answer["label"] for _, answer in answers] == names
    status, answer = ask(address, b"no image")
    assert status == 400 and "error" in answer


def test_fastapi(start: Start) -> None:
    port = free_port()
    command = ("-m", "uvicorn", "--port", str(port), "--log-level", "warning", "examples.fastapi_service:app")
    check_answers(start(port, "/predict", *command), 300)


def test_gunicorn_with_two_processes(start: Start) -> None:
    port = free_port()
    command = ("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "2", "--threads", "4")
    check_answers(start(port, "/", *command, "examples.gunicorn_service:app"), 300)


def test_a_pool_of_processes(model: Path, tmp_path: Path) -> None:
    files = []
    for name, color in COLORS.items():
        files.append(str(tmp_path / f"{name}.png"))
        Path(files[-1]).write_bytes(png(color))
    command = [sys.executable, "examples/process_pool.py", str(model), *files]
    done = subprocess.run(command, cwd=ROOT, env=environment(model), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == list(COLORS)


SERVE = """
import sys, time, ray
from ray import serve
ray.init(address="local", num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
from examples.ray_serve import app
serve.run(app)
time.sleep(600)
"""


@pytest.mark.slow
def test_ray_serve(start: Start) -> None:
    port = free_port()
    check_answers(start(port, "/", "-c", SERVE, str(port)), 60)
