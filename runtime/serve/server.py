"""`run_server`, one server process: it loads the models, answers, and drains when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from runtime.errors import ConfigError
from runtime.serve.config import ServeConfig
from runtime.serve.connections import limited_protocol
from runtime.serve.metrics import Metrics
from runtime.serve.models import Registry
from runtime.serve.rest import http_app
from runtime.serve.rpc import start_grpc_server
from runtime.serve.state import ServerState

__all__ = ["Listening", "Worker", "address_of", "bind", "run_server"]

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 75
_LAME_DUCK_S = 1.0
"""Seconds after SIGTERM in which new requests are still answered: load balancers need time to notice
that the server is not ready, and idle connections to be told to close."""
_PUBLISH_S = 1.0


@dataclass(frozen=True, slots=True)
class Listening:
    """The addresses of a server."""

    http: str
    grpc: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What distinguishes the processes of a server."""

    index: int = 0
    http_socket: socket.socket
    """Bound to the HTTP port. All workers accept connections from it."""
    listens_late: bool = False
    """Whether to accept connections only once the models are loaded: other workers answer until
    then."""
    metrics_folder: Path | None = None
    """Folder that the workers share; None for a single process."""


class _HttpServer(uvicorn.Server):
    """A uvicorn server whose owner handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the connections that the kernel has established, then stop as uvicorn does."""
        for _ in range(_BACKLOG):
            if not select.select(sockets or [], [], [], 0)[0]:
                break
            await asyncio.sleep(0)
        await super().shutdown(sockets)


def address_of(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around IPv6 addresses."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Return a socket that is bound, but does not listen yet.

    Raises:
        ConfigError: the address is in use or invalid.
    """
    # asyncio turns off Nagle's algorithm, which delays answers by 40 ms, only if the protocol is given.
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, proto=socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {address_of(host, port)}: {reason}",
            fix="choose another --http-port, --grpc-port or --host",
        ) from error
    bound.set_inheritable(True)
    return bound


def run_server(config: ServeConfig, worker: Worker, on_ready: Callable[[Listening], None]) -> None:
    """Serve until SIGTERM or SIGINT, and return after the requests in flight have been answered.

    Args:
        config: the settings.
        worker: the sockets of this process.
        on_ready: called once all models are loaded and warm.

    Raises:
        AdvPropError: a model cannot be loaded.
    """
    asyncio.run(_serve(config, worker, on_ready))


async def _serve(config: ServeConfig, worker: Worker, on_ready: Callable[[Listening], None]) -> None:
    registry = Registry(config.models, config.load)
    metrics = Metrics(registry, worker=worker.index, folder=worker.metrics_folder)
    state = ServerState(config=config, registry=registry, metrics=metrics, worker=worker.index)
    stop = asyncio.ensure_future(_stop_on_signals().wait())
    http = _HttpServer(_http_config(config, state))
    grpc_server = None
    tasks: list[asyncio.Future[None]] = []
    loading = asyncio.ensure_future(asyncio.to_thread(registry.load_all))
    try:
        if worker.listens_late:
            await asyncio.wait((loading, stop), return_when=asyncio.FIRST_COMPLETED)
        tasks.append(asyncio.ensure_future(http.serve(sockets=[worker.http_socket])))
        grpc_port = 0
        if config.grpc_port is not None:
            grpc_server, grpc_port = await _start_grpc(config, state)
        await asyncio.wait((loading, stop, tasks[0]), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            state.is_loaded = True
            on_ready(_listening(config, worker, grpc_port))
            tasks += [asyncio.ensure_future(_watch(config, registry)), asyncio.ensure_future(_publish(metrics))]
            await asyncio.wait((stop, tasks[0]), return_when=asyncio.FIRST_COMPLETED)
        await _drain(config, state)
    finally:
        state.is_draining = True
        stop.cancel()
        for task in tasks[1:]:
            task.cancel()
        http.should_exit = True
        if grpc_server is not None:
            await grpc_server.stop(config.drain_s)
        await asyncio.gather(*tasks[:1])
        if not loading.done():
            os._exit(0)  # stopped while loading, which cannot be interrupted
        await asyncio.to_thread(registry.close, drain=False)


def _stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets. A second signal ends the process at once."""
    stop = asyncio.Event()

    def stop_or_exit(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_or_exit, number)
    return stop


def _http_config(config: ServeConfig, state: ServerState) -> uvicorn.Config:
    return uvicorn.Config(
        http_app(state),
        http=limited_protocol(config.max_header_bytes, config.receive_s),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.drain_s)),
    )


async def _start_grpc(config: ServeConfig, state: ServerState) -> tuple[Any, int]:
    assert config.grpc_port is not None
    address = address_of(config.host, config.grpc_port)
    try:
        return await start_grpc_server(state, address)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address} for gRPC", fix="choose another --grpc-port, or 0 to turn gRPC off"
        ) from error


def _listening(config: ServeConfig, worker: Worker, grpc_port: int) -> Listening:
    http_port = worker.http_socket.getsockname()[1]
    grpc = address_of(config.host, grpc_port) if config.grpc_port is not None else None
    return Listening(f"http://{address_of(config.host, http_port)}", grpc)


async def _watch(config: ServeConfig, registry: Registry) -> None:
    while config.watch_s:
        await asyncio.sleep(config.watch_s)
        try:
            await asyncio.to_thread(registry.reload_changed)
        except Exception:
            log.exception("the check for changed model files failed")


async def _publish(metrics: Metrics) -> None:
    while True:
        try:
            await asyncio.to_thread(metrics.publish)
        except OSError:
            log.exception("the metrics of this worker cannot be written")
        await asyncio.sleep(_PUBLISH_S)


async def _drain(config: ServeConfig, state: ServerState) -> None:
    """Report not ready, and answer requests for a moment before the server stops listening."""
    state.is_draining = True
    log.info("stopping: requests in flight have %g s to complete", config.drain_s)
    await asyncio.sleep(min(_LAME_DUCK_S, config.drain_s / 2))
