"""`Cluster`: an evaluation's units counted by the processes of a Ray cluster.

Ray starts the processes where there is room and says when one is lost; which units are where, and the journal, stay
here. A lost worker's units go to another, and a new worker is started in its place. It gets no unit before it has
shown that it sees the same files, on the same kind of device, through the same library versions.
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
from runtime.evaluate.cluster_worker import ClusterWorker, Elsewhere, Failure
from runtime.evaluate.measure import Counted, Measurement
from runtime.evaluate.models import Model, ModelSource
from runtime.evaluate.progress_log import Unit
from runtime.evaluate.provenance import difference

__all__ = ["Cluster", "ClusterConfig"]

log = logging.getLogger(__name__)

_CELLS = 8
"""The most units of one block that a worker is sent at once: they share decoded images, and are lost together."""

_LOSSES = 3
"""Workers lost in a row, for each that there should be, before it is given up."""

_PATIENCE_S = 15.0
"""How long a cluster may take to answer, and after how long a wait for the first worker is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Which cluster, and how much of it."""

    address: str
    """`HOST:PORT` of a cluster; `auto`: the one that this machine is part of; `local`: one on this machine, which is
    started and ended with the run. Not looked at where the program has called `ray.init` itself."""
    workers: int | None = None
    """Processes that evaluate; None: as many as the cluster has room for."""
    cpus: float = 1.0
    """CPUs of each, and threads that its models run on unless they are loaded for another number."""
    gpus: float | None = None
    """GPUs of each, such as 0.25; None: one where the cluster has any."""

    def __post_init__(self) -> None:
        if (self.workers is not None and self.workers < 1) or self.cpus <= 0 or (self.gpus or 0) < 0:
            raise ConfigError(f"at least one worker, more than 0 CPUs, and no fewer than 0 GPUs each; found {self}")


class Cluster:
    """Workers on a Ray cluster. A cluster that was there before is left as it was."""

    def __init__(self, config: ClusterConfig) -> None:
        """Connects, and starts the workers.

        Raises:
            BackendUnavailable: Ray is not installed, there is no cluster at the address, or it has no room at all.
        """
        self._config = config
        self._ray, self._ours = _connect(config)
        there = self._ray.cluster_resources()
        gpus = (1.0 if there.get("GPU") else 0.0) if config.gpus is None else config.gpus
        self._gone = (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError)
        # A worker that is lost is replaced by us: a new one is checked before it gets work, a restarted one would not.
        self._make = self._ray.remote(ClusterWorker).options(num_cpus=config.cpus, num_gpus=gpus, max_restarts=0).remote
        room = min([there.get("CPU", 0) / config.cpus, *([there.get("GPU", 0) / gpus] if gpus else [])])
        if room < 1 and config.workers is None:
            self.close()
            raise BackendUnavailable(
                f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; a worker takes "
                f"{config.cpus:g} and {gpus:g}. --ray-cpus and --ray-gpus say how many; with --ray-workers they are "
                "waited for"
            )
        self._workers = [self._make() for _ in range(config.workers or math.floor(room))]

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def load_model(
        self, path: Path, *, device: str = "auto", threads: int = 0, route: str = "main", exact: bool = True
    ) -> Model:
        """Has a worker load a model, and returns what it says of it; `logits` is for the workers only.

        Args:
            path: as every worker sees it.
            device: `auto`, `cpu` or `cuda`.
            threads: CPU threads inside one run; 0: the CPUs of a worker.
            route: BatchNorm route of a checkpoint.
            exact: see `runtime.evaluate.models.load_model`.

        Raises:
            InputError: no such file on the worker's node, or not a model.
            BackendUnavailable: what runs it is missing there, or workers cannot start.
        """
        source = ModelSource(
            path=path.absolute(),
            device=device,
            threads=threads or max(1, math.floor(self._config.cpus)),
            route=route,
            exact=exact,
        )
        answers = [worker.describe.remote(source) for worker in self._workers]
        ready, _ = self._ray.wait(answers, num_returns=1, timeout=_PATIENCE_S)
        if not ready:
            log.warning("waiting for the cluster to have room for a worker; available: %s", self._free())
            ready, _ = self._ray.wait(answers, num_returns=1)
        try:
            answer = self._ray.get(ready[0])
        except self._gone as error:
            raise _given_up(error) from error
        if isinstance(answer, Failure):
            answer.throw()
        assert isinstance(answer, Model)
        return answer

    def counts(self, measurement: Measurement, units: set[Unit]) -> Generator[Counted, None, None]:
        """Counts every unit, in no order.

        Args:
            measurement: of models that `load_model` gave.
            units: of its suite.

        Raises:
            InputError: a worker does not see the very models, images or library versions that the others do.
            BackendUnavailable: workers cannot start, or are lost again and again.
        """
        models = (*measurement.models, measurement.reference)
        if not all(isinstance(model.logits, Elsewhere) for model in models if model):
            raise ConfigError("models that a cluster evaluates are loaded by Cluster.load_model")
        todo = deque(_parts(measurement, units))
        sent = self._ray.put(measurement) if todo else None
        cells, expected = {cell for cell, _ in units}, measurement.describe("1/1")
        # What the workers are at, by what they will answer: their place, and the units; none while they get ready.
        at: dict[Any, tuple[int, list[Unit]]] = {}
        idle: list[int] = []
        left, losses = len(units), 0
        if left:
            at = {worker.begin.remote(sent, cells): (place, []) for place, worker in enumerate(self._workers)}
        while left:
            (answered,), _ = self._ray.wait(list(at), num_returns=1)
            place, part = at.pop(answered)
            try:
                answer = self._ray.get(answered)
            except self._gone as error:
                losses += 1
                if losses >= _LOSSES * self.size:
                    raise _given_up(error) from error
                log.warning("a worker was lost (%s); its blocks go to others, and a new one is started", _last(error))
                todo.extendleft([part] if part else [])
                self._ray.kill(self._workers[place])  # it may be out of reach only
                self._workers[place] = self._make()
                at[self._workers[place].begin.remote(sent, cells)] = (place, [])
                answer = []
            else:
                idle.append(place)
                if isinstance(answer, Failure):
                    answer.throw()
                if part:
                    losses, left = 0, left - len(part)
                else:
                    _check_same(answer, expected)
                    answer = []
            while todo and idle:
                worker, following = idle.pop(), todo.popleft()
                at[self._workers[worker].count.remote(following)] = (worker, following)
            yield from answer

    def _free(self) -> str:
        free = self._ray.available_resources()
        return f"{free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"

    def close(self) -> None:
        """Ends the workers, and the cluster if it was started for them."""
        for worker in getattr(self, "_workers", ()):
            self._ray.kill(worker)
        if self._ours:
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _connect(config: ClusterConfig) -> tuple[Any, bool]:
    """Returns the module `ray`, connected, and whether that is ours to end."""
    if config.address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray listens on all interfaces, and the token keeps others out. It reads the mode when it is imported.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "ray" not in sys.modules:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable(f"--ray needs Ray ({error}): pip install 'advprop[ray]'") from error
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"address": config.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.address == "local":
        options |= {"include_dashboard": False}
        options |= {"num_cpus": math.ceil(config.workers * config.cpus)} if config.workers else {}
    try:
        _knock(config.address)
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(
            f"no Ray cluster at {config.address!r} ({_last(error)}). Start one with `ray start --head`, and join it on "
            "other machines with `ray start --address HOST:PORT`; --ray local needs none"
        ) from error
    return ray, True


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself tries for many minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE_S).close()


def _parts(measurement: Measurement, units: set[Unit]) -> Iterator[list[Unit]]:
    """Deals units into portions of one block of images each."""
    for base in measurement.bases(units):
        waiting = iter(base.units)
        while part := list(itertools.islice(waiting, _CELLS)):
            yield part


def _check_same(answer: tuple[str, list[dict[str, Any]]], expected: list[dict[str, Any]]) -> None:
    """Raises DataError where counts made on a node would be of something else."""
    node, found = answer
    differs = next(filter(None, map(difference, found, expected)), "")
    if differs:
        raise DataError(
            f"on node {node}: {differs} on the first worker or here. Give every node the same files and library "
            "versions; name the --device if they differ in it"
        )


def _given_up(error: BaseException) -> AdvPropError:
    return BackendUnavailable(
        f"Ray's workers are lost again and again ({_last(error)}), most often for want of memory, or because advprop "
        "is not installed on every node. The same command goes on from here"
    )


def _last(error: BaseException) -> str:
    """The beginning of the last line of what Ray says, which is what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(". ")[0][:200] if lines else type(error).__name__
