"""Results as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.evaluate.cells import CLEAN, IMAGES
from runtime.evaluate.dataset_layouts import SEVERITIES
from runtime.evaluate.results import Result, is_whole

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["notes", "table_of"]


def table_of(results: Sequence[Result]) -> Table:
    """Returns a table with a column a model and a row a number, with 95 % intervals in brackets."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    columns = [_column(result) for result in results]
    table.add_column(str(results[0]["suite"]))
    for result in results:
        table.add_column(escape(str(result["model"]["name"])), justify="right", overflow="fold")
    for row in dict.fromkeys([*_ROWS, *(row for column in columns for row in column)]):
        if any(row in column for column in columns):
            table.add_row(row, *(escape(column.get(row, "")) for column in columns))
    return table


_ROWS = (
    "cells",
    "images",
    "top-1",
    "top-5",
    "clean top-1",
    "mean_error",
    "mce_alexnet",
    "relative_mce_alexnet",
    "ECE",
    "agrees",
    "Δ top-1",
    "Δ mean_error",
    "Δ mce_alexnet",
)
"""The rows, in their order. `images` to `top-5`, `ECE` and what follows it are of `images`, or of `clean`."""


def _column(result: Result) -> dict[str, str]:
    if not is_whole(result):
        return {"cells": f"{len(result['cells'])}, in part"}
    row: dict[str, str] = {}
    metrics = result["metrics"]
    cells = metrics["cells"]
    main = cells.get(IMAGES)
    if CLEAN in cells:
        row["clean top-1"] = _share(cells[CLEAN]["top1"], cells[CLEAN]["top1_interval"])
    shown = main or cells.get(CLEAN) or next(iter(cells.values()))
    row["images"] = f"{shown['images']:,}"
    against = shown.get("against_reference")
    if main or CLEAN in cells:
        row["ECE"] = f"{shown['calibration_error']:.3f}"
    if against and "ECE" in row:
        row["agrees"] = f"{against['agreement']:.1%}"
        row["Δ top-1"] = _points(against["top1_difference"], against["top1_difference_interval"])
    if main:
        row |= {"top-1": _share(main["top1"], main["top1_interval"]), "top-5": f"{main['top5']:.1%}"}
    return row | _corrupted(metrics) | _errors(cells)


def _corrupted(metrics: dict[str, Any]) -> dict[str, str]:
    row = {}
    mean = metrics.get("mean_error", {})
    if mean.get("value") is not None:
        row["mean_error"] = _share(mean["value"], mean["interval"])
        if "difference" in mean:
            row["Δ mean_error"] = _points(mean["difference"], mean["difference_interval"])
    for name in ("mce_alexnet", "relative_mce_alexnet"):
        found = metrics.get(name, {})
        if found.get("value") is not None:
            row[name] = f"{found['value']:.1f}{_ends(found['interval'], '.1f', 1)}"
            if name == "mce_alexnet" and "difference" in found:
                row["Δ mce_alexnet"] = f"{found['difference']:+.1f}{_ends(found['difference_interval'], '+.1f', 1)}"
    return row


def _errors(cells: dict[str, Any]) -> dict[str, str]:
    """The mean error of each corruption; of those without five severities, the error of each."""
    rows: dict[str, float] = {}
    severities: dict[str, list[str]] = {}
    for cell in cells:
        if "/" in cell:
            severities.setdefault(cell.split("/")[0], []).append(cell)
    for name, found in severities.items():
        errors = {cell: 1 - cells[cell]["top1"] for cell in found}
        rows |= {name: sum(errors.values()) / len(errors)} if len(errors) == len(SEVERITIES) else errors
    return {f"  error, {name}": f"{error:.1%}" for name, error in rows.items()}


def notes(results: Sequence[Result]) -> list[str]:
    """Returns in words what the table lacks, and why."""
    lines = []
    for result in results:
        name = result["model"]["name"]
        if not is_whole(result):
            lines.append(f"{name}: a part; put all parts together with advprop eval-merge")
        elif result["metrics"].get("mce_alexnet", {}).get("why_not"):
            lines.append(f"{name}: no mce_alexnet: {result['metrics']['mce_alexnet']['why_not']}")
        wrong = sum(cell["counts"]["not_finite"] for cell in result["cells"].values())
        if wrong:
            lines.append(f"{name}: {wrong} answers were not finite; they count as wrong")
    return list(dict.fromkeys(lines))


def _share(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.1%}{_ends(interval, '.1f', 100)}"


def _points(value: float, interval: Sequence[float] | None) -> str:
    """A difference in percentage points."""
    return f"{100 * value:+.1f}{_ends(interval, '+.1f', 100)}"


def _ends(interval: Sequence[float] | None, form: str, factor: float) -> str:
    return f" [{factor * interval[0]:{form}}, {factor * interval[1]:{form}}]" if interval else ""
