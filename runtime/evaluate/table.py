"""Format results of evaluations and attacks as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.evaluate.attacks.config import CLEAN as UNATTACKED
from runtime.evaluate.attacks.config import GRADIENT, NOISE, SQUARE
from runtime.evaluate.attacks.results import WORST, AttackResult
from runtime.evaluate.cells import CLEAN, IMAGES, SEVERITIES
from runtime.evaluate.intervals import wilson
from runtime.evaluate.results import Result, is_whole

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["attack_notes", "attack_table", "result_notes", "result_table"]

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
    "agreement",
    "Δ top-1",
    "Δ mean_error",
    "Δ mce_alexnet",
)
"""Row titles, in order. The errors by corruption follow."""

_ATTACK_ROWS = (UNATTACKED, *GRADIENT, SQUARE, WORST, NOISE)


def result_table(results: Sequence[Result]) -> Table:
    """Return a table of evaluations with a column per model, and 95% intervals in brackets."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    columns = [_column(result) for result in results]
    table.add_column(Text(str(results[0]["suite"])), no_wrap=True)
    for result in results:
        table.add_column(Text(str(result["model"]["name"])), justify="right", overflow="fold")
    for row in dict.fromkeys([*_ROWS, *(row for column in columns for row in column)]):
        if any(row in column for column in columns):
            table.add_row(row, *(Text(column.get(row, "")) for column in columns))
    return table


def _column(result: Result) -> dict[str, str]:
    """Return the column of a result: row title → text."""
    if not is_whole(result):
        return {"cells": f"{len(result['cells'])}, incomplete"}
    metrics = result["metrics"]
    cells = metrics["cells"]
    images, clean = cells.get(IMAGES), cells.get(CLEAN)
    uncorrupted = images or clean
    column = {"images": f"{(uncorrupted or next(iter(cells.values())))['images']:,}"}
    if images:
        column |= {"top-1": _percent(images["top1"], images["top1_interval"]), "top-5": f"{images['top5']:.1%}"}
    if clean:
        column["clean top-1"] = _percent(clean["top1"], clean["top1_interval"])
    if uncorrupted:
        column["ECE"] = f"{uncorrupted['calibration_error']:.3f}"
        against = uncorrupted.get("against_reference")
        if against:
            column["agreement"] = f"{against['agreement']:.1%}"
            column["Δ top-1"] = _points(against["top1_difference"], against["top1_difference_interval"])
    adapted = [cell["adapted"] for cell in cells.values() if "adapted" in cell]
    if adapted:
        column["adapted cells"] = f"{sum(adapted)} of {len(adapted)}"
    return column | _corruption_rows(metrics) | _error_rows(cells)


def _corruption_rows(metrics: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, found in metrics.items():
        if not isinstance(found, dict) or found.get("value") is None:
            continue
        if name.startswith("mean_error"):
            rows[name] = _percent(found["value"], found["interval"])
            if "difference" in found:
                rows[f"Δ {name}"] = _points(found["difference"], found["difference_interval"])
        elif name.startswith(("mce_alexnet", "mce_adapted", "relative_mce_alexnet")):
            rows[name] = f"{found['value']:.1f}{_brackets(found['interval'], '.1f', 1)}"
            if not name.startswith("relative") and "difference" in found:
                interval = _brackets(found["difference_interval"], "+.1f", 1)
                rows[f"Δ {name}"] = f"{found['difference']:+.1f}{interval}"
    return rows


def _error_rows(cells: dict[str, Any]) -> dict[str, str]:
    """Return the mean error of each corruption, or of each cell if severities are missing."""
    rows: dict[str, float] = {}
    by_corruption: dict[str, list[str]] = {}
    for cell in cells:
        if "/" in cell:
            by_corruption.setdefault(cell.split("/")[0], []).append(cell)
    for name, found in by_corruption.items():
        errors = {cell: 1 - cells[cell]["top1"] for cell in found}
        rows |= {name: sum(errors.values()) / len(errors)} if len(errors) == len(SEVERITIES) else errors
    return {f"  error, {name}": f"{error:.1%}" for name, error in rows.items()}


def result_notes(results: Sequence[Result]) -> list[str]:
    """Return the notes below a table of evaluations: missing numbers, and why they are missing."""
    lines = []
    for result in results:
        name = result["model"]["name"]
        if not is_whole(result):
            lines.append(f"{name}: incomplete; merge all shards with advprop eval-merge")
        elif result["metrics"].get("mce_alexnet", {}).get("why_not"):
            lines.append(f"{name}: no mce_alexnet: {result['metrics']['mce_alexnet']['why_not']}")
        not_finite = sum(cell["counts"]["not_finite"] for cell in result["cells"].values())
        if not_finite:
            lines.append(f"{name}: {not_finite} outputs were not finite; they count as wrong")
    return list(dict.fromkeys(lines))


def attack_table(results: Sequence[AttackResult]) -> Table:
    """Return a table of top-1 with 95% intervals: a row per attack, a column per model and ε."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    table.add_column(f"top-1 on {results[0]['images']:,} images", no_wrap=True)
    columns: list[dict[str, str]] = []
    for result in results:
        for epsilon in result["settings"]["epsilons"]:
            title = Text(f"{result['model']['name']}\nε = {epsilon:g}/255")
            table.add_column(title, justify="right", overflow="fold")
            columns.append(_attack_column(result, epsilon))
    for row in _ATTACK_ROWS:
        if any(row in column for column in columns):
            table.add_row(_attack_title(row, results), *(Text(column.get(row, "–")) for column in columns))
    return table


def _attack_title(attack: str, results: Sequence[AttackResult]) -> str:
    settings = results[0]["settings"]
    return {
        SQUARE: f"square, {settings['queries']:,} queries",
        NOISE: f"noise, worst of {settings['draws']}",
        WORST: "worst of the attacks",
    }.get(attack, attack)


def _attack_column(result: AttackResult, epsilon: float) -> dict[str, str]:
    """Return attack → text."""
    column = {}
    for curve in result["curves"]:
        for point in curve["points"]:
            accuracy = _percent(point["right"] / result["images"], wilson(point["right"], result["images"]))
            if point["epsilon"] == 0:
                column[UNATTACKED] = accuracy
            elif point["epsilon"] == epsilon / 255:
                column[curve["attack"]] = f"{accuracy} *" if curve.get("white_box") else accuracy
    return column


def attack_notes(results: Sequence[AttackResult]) -> list[str]:
    """Return the notes below a table of attacks: explanations of numbers, and missing attacks."""
    curves = [(result, curve) for result in results for curve in result["curves"]]
    lines = [line for result, curve in curves if curve["attack"] == SQUARE for line in _query_notes(result, curve)]
    if any(curve.get("white_box") for _, curve in curves):
        lines.append("* white box: the attack follows this checkpoint's own gradient; other models get the same images")
    unrelated = [
        str(result["model"]["name"]) for result, curve in curves if curve.get("of_own_checkpoint", True) is False
    ]
    if unrelated:
        names = ", ".join(dict.fromkeys(unrelated))
        lines.append(
            f"{names}: according to the model file, it was not exported from this checkpoint, so transfer is weaker"
        )
    attacks = {curve["attack"] for _, curve in curves}
    if not attacks & set(GRADIENT):
        lines.append(
            "no transfer attacks: PGD and APGD need --checkpoint. Square attack alone is weak, so the models may be "
            "less robust than the table shows"
        )
    elif SQUARE not in attacks:
        lines.append("transfer alone overestimates models that hide their gradient, such as INT8 models: add square")
    if NOISE not in attacks:
        lines.append("no noise control: an attack that fools no more images than noise is ineffective; add noise")
    return lines


def _query_notes(result: AttackResult, curve: dict[str, Any]) -> list[str]:
    lines = []
    for point in curve["points"]:
        if "queries_total" in point:
            median = point["queries_median_of_fooled"]
            fooled = curve["points"][0]["right"] - point["right"]
            per_image = f", after a median of {median:g} queries" if median is not None else ""
            lines.append(
                f"{result['model']['name']}: square fooled it on {fooled} of {curve['points'][0]['right']} images at "
                f"ε = {255 * point['epsilon']:g}/255{per_image}; {point['queries_total']:,} queries in total"
            )
    return lines


def _percent(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.1%}{_brackets(interval, '.1f', 100)}"


def _points(value: float, interval: Sequence[float] | None) -> str:
    """Format a difference in percentage points."""
    return f"{100 * value:+.1f}{_brackets(interval, '+.1f', 100)}"


def _brackets(interval: Sequence[float] | None, form: str, factor: float) -> str:
    return f" [{factor * interval[0]:{form}}, {factor * interval[1]:{form}}]" if interval else ""
