"""A run as files in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.bench.plot import plot_run
from runtime.bench.results import for_report
from runtime.bench.table import csv_of, markdown_of
from runtime.system.files import atomic_folder

__all__ = ["write_run"]


def write_run(out: Path, result: dict[str, Any]) -> list[Path]:
    """Writes `bench.json`, `bench.md`, `bench.csv`, the curve, and MODEL.batchN.json for `advprop report`.

    All come at once, when all are whole; files of other runs stay.

    Args:
        out: a folder that is there.
        result: `advprop.benchrun/1` with at least one point.

    Returns:
        The files.

    Raises:
        OutputError: the folder is not writable, or the disk is full.
    """
    texts = {"bench.json": _json(result), "bench.md": markdown_of(result), "bench.csv": csv_of(result)}
    texts |= {name: _json(content) for name, content in for_report(result).items()}
    with atomic_folder(out) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name in ("latency_throughput.png", "latency_throughput.svg"):
            plot_run(folder / name, result)
        written = sorted(path.name for path in folder.iterdir())
    return [out / name for name in written]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
