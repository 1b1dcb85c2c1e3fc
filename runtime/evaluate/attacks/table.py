"""Results of attacks as one table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.evaluate.attacks.config import GRADIENT, NOISE, SQUARE
from runtime.evaluate.attacks.outcomes import CLEAN
from runtime.evaluate.attacks.results import WORST, AttackResult
from runtime.evaluate.intervals import wilson

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["notes", "table_of"]

_ROWS = (CLEAN, *GRADIENT, SQUARE, WORST, NOISE)


def table_of(results: Sequence[AttackResult]) -> Table:
    """Returns a table of top-1 with 95 % intervals: a row an attack, a column a model and ε."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None)
    table.add_column(f"top-1 of {results[0]['images']:,} images", no_wrap=True)
    columns: list[dict[str, str]] = []
    for result in results:
        for epsilon in result["settings"]["epsilons"]:
            title = f"{escape(str(result['model']['name']))}\nε = {epsilon:g}/255"
            table.add_column(title, justify="right", overflow="fold")
            columns.append(_column(result, epsilon))
    for row in _ROWS:
        if any(row in column for column in columns):
            table.add_row(_title(row, results), *(escape(column.get(row, "–")) for column in columns))
    return table


def _title(row: str, results: Sequence[AttackResult]) -> str:
    settings = results[0]["settings"]
    return {
        SQUARE: f"square, {settings['queries']:,} queries",
        NOISE: f"noise, worst of {settings['draws']}",
        WORST: "worst of the attacks",
    }.get(row, row)


def _column(result: AttackResult, epsilon: float) -> dict[str, str]:
    column = {}
    for curve in result["curves"]:
        for point in curve["points"]:
            if point["epsilon"] == 0:
                column[CLEAN] = _share(point["right"], result["images"])
            elif point["epsilon"] == epsilon / 255:
                text = _share(point["right"], result["images"])
                column[curve["attack"]] = f"{text} *" if curve.get("white_box") else text
    return column


def _share(right: int, images: int) -> str:
    interval = wilson(right, images)
    ends = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{right / images:.1%}{ends}"


def notes(results: Sequence[AttackResult]) -> list[str]:
    """Returns in words what the numbers are of, and what they lack."""
    curves = [(result, curve) for result in results for curve in result["curves"]]
    lines = [line for result, curve in curves if curve["attack"] == SQUARE for line in _queries(result, curve)]
    if any(curve.get("white_box") for _, curve in curves):
        lines.append("* white box: the checkpoint under its own gradient; the others are shown the same images")
    strangers = [
        str(result["model"]["name"]) for result, curve in curves if curve.get("of_own_checkpoint", True) is False
    ]
    if strangers:
        names = ", ".join(dict.fromkeys(strangers))
        lines.append(f"{names}: not made from this checkpoint, as far as its file says; transfer to it is weaker")
    made = {curve["attack"] for _, curve in curves}
    if not made & set(GRADIENT):
        lines.append(
            "transfer was not run: PGD and APGD need --checkpoint. Square attack alone is weak: a model may be less "
            "robust than this says"
        )
    elif SQUARE not in made:
        lines.append("transfer alone flatters a model that hides its gradient, as INT8 does: add square")
    if NOISE not in made:
        lines.append("no noise control: an attack that does no more than noise has found nothing; add noise")
    return lines


def _queries(result: AttackResult, curve: dict[str, Any]) -> list[str]:
    lines = []
    for point in curve["points"]:
        if "queries_total" in point:
            median = point["queries_median_of_fooled"]
            fooled = curve["points"][0]["right"] - point["right"]
            tail = f", each after {median:g} queries (median)" if median is not None else ""
            lines.append(
                f"{result['model']['name']}: square fooled it on {fooled} of {curve['points'][0]['right']} images at "
                f"ε = {255 * point['epsilon']:g}/255{tail}; {point['queries_total']:,} queries in all"
            )
    return lines
