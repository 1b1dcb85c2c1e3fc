"""Compare `advprop serve` with bare `Session.run` and with other servers, at several concurrencies.

    python -m benchmarks.serving MODEL.onnx [--seconds 5] [--rounds 3] [--kserve PYTHON] [--pytriton PYTHON]

The client is a process of its own with persistent connections and binary tensors of one image. All
servers run one after the other on the same machine, in `--rounds` alternating rounds, with the same
file and the same number of ONNX Runtime threads. The other servers need environments of their own:

    python -m venv kserve && kserve/bin/pip install kserve . onnxruntime
    python -m venv pytriton && pytriton/bin/pip install nvidia-pytriton 'numpy<2' onnxruntime
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import runtime

CONNECTIONS = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="ONNX file")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default: 1)")
    parser.add_argument("--contexts", type=int, default=1, help="batches that run at the same time (default: 1)")
    parser.add_argument("--max-batch", type=int, default=0, help="images per batch (default: 4 on a CPU)")
    parser.add_argument("--kserve", type=Path, metavar="PYTHON", help="environment with the KServe SDK")
    parser.add_argument("--pytriton", type=Path, metavar="PYTHON", help="environment with nvidia-pytriton")
    parser.add_argument("--client", nargs=4, metavar=("PORT", "NAME", "CONNECTIONS", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with runtime.load(options.model, threads=options.threads, warm_up=(1,)) as session:
        shape = tuple(session.backend.input.shape[1:])
        body, head = request_of(options.model.stem, session.backend.input.name, shape)
        if options.client:
            port, name, connections, seconds = options.client
            head = head.replace(f"/{options.model.stem}/".encode(), f"/{name}/".encode())
            load = asyncio.run(load_server(int(port), head + body, int(connections), float(seconds)))
            print(json.dumps(vars(load)))
            return
        compare(options, session, shape)


def compare(options: argparse.Namespace, session: runtime.Session, shape: tuple[int, ...]) -> None:
    """Start all servers, and print a row for each concurrency and server. An idle server uses no CPU time."""
    with ExitStack() as stack:
        ports = {"advprop serve": stack.enter_context(served(options))}
        for name in ("kserve", "pytriton"):
            if getattr(options, name):
                ports[name] = stack.enter_context(peer(options, name))
        print(f"{'connections':>11}  {'what':<14} {'images/s':>9} {'p50 ms':>8} {'p99 ms':>8}  relative to bare")
        for connections in CONNECTIONS:
            loads = {name: Load() for name in ("Session.run", *ports)}
            for _ in range(options.rounds):
                load_session(session, shape, connections, options.seconds, loads["Session.run"])
                for name, port in ports.items():
                    run_client(options, port, connections, loads[name])
            bare = loads["Session.run"].throughput
            for name, load in loads.items():
                p50, p99 = np.percentile(load.times, [50, 99]) * 1e3
                relative = f"{load.throughput / bare:.2f}"
                print(
                    f"{connections:>11}  {name:<14} {load.throughput:9.1f} {p50:8.2f} {p99:8.2f}  {relative}",
                    flush=True,
                )


@dataclass
class Load:
    """Requests that were answered, one image each."""

    times: list[float] = field(default_factory=list)
    """Duration of each, in seconds."""
    seconds: float = 0.0
    """From the first request to the last answer."""

    @property
    def throughput(self) -> float:
        """Images per second."""
        return len(self.times) / self.seconds


def request_of(model: str, name: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return the body and the head of an HTTP request with one image."""
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    tensor = {"name": name, "datatype": "FP32", "shape": [1, *shape], "parameters": {"binary_data_size": image.nbytes}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = text + image.tobytes()
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    return body, head.encode()


@contextmanager
def served(options: argparse.Namespace) -> Iterator[int]:
    """Run `advprop serve`, and yield its port once it is ready."""
    command = [sys.executable, "-m", "advprop", "serve", str(options.model), "--http-port", "0"]
    command += ["--threads", str(options.threads), "--max-batch", str(options.max_batch), "--max-queued", "1024"]
    command += ["--contexts", str(options.contexts)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if line.startswith("ready:"):
                threading.Thread(target=server.stderr.read, daemon=True).start()
                yield int(line.rsplit(":", 1)[1])
                return
        raise SystemExit("the server did not start")
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def peer(options: argparse.Namespace, name: str) -> Iterator[int]:
    """Run another server of the same protocol, and yield its port once it is ready."""
    python = getattr(options, name).absolute()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    program = Path(__file__).with_name(f"{name}_peer.py")
    arguments = [options.model.stem, options.model, port, options.threads, options.contexts, options.max_batch]
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",  # Triton's stub otherwise takes the libpython of its wheel
    }
    server = subprocess.Popen(
        [python, program, *map(str, arguments)],
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{options.model.stem}/ready", timeout=1)
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"the {name} server ended with {server.returncode}") from None
                time.sleep(0.1)
            else:
                yield port
                return
        raise SystemExit(f"the {name} server is not ready after a minute")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def run_client(options: argparse.Namespace, port: int, connections: int, load: Load) -> None:
    """Send requests to a server, and add them to `load`."""
    arguments = ["--client", str(port), options.model.stem, str(connections), str(options.seconds)]
    command = [sys.executable, "-m", "benchmarks.serving", str(options.model), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    load.times += found["times"]
    load.seconds += found["seconds"]


async def load_server(port: int, request: bytes, connections: int, seconds: float) -> Load:
    """Send requests from several connections, each one after the other."""
    began_s = time.monotonic()
    load = Load()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < began_s + seconds:
            started_s = time.monotonic()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            lines = head.split(b"\r\n")
            length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            if not head.startswith(b"http/1.1 200"):
                raise SystemExit(f"the server answered {head[:200]!r}")
            load.times.append(time.monotonic() - started_s)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    load.seconds = time.monotonic() - began_s
    return load


def load_session(session: runtime.Session, shape: tuple[int, ...], threads: int, seconds: float, load: Load) -> None:
    """Call the session from several threads, each one call after the other, and add the calls to `load`."""
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    began_s = time.monotonic()

    def client(_: int) -> list[float]:
        times = []
        while time.monotonic() < began_s + seconds:
            started_s = time.monotonic()
            session.run(image)
            times.append(time.monotonic() - started_s)
        return times

    with ThreadPoolExecutor(threads) as pool:
        load.times += [one for times in pool.map(client, range(threads)) for one in times]
    load.seconds += time.monotonic() - began_s


if __name__ == "__main__":
    main()
