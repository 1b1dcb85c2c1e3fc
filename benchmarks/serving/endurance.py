"""Send damaged requests and very many correct ones to `advprop serve`, and watch its memory.

    python -m benchmarks.serving.endurance [--damaged 2000] [--requests 100000]

Fails if an answer is not one of the documented ones, if a correct request is not answered correctly,
or if the memory of the server grows after its first 20,000 requests by more than 10 MB.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import onnx
import psutil

from tests.support.server import Server, binary_request, damaged_request, start_server
from tests.support.serving_models import images_of, serving_model

INFER = "/v2/models/m/infer"
CONNECTIONS = 16
PART = 10_000
MAX_GROWTH_MB = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damaged", type=int, default=2000, help="damaged requests (default: 2000)")
    parser.add_argument("--requests", type=int, default=100_000, help="correct requests (default: 100000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(serving_model(), Path(folder) / "m.onnx")
        server = start_server(Path(folder) / "m.onnx", "--max-queued", "1024")
        faults = damaged(server, options.damaged) + correct(server, options.requests)
        faults += server.stop() != 0
    print(f"faults: {faults}")
    sys.exit(bool(faults))


def damaged(server: Server, count: int) -> int:
    """Send damaged requests, and return how many were answered otherwise than documented."""
    random = np.random.default_rng(1)
    statuses: collections.Counter[int] = collections.Counter()
    for _ in range(count):
        body, headers = damaged_request(random)
        answer = server.ask("POST", INFER, body, headers)
        is_documented = answer.status in (200, 400, 422) and (answer.status == 200 or bool(answer.error))
        statuses[answer.status if is_documented else -answer.status] += 1
    print(f"damaged requests: {count}, answers by status: {dict(statuses)}")
    return sum(number for status, number in statuses.items() if status < 0)


def correct(server: Server, count: int) -> int:
    """Send correct requests over several connections, and return the wrong answers and 1 if memory grew."""
    wrong = 0
    process = psutil.Process(server.process.pid)
    sizes_MB: list[float] = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in range(count // PART):
            wrong += sum(pool.map(lambda number: send(server.http_port, number), range(PART)))
            sizes_MB.append(process.memory_info().rss / 1e6)
            print(f"{PART * len(sizes_MB):>8} requests: {sizes_MB[-1]:.1f} MB", flush=True)
    grown_MB = sizes_MB[-1] - sizes_MB[min(1, len(sizes_MB) - 1)]
    print(f"wrong or missing answers: {wrong}; growth: {grown_MB:.1f} MB")
    return wrong + (grown_MB > MAX_GROWTH_MB)


_local = threading.local()


def send(port: int, number: int) -> bool:
    """Send a request on the connection of this thread, and return whether its answer is wrong."""
    if not hasattr(_local, "connection"):
        _local.connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body, headers = binary_request(images_of(number), parameters={"binary_data_output": True})
    _local.connection.request("POST", INFER, body, headers)
    answer = _local.connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        return True
    length = int(answer.headers["Inference-Header-Content-Length"])
    json.loads(content[:length])
    return bool((np.frombuffer(content[length:], np.float32) != number).any())


if __name__ == "__main__":
    main()
