"""Compare `advprop serve` with bare `Session.run`: throughput and latency at several concurrencies.

    python benchmarks/serving.py MODEL.onnx [--seconds 5] [--threads 1]

The client is a process of its own with persistent connections and binary tensors of one image. Each
concurrency is measured alternately, bare and served, on the same machine. `--peer NAME=PORT` adds a
server of the same protocol that already listens, such as the KServe SDK with the same model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import runtime

CONNECTIONS = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="ONNX file")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default: 1)")
    parser.add_argument("--max-batch", type=int, default=0, help="images per batch (default: 4 on a CPU)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PORT", help="server that already listens")
    parser.add_argument("--client", nargs=4, metavar=("PORT", "NAME", "CONNECTIONS", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with runtime.load(options.model, threads=options.threads, warm_up=(1,)) as session:
        shape = tuple(session.backend.input.shape[1:])
        body, head = request_of(options.model.stem, session.backend.input.name, shape)
        if options.client:
            port, name, connections, seconds = options.client
            head = head.replace(f"/{options.model.stem}/".encode(), f"/{name}/".encode())
            print(json.dumps(asyncio.run(load_server(int(port), head + body, int(connections), float(seconds)))))
            return
        server, port = start(options)
        peers = {"advprop serve": port, **{name: int(peer) for name, peer in (one.split("=") for one in options.peer)}}
        print(f"{'connections':>11}  {'what':<14} {'images/s':>9} {'p50 ms':>8} {'p99 ms':>8}  relative to bare")
        for connections in CONNECTIONS:
            bare = report("Session.run", connections, load_session(session, shape, connections, options.seconds), 0.0)
            for name, peer_port in peers.items():
                report(name, connections, run_client(options, peer_port, connections), bare)
    server.terminate()
    server.wait(30)


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


def start(options: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """Start `advprop serve`, and return it with its port once it is ready."""
    command = [sys.executable, "-m", "advprop", "serve", str(options.model), "--http-port", "0"]
    command += ["--threads", str(options.threads), "--max-batch", str(options.max_batch), "--max-queued", "1024"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if line.startswith("ready:"):
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, int(line.rsplit(":", 1)[1])
    raise SystemExit("the server did not start")


def run_client(options: argparse.Namespace, port: int, connections: int) -> list[float]:
    arguments = ["--client", str(port), options.model.stem, str(connections), str(options.seconds)]
    run = subprocess.run(
        [sys.executable, __file__, str(options.model), *arguments], capture_output=True, text=True, check=True
    )
    times: list[float] = json.loads(run.stdout)
    return times


async def load_server(port: int, request: bytes, connections: int, seconds: float) -> list[float]:
    """Return the duration of all requests, in seconds, of clients that send one after the other."""
    end_s = time.monotonic() + seconds
    times: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end_s:
            started_s = time.monotonic()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            lines = head.split(b"\r\n")
            length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            if not head.startswith(b"http/1.1 200"):
                raise SystemExit(f"the server answered {head[:200]!r}")
            times.append(time.monotonic() - started_s)
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return times


def load_session(session: runtime.Session, shape: tuple[int, ...], threads: int, seconds: float) -> list[float]:
    """Return the duration of all calls of threads that call the session one after the other."""
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    end_s = time.monotonic() + seconds

    def client(_: int) -> list[float]:
        times = []
        while time.monotonic() < end_s:
            started_s = time.monotonic()
            session.run(image)
            times.append(time.monotonic() - started_s)
        return times

    with ThreadPoolExecutor(threads) as pool:
        return [one for times in pool.map(client, range(threads)) for one in times]


def report(name: str, connections: int, times: list[float], bare: float) -> float:
    """Print a row, and return the throughput in images per second."""
    throughput = connections * len(times) / sum(times)
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    relative = f"{throughput / bare:.2f}" if bare else ""
    print(f"{connections:>11}  {name:<14} {throughput:9.1f} {p50:8.2f} {p99:8.2f}  {relative}", flush=True)
    return throughput


if __name__ == "__main__":
    main()
