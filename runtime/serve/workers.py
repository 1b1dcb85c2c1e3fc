"""`serve`, which runs a server in this process, or in several worker processes that share its port."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from runtime.errors import AdvPropError, RunFailed
from runtime.serve.config import ServeConfig
from runtime.serve.server import Listening, Worker, address_of, bind, run_server

__all__ = ["serve"]

log = logging.getLogger(__name__)

_RESTART_S = 1.0
"""Pause before a worker that died is started again."""
_EXTRA_S = 10.0
"""Seconds after the end of draining in which a worker may close its models."""


def serve(config: ServeConfig, on_ready: Callable[[Listening], None]) -> None:
    """Serve models until SIGTERM or SIGINT; requests in flight are answered first.

    Args:
        config: the settings.
        on_ready: called once all models of all workers are loaded and warm.

    Raises:
        AdvPropError: a model cannot be loaded, or a port is in use.
    """
    http_socket = bind(config.host, config.http_port)
    try:
        if config.workers == 1:
            run_server(config, Worker(http_socket=http_socket), on_ready)
        else:
            with tempfile.TemporaryDirectory(prefix="advprop-serve-") as folder:
                _Supervisor(config, Worker(http_socket=http_socket, metrics_folder=Path(folder))).run(on_ready)
    finally:
        http_socket.close()


class _Supervisor:
    """Starts workers, restarts those that died, and stops all of them."""

    def __init__(self, config: ServeConfig, worker: Worker) -> None:
        self._worker = worker
        self._http = worker.http_socket.getsockname()[1]
        self._reserved = None
        if config.grpc_port is not None:
            # Bound but not listening: it keeps the port for all workers, and receives nothing.
            self._reserved = bind(config.host, config.grpc_port, reuse_port=True)
            config = replace(config, grpc_port=self._reserved.getsockname()[1])
        self._config = config
        self._processes: dict[int, SpawnProcess] = {}
        self._reports: dict[int, Connection] = {}
        self._ready: set[int] = set()
        self._stopping = threading.Event()

    def run(self, on_ready: Callable[[Listening], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            for index in range(self._config.workers):
                self._start(index)
            while not self._stopping.is_set():
                self._observe(on_ready)
        finally:
            self._stop()
            if self._reserved is not None:
                self._reserved.close()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stopping.is_set():
            for process in self._processes.values():
                process.kill()
            os._exit(128 + number)
        self._stopping.set()

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        report, sent = context.Pipe(duplex=False)
        # Before all workers are loaded, the first one answers that the server is live and not ready.
        worker = replace(self._worker, index=index, listens_late=index > 0 or index in self._ready)
        process = context.Process(target=_run_worker, args=(self._config, worker, sent), name=f"worker-{index}")
        process.start()
        sent.close()
        self._processes[index], self._reports[index] = process, report

    def _observe(self, on_ready: Callable[[Listening], None]) -> None:
        """Wait for a report or the end of a worker, and react to it."""
        pending = [report for report in self._reports.values() if not report.closed]
        sentinels = [process.sentinel for process in self._processes.values()]
        wait([*pending, *sentinels], timeout=0.5)
        for index, report in self._reports.items():
            if not report.closed and report.poll():
                self._receive(index, report, on_ready)
        for index, process in list(self._processes.items()):
            if process.exitcode is not None and not self._stopping.is_set():
                self._restart(index, process)

    def _receive(self, index: int, report: Connection, on_ready: Callable[[Listening], None]) -> None:
        try:
            message = report.recv()
        except EOFError:
            report.close()
            return
        if isinstance(message, AdvPropError) and index not in self._ready:
            raise message
        was_ready = len(self._ready) == self._config.workers
        self._ready.add(index)
        if not was_ready and len(self._ready) == self._config.workers:
            port = self._config.grpc_port
            grpc = None if port is None else address_of(self._config.host, port)
            on_ready(Listening(f"http://{address_of(self._config.host, self._http)}", grpc))

    def _restart(self, index: int, process: SpawnProcess) -> None:
        if index not in self._ready:
            raise RunFailed(f"worker {index} ended with code {process.exitcode} before it was ready")
        log.error("worker %d ended with code %s; it is started again", index, process.exitcode)
        self._reports[index].close()
        time.sleep(_RESTART_S)
        self._start(index)

    def _stop(self) -> None:
        for process in self._processes.values():
            if process.is_alive():
                process.terminate()
        deadline_s = time.monotonic() + self._config.drain_s + _EXTRA_S
        for process in self._processes.values():
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                log.error("%s did not stop in time, and is killed", process.name)
                process.kill()
                process.join()


def _run_worker(config: ServeConfig, worker: Worker, report: Connection) -> None:
    """Run one worker process."""
    from runtime.system.console import set_up_logging

    set_up_logging()
    threading.Thread(target=_stop_with_parent, daemon=True, name="advprop-parent").start()
    try:
        run_server(config, worker, lambda listening: report.send(listening))
    except AdvPropError as error:
        report.send(type(error)(str(error)) if type(error).__init__ is AdvPropError.__init__ else RunFailed(str(error)))
        raise SystemExit(error.exit_code) from error


def _stop_with_parent() -> None:
    """Stop this worker when its supervisor has ended, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
