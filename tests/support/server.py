"""`advprop serve` in a process of its own, and raw HTTP requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support import ROOT


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    headers: Mapping[str, str]
    """Names are in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        message: str = self.json["error"]
        return message


@dataclass(slots=True)
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    http_port: int = 0
    grpc: str = ""
    log: list[str] = field(default_factory=list)
    """Lines of stderr so far."""
    is_ready: threading.Event = field(default_factory=threading.Event)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> Answer:
        """Send a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            content = answer.read()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)
        finally:
            connection.close()

    def post_json(self, path: str, content: Any) -> Answer:
        return self.ask("POST", path, json.dumps(content), {"Content-Type": "application/json"})

    def stop(self, timeout_s: float = 60) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def start_server(
    *arguments: str | Path, wait: bool = True, launcher: Sequence[str] = (), stdout: Path | None = None
) -> Server:
    """Start `advprop serve` on free ports, and return once its models are loaded.

    Args:
        arguments: of the command.
        wait: wait until the models are loaded.
        launcher: program and arguments that start the command.
        stdout: file for the standard output.
    """
    command = [
        *launcher,
        sys.executable,
        "-m",
        "advprop",
        "serve",
        "--http-port",
        "0",
        "--threads",
        "1",
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with Path(stdout or os.devnull).open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.PIPE, text=True)
    server = Server(process)
    threading.Thread(target=_read, args=(server,), daemon=True).start()
    if wait:
        deadline_s = time.monotonic() + 120
        while not server.is_ready.wait(0.05):
            if process.poll() is not None or time.monotonic() > deadline_s:
                process.kill()
                raise AssertionError("the server did not start:\n" + "".join(server.log))
    return server


def _read(server: Server) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.log.append(line)
        found = re.match(r"ready: .* on http://\S+?:(\d+)(?: and gRPC on (\S+))?$", line.strip())
        if found:
            server.http_port, server.grpc = int(found[1]), found[2] or ""
            server.is_ready.set()
    server.process.stderr.close()


def tensor_request(images_NCHW: NDArray[Any], **content: Any) -> dict[str, Any]:
    """Return a JSON request for the input of the models in `tests.support.serving_models`."""
    tensor = {"name": "input", "datatype": "FP32", "shape": list(images_NCHW.shape), "data": images_NCHW.tolist()}
    return {"inputs": [tensor], **content}


def binary_request(images_NCHW: NDArray[np.float32], **content: Any) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a request with the binary tensor extension."""
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": list(images_NCHW.shape),
        "parameters": {"binary_data_size": images_NCHW.nbytes},
    }
    text = json.dumps({"inputs": [tensor], **content}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    return text + images_NCHW.tobytes(), headers


def damaged_request(random: np.random.Generator) -> tuple[bytes, dict[str, str]]:
    """Return a binary request for the same models, with one to three damages.

    A single damage leaves the rest valid, and is therefore reached by the server's later checks.
    """
    sizes = [-1, 0, 1, 191, 193, 2**31, 2**63, "192", None, 1.5]
    tensor: dict[str, Any] = {"name": "input", "datatype": "FP32", "shape": [1, 3, 4, 4]}
    tensor["parameters"] = {"binary_data_size": 192}
    content: dict[str, Any] = {"inputs": [tensor]}
    data, header, flipped = random.normal(size=48).astype(np.float32).tobytes(), "", 0
    for damage in random.choice(9, size=random.integers(1, 4), replace=False):
        match int(damage):
            case 0:
                tensor["name"] = str(random.choice(["image", "", "logits"]))
            case 1:
                tensor["datatype"] = str(random.choice(["FP16", "INT8", "BYTES", "BOOL", "FP8"]))
            case 2:
                tensor["shape"] = [int(size) for size in random.choice([0, 1, 2, 3, 4, 2**33], random.integers(0, 6))]
            case 3:
                tensor["parameters"] = {"binary_data_size": sizes[random.integers(len(sizes))]}
            case 4:
                content["inputs"] = [tensor] * int(random.choice([0, 2]))
            case 5:
                data = random.bytes(int(random.integers(0, 400)))
            case 6:
                flipped = int(random.integers(1, 3))
            case 7:
                header = str(random.choice(["-1", "0", "1", "7x", "1000000", str(2**62)]))
            case 8:
                content["outputs"] = [{"name": str(random.choice(["x", "logits"])), "parameters": sizes}]
    text = bytearray(json.dumps(content).encode())
    for _ in range(flipped):
        text[random.integers(len(text))] = random.integers(256)
    return bytes(text) + data, {"Inference-Header-Content-Length": header or str(len(text))}
