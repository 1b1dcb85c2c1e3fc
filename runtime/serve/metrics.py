"""`Metrics`, the numbers that Prometheus reads from /metrics."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from runtime.serve.errors import Outcome
from runtime.serve.models import Registry

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_MAX_AGE_S = 30.0
"""Age at which the file of another worker is ignored: the worker has ended."""


class Metrics:
    """Counts requests, and reads the counts of the sessions when Prometheus asks for them.

    With several workers, each writes its numbers to a file of a shared folder. The worker that
    answers a request to /metrics adds the files of the others, with the label `worker`.
    """

    def __init__(self, models: Registry, *, worker: int = 0, folder: Path | None = None) -> None:
        """
        Args:
            models: the models of the server.
            worker: index of this process.
            folder: folder that all workers share; None if there is one process.
        """
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._models = models
        self._registry = CollectorRegistry()
        self._worker = worker
        self._folder = folder
        self._requests = Counter(
            "advprop_requests", "Requests by outcome.", ("model", "protocol", "outcome"), registry=self._registry
        )
        self._seconds = Histogram(
            "advprop_request_seconds",
            "Seconds from the head of a request to its answer.",
            ("model", "protocol"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge("advprop_requests_in_flight", "Requests in flight.", registry=self._registry)
        self._registry.register(_Sessions(models))
        ProcessCollector(registry=self._registry)

    def started(self) -> None:
        """Count a request that arrived."""
        self._in_flight.inc()

    def ended(self, model: str, protocol: str, outcome: Outcome, seconds: float) -> None:
        """Count a request that was answered. Models that do not exist are counted together."""
        self._in_flight.dec()
        name = model if model in self._models.names else ""
        self._requests.labels(name, protocol, outcome.label).inc()
        self._seconds.labels(name, protocol).observe(seconds)

    def publish(self) -> None:
        """Write the numbers of this worker for the other workers."""
        if self._folder is None:
            return
        target = self._folder / f"{self._worker}.prom"
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(generate_latest(self._registry))
        os.replace(temporary, target)

    def render(self) -> bytes:
        """Return the numbers of all workers in Prometheus' text format."""
        if self._folder is None:
            return generate_latest(self._registry)
        self.publish()
        texts = {
            file.stem: file.read_text()
            for file in sorted(self._folder.glob("*.prom"))
            if time.time() - file.stat().st_mtime < _MAX_AGE_S
        }
        merged = CollectorRegistry()
        merged.register(_Merged(texts))
        return generate_latest(merged)


class _Merged(Collector):
    """The families of several workers, each sample with the label `worker`."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                merged.samples += [
                    sample._replace(labels={**sample.labels, "worker": worker}) for sample in family.samples
                ]
        yield from families.values()


class _Sessions(Collector):
    """The counts of the loaded sessions."""

    def __init__(self, models: Registry) -> None:
        self._models = models

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        labels = ("model", "version")
        waits = HistogramMetricFamily("advprop_queue_seconds", "Seconds that requests waited.", labels=labels)
        runs = HistogramMetricFamily("advprop_compute_seconds", "Seconds that batches ran.", labels=labels)
        sizes = HistogramMetricFamily("advprop_batch_size", "Images per batch.", labels=labels)
        waiting = GaugeMetricFamily("advprop_queue_images", "Images that wait.", labels=labels)
        memory = GaugeMetricFamily(
            "advprop_gpu_memory_bytes", "GPU memory of contexts and outputs, without weights.", labels=labels
        )
        failed = CounterMetricFamily("advprop_failed_loads", "Loads of model files that failed.", labels=("model",))
        for model in self._models.loaded():
            where = (model.name, model.version)
            stats = model.session.stats
            batcher = stats.batcher
            waits.add_metric(where, _buckets(batcher.queue_wait_us, 1e-6), batcher.queue_wait_s)
            runs.add_metric(where, _buckets(batcher.compute_us, 1e-6), batcher.compute_s)
            images = sum(size * count for size, count in batcher.batch_sizes.items())
            sizes.add_metric(where, _buckets(_to_powers(batcher.batch_sizes), 1.0), images)
            waiting.add_metric(where, batcher.waiting_images)
            memory.add_metric(where, stats.device_bytes)
        for name, count in self._models.failed_loads.items():
            failed.add_metric((name,), count)
        yield from (waits, runs, sizes, waiting, memory, failed)


def _to_powers(counts: Mapping[int, int]) -> dict[int, int]:
    powers: dict[int, int] = {}
    for size, count in counts.items():
        power = 1 << (size - 1).bit_length()
        powers[power] = powers.get(power, 0) + count
    return powers


def _buckets(counts: Mapping[int, int], unit: float) -> list[tuple[str, float]]:
    """Return cumulative buckets of counts by powers of two, from 1 to 2²⁶ for times and 2¹² else."""
    buckets, total = [], 0
    for exponent in range(27 if unit < 1 else 13):
        total += counts.get(1 << exponent, 0)
        buckets.append((repr((1 << exponent) * unit), float(total)))
    buckets.append(("+Inf", float(sum(counts.values()))))
    return buckets
