"""Measure latency and throughput of model files, side by side.

    from runtime.bench import Bench, BenchConfig, LoadOptions, open_targets

The names load when they are first used, so importing this package needs only NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.system.lazy import lazy_names

if TYPE_CHECKING:
    from runtime.bench.entries import PEERS, LoadOptions, open_targets
    from runtime.bench.pictures import SYNTHETIC
    from runtime.bench.results import measure_and_write, result_of, write_run
    from runtime.bench.run import Bench, BenchConfig
    from runtime.bench.table import notes_of, table_of
    from runtime.bench.targets import BenchTarget

__all__ = [
    "PEERS",
    "SYNTHETIC",
    "Bench",
    "BenchConfig",
    "BenchTarget",
    "LoadOptions",
    "measure_and_write",
    "notes_of",
    "open_targets",
    "result_of",
    "table_of",
    "write_run",
]

_HOMES = {
    "entries": ("PEERS", "LoadOptions", "open_targets"),
    "pictures": ("SYNTHETIC",),
    "results": ("measure_and_write", "result_of", "write_run"),
    "run": ("Bench", "BenchConfig"),
    "table": ("notes_of", "table_of"),
    "targets": ("BenchTarget",),
}

__getattr__ = lazy_names(__name__, {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names})
