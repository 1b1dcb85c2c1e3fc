"""A server with a toy model, shared by the tests of the protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest

import runtime
from tests.support.server import Server, start_server
from tests.support.serving_models import MEAN, serving_model

Start = Callable[..., Server]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose logits are the means of the colors."""
    path = tmp_path_factory.mktemp("models") / "toy.onnx"
    onnx.save(serving_model(MEAN), path)
    return path


@pytest.fixture(scope="session")
def server(toy: Path) -> Iterator[Server]:
    """A server of `toy` with HTTP and gRPC, a body limit of 1 MiB and a small pixel limit."""
    started = start_server(toy, "--grpc-port", "-1", "--max-body-mib", "1", "--max-pixels", "10000", "--receive-s", "2")
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="session")
def session(toy: Path) -> Iterator[runtime.Session]:
    """A session on `toy`, for the expected values."""
    with runtime.load(toy, threads=1) as opened:
        yield opened


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a server, which is killed after the test if it still runs."""
    servers: list[Server] = []

    def start(*arguments: str | Path, wait: bool = True, stdout: Path | None = None) -> Server:
        servers.append(start_server(*arguments, wait=wait, stdout=stdout))
        return servers[-1]

    yield start
    for one in servers:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait(30)
