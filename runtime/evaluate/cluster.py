"""`Cluster`: distribute an evaluation over the processes of a Ray cluster.

Ray starts the processes and reports lost ones. This module assigns the units and keeps the progress
log. The units of a lost worker go to other workers, and a new worker is started in its place. A
worker gets units only after it has shown that it sees the same files, on the same kind of device,
and with the same library versions as the others.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from runtime.errors import AdvPropError, BackendUnavailable, ConfigError, DataError
from runtime.evaluate.cluster_worker import ClusterWorker, Failure, RemoteLogits
from runtime.evaluate.measure import Counted, Measurement, Unit
from runtime.evaluate.models import CheckpointLoader, Model, ModelSource
from runtime.evaluate.results import difference

__all__ = ["Cluster", "ClusterConfig"]

log = logging.getLogger(__name__)

_MAX_UNITS = 8
"""Maximum number of units per batch for a worker. They share images, and are lost together."""

_MAX_LOSSES = 3
"""Number of workers lost in a row, per started worker, after which the run fails."""

_TIMEOUT_S = 15.0
"""Timeout for connecting to a cluster, and delay of the warning that no worker has started, in
seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The cluster, and the resources to use on it."""

    address: str
    """`HOST:PORT` of a cluster; `auto`: the cluster that this machine belongs to; `local`: a
    cluster on this machine that exists during the run. The address is ignored if the program has
    called `ray.init`."""
    workers: int | None = None
    """Number of worker processes (default: as many as fit into the cluster)."""
    cpus: float = 1.0
    """CPUs per worker, and default number of threads of its models."""
    gpus: float | None = None
    """GPUs per worker, such as 0.25 (default: one if the cluster has GPUs)."""

    def __post_init__(self) -> None:
        if (self.workers is not None and self.workers < 1) or self.cpus <= 0 or (self.gpus or 0) < 0:
            raise ConfigError(
                f"expected at least one worker, more than 0 CPUs and at least 0 GPUs per worker; found {self}"
            )


class Cluster:
    """Workers on a Ray cluster. A cluster that this class did not start keeps running."""

    def __init__(self, config: ClusterConfig) -> None:
        """Connect to the cluster and start the workers.

        Raises:
            BackendUnavailable: Ray is not installed, there is no cluster at the address, or the
                cluster is too small for one worker.
        """
        self._config = config
        self._ray, self._ours = _connect(config)
        resources = self._ray.cluster_resources()
        gpus = (1.0 if resources.get("GPU") else 0.0) if config.gpus is None else config.gpus
        # Ray must not restart workers by itself: a new worker is checked before it gets units.
        self._start = (
            self._ray.remote(ClusterWorker).options(num_cpus=config.cpus, num_gpus=gpus, max_restarts=0).remote
        )
        fitting = min([resources.get("CPU", 0) / config.cpus, *([resources.get("GPU", 0) / gpus] if gpus else [])])
        if fitting < 1 and config.workers is None:
            self.close()
            raise BackendUnavailable(
                f"the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs; a worker "
                f"needs {config.cpus:g} and {gpus:g}. Change --ray-cpus and --ray-gpus, or wait until others finish "
                "with --ray-workers N"
            )
        self._workers = [self._start() for _ in range(config.workers or math.floor(fitting))]

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def load_model(
        self,
        path: Path,
        *,
        device: str = "auto",
        threads: int = 0,
        route: str = "main",
        exact: bool = True,
        checkpoint_loader: CheckpointLoader | None = None,
    ) -> Model:
        """Load a model in a worker and return its description. Only workers can compute its logits.

        Args:
            path: path of the file on every worker.
            device: `auto`, `cpu` or `cuda`.
            threads: CPU threads per run; 0: the CPUs of a worker.
            route: BatchNorm route of a checkpoint.
            exact: see `runtime.evaluate.models.load_model`.
            checkpoint_loader: loads checkpoints; a function at the top level of a module that is
                installed on every node.

        Raises:
            InputError: the file does not exist on the worker's node, or is not a model.
            BackendUnavailable: a library is missing there, or workers cannot start.
        """
        source = ModelSource(
            path=path.absolute(),
            device=device,
            threads=threads or max(1, math.floor(self._config.cpus)),
            route=route,
            exact=exact,
            checkpoint_loader=checkpoint_loader,
        )
        answers = [worker.describe.remote(source) for worker in self._workers]
        ready, _ = self._ray.wait(answers, num_returns=1, timeout=_TIMEOUT_S)
        if not ready:
            free = self._ray.available_resources()
            log.warning(
                "waiting until a worker fits into the cluster; free: %g CPUs, %g GPUs",
                free.get("CPU", 0),
                free.get("GPU", 0),
            )
            ready, _ = self._ray.wait(answers, num_returns=1)
        try:
            answer = self._ray.get(ready[0])
        except self._lost_errors as error:
            raise _workers_lost(error) from error
        if isinstance(answer, Failure):
            answer.reraise()
        assert isinstance(answer, Model)
        return answer

    def counts(self, measurement: Measurement, units: set[Unit]) -> Generator[Counted, None, None]:
        """Yield the counts of every unit, in any order.

        Args:
            measurement: a measurement of models that `load_model` returned.
            units: units of its suite.

        Raises:
            InputError: a worker does not see the same models, images or library versions.
            BackendUnavailable: workers cannot start, or are lost repeatedly.
        """
        models = (*measurement.models, measurement.reference)
        if not all(isinstance(model.logits, RemoteLogits) for model in models if model):
            raise ConfigError("load models with Cluster.load_model to evaluate them on a cluster")
        if not units:
            return
        dispatch = _Dispatch(todo=deque(_batches(measurement, units)), left=len(units), running={}, idle=[])
        sent, cells, expected = self._ray.put(measurement), {cell for cell, _ in units}, measurement.describe("1/1")
        for place in range(self.size):
            self._begin(place, sent, cells, dispatch)
        while dispatch.left:
            (answered,), _ = self._ray.wait(list(dispatch.running), num_returns=1)
            place, batch = dispatch.running.pop(answered)
            try:
                answer = self._ray.get(answered)
            except self._lost_errors as error:
                self._replace(place, batch, error, dispatch)
                self._begin(place, sent, cells, dispatch)
                counted: list[Counted] = []
            else:
                if isinstance(answer, Failure):
                    answer.reraise()
                dispatch.idle.append(place)
                if batch:
                    counted, dispatch.losses, dispatch.left = answer, 0, dispatch.left - len(batch)
                else:
                    _check_same(answer, expected)
                    counted = []
            while dispatch.todo and dispatch.idle:
                place, batch = dispatch.idle.pop(), dispatch.todo.popleft()
                dispatch.running[self._workers[place].count.remote(batch)] = (place, batch)
            yield from counted

    @property
    def _lost_errors(self) -> tuple[type[BaseException], ...]:
        """Exceptions that Ray raises if a worker is lost."""
        return (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError)

    def _begin(self, place: int, measurement: Any, cells: set[str], dispatch: _Dispatch) -> None:
        """Make a worker prepare for a measurement."""
        dispatch.running[self._workers[place].begin.remote(measurement, cells)] = (place, [])

    def _replace(self, place: int, batch: list[Unit], error: BaseException, dispatch: _Dispatch) -> None:
        """Start a new worker instead of a lost one, and return its units to the queue."""
        dispatch.losses += 1
        if dispatch.losses >= _MAX_LOSSES * self.size:
            raise _workers_lost(error) from error
        log.warning("a worker was lost (%s); starting a new one and reassigning its blocks", _last_line(error))
        dispatch.todo.extendleft([batch] if batch else [])
        self._ray.kill(self._workers[place])  # the worker may still run on an unreachable node
        self._workers[place] = self._start()

    def close(self) -> None:
        """Stop the workers, and the cluster if this class started it."""
        for worker in getattr(self, "_workers", ()):
            self._ray.kill(worker)
        if self._ours:
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(slots=True, kw_only=True)
class _Dispatch:
    """State of distributing units over workers."""

    todo: deque[list[Unit]]
    """Batches of units that no worker has."""
    left: int
    """Number of units that are not counted yet."""
    running: dict[Any, tuple[int, list[Unit]]]
    """Pending Ray result → index and units of its worker; no units while the worker prepares."""
    idle: list[int]
    """Indices of workers without units."""
    losses: int = 0
    """Workers lost since units were last counted."""


def _connect(config: ClusterConfig) -> tuple[Any, bool]:
    """Connect to the cluster. Return the module `ray`, and whether to shut it down at the end."""
    if config.address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray listens on all interfaces; the token keeps others out. Ray reads the mode when it is
        # imported.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "ray" not in sys.modules:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable(f"--ray needs Ray ({error}): pip install ray") from error
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"address": config.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.address == "local":
        options |= {"include_dashboard": False}
        options |= {"num_cpus": math.ceil(config.workers * config.cpus)} if config.workers else {}
    try:
        _check_reachable(config.address)
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(
            f"no Ray cluster at {config.address!r} ({_last_line(error)}). Start one with `ray start --head` and add "
            "machines with `ray start --address HOST:PORT`, or use --ray local"
        ) from error
    return ray, True


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT. Ray itself would retry for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S).close()


def _batches(measurement: Measurement, units: set[Unit]) -> Iterator[list[Unit]]:
    """Yield units in batches that share one block of images."""
    for base in measurement.bases(units):
        waiting = iter(base.units)
        while batch := list(itertools.islice(waiting, _MAX_UNITS)):
            yield batch


def _check_same(answer: tuple[str, list[dict[str, Any]]], expected: list[dict[str, Any]]) -> None:
    """Raise DataError if a worker's files, device or versions differ from the expected ones."""
    node, found = answer
    differs = next(filter(None, map(difference, found, expected)), "")
    if differs:
        raise DataError(
            f"on node {node}: {differs}, unlike on the first worker or this machine. Use the same files "
            "and library versions on every node; if only the device differs, set --device"
        )


def _workers_lost(error: BaseException) -> AdvPropError:
    return BackendUnavailable(
        f"Ray's workers are lost repeatedly ({_last_line(error)}), probably because memory runs out or advprop is not "
        "installed on every node. The same command resumes"
    )


def _last_line(error: BaseException) -> str:
    """Return the start of the last line of Ray's message, which describes the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(". ")[0][:200] if lines else type(error).__name__
