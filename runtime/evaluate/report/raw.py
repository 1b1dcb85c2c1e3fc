"""The raw cells as CSV: a row a model, suite and cell."""

from __future__ import annotations

import csv
import io

from runtime.evaluate.report.markup import clean
from runtime.evaluate.report.rows import Entry, Report
from runtime.evaluate.results import Result

__all__ = ["COLUMNS", "to_csv"]

COLUMNS = (
    *("model", "precision", "sha256", "suite", "cell", "corruption", "severity", "resize", "images", "names_sha256"),
    *("top1", "top5", "not_finite", "error", "error_low", "error_high", "calibration_error", "rms_calibration_error"),
    *("reference", "agree", "agreement", "top1_difference", "top1_difference_low", "top1_difference_high"),
)

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(report: Report) -> str:
    """Returns all cells of all results, counts and shares; empty where there is nothing.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in report.entries:
        for suite, result in entry.results.items():
            for cell in result["cells"]:
                writer.writerow([_field(value) for value in _row(entry, suite, result, cell)])
    return file.getvalue()


def _row(entry: Entry, suite: str, result: Result, cell: str) -> list[object]:
    facts, metrics = result["cells"][cell], result["metrics"]["cells"][cell]
    counts, against = facts["counts"], metrics.get("against_reference") or {}
    corruption, _, severity = cell.partition("/")
    low, high = metrics["top1_interval"]
    difference = against.get("top1_difference_interval") or ("", "")
    return [
        *(entry.label, entry.precision, entry.facts.get("sha256", ""), suite, cell),
        *(corruption if severity else "", severity, facts["resize"], facts["images"], facts["names_sha256"]),
        *(counts["top1"], counts["top5"], counts["not_finite"], 1 - metrics["top1"], 1 - high, 1 - low),
        *(metrics["calibration_error"], metrics["rms_calibration_error"]),
        *(result["reference"]["name"] if against else "", counts["pairs"]["agree"] if against else ""),
        *(against.get("agreement", ""), against.get("top1_difference", ""), *difference),
    ]


def _field(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str):
        text = clean(value)
        return f"'{text}" if text.startswith(_FORMULA) else text
    return value
