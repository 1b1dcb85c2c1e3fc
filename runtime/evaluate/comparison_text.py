"""Write a comparison of models: a written verdict, a table for the terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.evaluate.comparison import Comparison, Measured, Scale
from runtime.evaluate.gate import Outcome, Status
from runtime.evaluate.intervals import Interval
from runtime.evaluate.report.text import escape

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_json", "comparison_table", "summary_markdown", "verdict_lines", "verdicts"]

_HEADLINE = ("top1", "mean_error", "pgd", "apgd", "square", "worst", "ece")
"""Metrics that a verdict mentions, if they were measured. The mCE is the mean error in another unit."""

_TOO_WIDE = {Scale.PERCENT: 5.0, Scale.MCE: 10.0, Scale.SHARE: 0.05}
"""Scale → detectable difference above which a comparison has too few images."""


def verdict_of(measured: Measured) -> str:
    """Return the conclusion on one metric, such as "no loss that 400 images can show"."""
    gain, images = measured.gain_interval, f"{measured.images:,} images"
    if gain is None:
        return f"too few images ({measured.images:,}) for a conclusion"
    if measured.is_identical:
        return f"identical, right on the same ones of {images}"
    if gain[0] > 0:
        return "better"
    if gain[1] < 0:
        return "worse"
    detectable, scale = measured.detectable or 0.0, measured.metric.scale
    shown = f"{detectable:.{scale.decimals}f} {scale.difference}".strip()
    if detectable > _TOO_WIDE[scale]:
        return f"too few images to tell ({images} only show a difference of {shown})"
    return f"no difference that {images} can show (they show {shown} in four of five cases)"


def verdicts(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return a heading and a line per metric for each model except the baseline."""
    found = []
    for model in comparison.others:
        lines = [
            f"{measured.metric.title}: {verdict_of(measured)}, {change_text(measured)}"
            for measured in (model.measured[name] for name in _HEADLINE if name in model.measured)
            if measured.difference is not None
        ]
        found.append((f"{model.name} compared with {comparison.baseline.name}", lines))
    return found


def verdict_lines(comparison: Comparison) -> list[str]:
    """Return the verdicts as lines for the terminal."""
    lines = ["Δ: difference from the baseline, with its 95% interval; * its interval excludes 0"]
    lines += [line for title, texts in verdicts(comparison) for line in ("", title, *(f"  {text}" for text in texts))]
    return lines if comparison.others else []


def change_text(measured: Measured) -> str:
    """Return a difference with its interval, such as "−1.2 points [−2.0, −0.4]"."""
    if measured.difference is None:
        return ""
    scale = measured.metric.scale
    text = f"{measured.difference:+.{scale.decimals}f} {scale.difference}".strip()
    return _minus(f"{text}{_brackets(measured.difference_interval, scale, '+')}")


def _short_change(measured: Measured) -> str:
    if measured.difference is None:
        return ""
    scale = measured.metric.scale
    return _minus(f"{measured.difference:+.{scale.decimals}f}{_brackets(measured.difference_interval, scale, '+')}")


def value_text(measured: Measured, *, with_interval: bool = True) -> str:
    """Return a value, with its interval if it is known."""
    scale = measured.metric.scale
    percent = "%" if scale is Scale.PERCENT else ""
    interval = _brackets(measured.interval, scale, "") if with_interval else ""
    return f"{measured.value:.{scale.decimals}f}{percent}{interval}"


def _brackets(interval: Interval | None, scale: Scale, sign: str) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f" [{low:{sign}.{scale.decimals}f}, {high:{sign}.{scale.decimals}f}]"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _rows(comparison: Comparison, *, is_short: bool = False) -> list[tuple[str, list[str]]]:
    """Return (title, text per model): values, and below them differences from the baseline.

    Args:
        comparison: the comparison.
        is_short: leave out the intervals of values; corruptions get one row with value and
            difference, and * if the interval of the difference excludes 0.
    """
    rows = []
    metrics = comparison.metrics
    for name in sorted(metrics, key=lambda name: name not in (*_HEADLINE, "mce")):
        metric, is_headline = metrics[name], name in (*_HEADLINE, "mce")
        found = [model.measured.get(name) for model in comparison.models]
        if is_short and not is_headline:
            rows.append((metric.title, [_one_line(item) if item else "–" for item in found]))
            continue
        rows.append((metric.title, [value_text(item, with_interval=not is_short) if item else "–" for item in found]))
        if any(item and item.difference is not None for item in found):
            rows.append(("  Δ", [_short_change(item) if item else "" for item in found]))
    return rows


def _one_line(measured: Measured) -> str:
    value = value_text(measured, with_interval=False)
    if measured.difference is None:
        return value
    gain = measured.gain_interval
    mark = "*" if gain is not None and (gain[0] > 0 or gain[1] < 0) else " "
    return _minus(f"{value} {measured.difference:+6.{measured.metric.scale.decimals}f}{mark}")


def comparison_table(comparison: Comparison) -> Table:
    """Return a table with a column per model; the baseline comes first."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    table.add_column(Text(f"{comparison.data}\n{comparison.images:,} images"))
    for model in comparison.models:
        note = "\nbaseline" if model is comparison.baseline else "\n"
        table.add_column(Text(f"{model.name}{note}"), justify="right", overflow="fold")
    for title, cells in _rows(comparison, is_short=True):
        table.add_row(Text(title), *map(Text, cells))
    return table


def comparison_json(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return a comparison as plain values."""

    def measured(item: Measured) -> dict[str, Any]:
        return {
            "title": item.metric.title,
            "value": item.value,
            "interval": item.interval,
            "difference": item.difference,
            "difference_interval": item.difference_interval,
            "detectable": item.detectable,
            "images": item.images,
        }

    return {
        "suite": comparison.suite,
        "data": comparison.data,
        "images": comparison.images,
        "baseline": comparison.baseline.name,
        "models": {
            model.name: {name: measured(item) for name, item in model.measured.items()} for model in comparison.models
        },
        "verdicts": dict(verdicts(comparison)),
        "conditions": [
            {
                "fail_if": outcome.condition.text,
                "model": outcome.model,
                "status": outcome.status.value,
                "explanation": outcome.explanation,
            }
            for outcome in outcomes
        ],
    }


_SIGNS = {Status.FAILED: "❌", Status.PASSED: "✅", Status.INCONCLUSIVE: "⚠️"}


def summary_markdown(comparison: Comparison, outcomes: Sequence[Outcome]) -> str:
    """Return a comparison as Markdown, for the step summary of a CI job."""
    names = ", ".join(model.name for model in comparison.others) or comparison.baseline.name
    parts = [
        f"## {escape(names)} compared with {escape(comparison.baseline.name)}",
        f"{comparison.images:,} images of {escape(comparison.data)}; 95% intervals in brackets, Δ on the same images.",
        *(
            "\n".join([f"**{escape(title)}**\n", *(f"- {escape(line)}" for line in lines)])
            for title, lines in verdicts(comparison)
        ),
    ]
    if outcomes:
        rows = [
            f"| {_SIGNS[outcome.status]} {outcome.status.value} | {escape(outcome.model)} | "
            f"{escape(outcome.condition.text)} | {escape(outcome.explanation)} |"
            for outcome in outcomes
        ]
        parts.append("\n".join(["| gate | model | fails if | measured |", "|---|---|---|---|", *rows]))
    heads = " | ".join(escape(model.name) for model in comparison.models)
    rows = [f"| {escape(title.strip())} | {' | '.join(map(escape, cells))} |" for title, cells in _rows(comparison)]
    rule = "|".join(["---", *["---:"] * len(comparison.models)])
    table = "\n".join([f"| | {heads} |", f"|{rule}|", *rows])
    parts.append(f"<details><summary>All numbers</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"
