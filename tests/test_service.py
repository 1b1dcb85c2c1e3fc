"""The example services, started as a user would, under 1,000 concurrent requests."""

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import runtime
from tests.support import ROOT
from tests.support.serving_models import MEAN, SLOW, serving_model

Start = Callable[..., int]


def jpeg(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "JPEG", quality=100)
    return file.getvalue()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a service and returns its port."""
    services: list[subprocess.Popen[str]] = []

    def start(model: onnx.ModelProto, *arguments: str, example: str = "http_service") -> int:
        onnx.save(model, tmp_path / "m.onnx")
        port = ["0"] if example == "service" else ["--port", "0"]
        command = [sys.executable, f"examples/{example}.py", str(tmp_path / "m.onnx"), *port, *arguments]
        service = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        services.append(service)
        assert service.stdout is not None
        return int(service.stdout.readline().split()[-1])

    yield start
    for service in services:
        service.terminate()
        service.communicate(timeout=10)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


async def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body or b'')}\r\n\r\n"
    )
    writer.write(head.encode() + (body or b""))
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    status, _, content = answer.partition(b"\r\n\r\n")
    return int(status.split()[1]), json.loads(content)


async def until_ready(port: int) -> None:
    while (await ask(port, "/ready"))[0] != 200:
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("example", ["service", "http_service"])
def test_a_thousand_concurrent_requests(start: Start, tmp_path: Path, example: str) -> None:
    random = np.random.default_rng(0)
    images = [jpeg(tuple(color)) for color in random.integers(0, 256, (1000, 3)).tolist()]
    options = ["--max-queued", "1000", "--max-batch", "32"] if example == "http_service" else []
    port = start(serving_model(MEAN), *options, example=example)

    async def main() -> list[tuple[int, Any]]:
        if example == "http_service":
            await until_ready(port)
        return await asyncio.gather(*(ask(port, "/predict", image) for image in images))

    answers = asyncio.run(main())
    with runtime.load(tmp_path / "m.onnx", threads=1) as session:
        expected = [{"label": found.label, "probability": found.probability} for found in session.predict(images)]
    assert [status for status, _ in answers] == [200] * 1000
    assert [content for _, content in answers] == expected
    assert len({(answer["label"], answer["probability"]) for answer in expected}) > 900


def test_the_smallest_service_has_thirty_lines_and_reports_invalid_images(start: Start) -> None:
    lines = (ROOT / "examples" / "service.py").read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 30
    port = start(serving_model(MEAN), example="service")
    status, content = asyncio.run(ask(port, "/", b"no image"))
    assert status == 400
    assert "cannot decode the image" in content["error"]
    assert asyncio.run(ask(port, "/", jpeg((200, 0, 0))))[1]["label"] == "red"


@pytest.mark.parametrize("example", ["service", "http_service"])
def test_a_client_that_waits_for_100_continue_is_answered(start: Start, example: str) -> None:
    """curl waits before it sends more than a megabyte."""
    image = jpeg((200, 0, 0))

    async def main() -> None:
        if example == "http_service":
            await until_ready(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /predict HTTP/1.1\r\nContent-Length: {len(image)}\r\nExpect: 100-continue\r\n\r\n"
        writer.write(head.encode())
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(image)
        assert b'"label": "red"' in await reader.read()
        writer.close()
        await writer.wait_closed()

    port = start(serving_model(MEAN), example=example)
    asyncio.run(main())


def test_invalid_requests_are_reported_and_do_not_stop_the_service(start: Start) -> None:
    async def main() -> None:
        assert await ask(port, "/live") == (200, "live")
        status, content = await ask(port, "/ready")
        assert (status, content) in ((503, "loading"), (200, "ready"))
        await until_ready(port)
        status, message = await ask(port, "/predict", b"no image")
        assert status == 400
        assert "cannot decode the image" in message
        assert (await ask(port, "/predict", jpeg((9, 9, 9))[:300]))[0] == 400
        assert (await ask(port, "/predict"))[0] == 404
        assert (await ask(port, "/nothing", b""))[0] == 404
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"what?\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        assert (await ask(port, "/predict", jpeg((200, 0, 0))))[1]["label"] == "red"

    port = start(serving_model(MEAN))
    asyncio.run(main())


def test_a_service_that_loads_its_model_is_live_but_not_ready(start: Start) -> None:
    """The warm-up of this model runs a long loop, which leaves time for requests."""
    body = SLOW.replace("trips = Cast <to=7> (most)", "trips = Constant <value = int64 {2000000}> ()")

    async def main() -> None:
        assert await ask(port, "/live") == (200, "live")
        assert await ask(port, "/ready") == (503, "loading")
        assert await ask(port, "/predict", jpeg((1, 2, 3))) == (503, "loading")

    port = start(serving_model(body))
    asyncio.run(main())


def test_an_overloaded_service_answers_503_and_recovers(start: Start) -> None:
    body = SLOW.replace("trips = Cast <to=7> (most)", "trips = Constant <value = int64 {100000}> ()")

    async def main() -> None:
        await until_ready(port)
        answers = await asyncio.gather(*(ask(port, "/predict", jpeg((0, 200, 0))) for _ in range(50)))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        assert all(content["label"] == "green" for status, content in answers if status == 200)
        assert any("of at most 3 images wait" in content for status, content in answers if status == 503)
        assert (await ask(port, "/predict", jpeg((0, 200, 0))))[0] == 200

    port = start(serving_model(body), "--max-queued", "3", "--max-batch", "1")
    asyncio.run(main())
