"""Conditions under which a comparison fails, such as `top1 < baseline - 0.5`, for CI."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from xml.etree import ElementTree

from runtime.errors import ConfigError, nearest
from runtime.evaluate.comparison import Compared, Comparison, Measured
from runtime.evaluate.report.markup import clean

__all__ = ["Condition", "Outcome", "Status", "check", "parse_condition", "to_junit"]

_GRAMMAR = re.compile(
    r"\s*(?P<metric>[A-Za-z_][\w/]*)\s*(?P<operator><=|>=|<|>)\s*"
    r"(?:(?P<baseline>baseline)\s*(?:(?P<sign>[-+−])\s*(?P<margin>\d+(?:\.\d+)?|\.\d+))?"
    r"|(?P<number>[-−]?(?:\d+(?:\.\d+)?|\.\d+)))\s*%?\s*"
)
_EXPECTED = "METRIC < baseline - NUMBER, or METRIC < NUMBER, with <, <=, > or >="


class Status(Enum):
    """What the measurements show about a condition."""

    FAILED = "failed"
    """The condition holds: the whole 95% interval is beyond the limit."""
    PASSED = "passed"
    """The condition does not hold: the whole interval is on the other side."""
    INCONCLUSIVE = "inconclusive"
    """The interval contains the limit, or there are too few images for an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A condition under which a comparison fails."""

    text: str
    """The condition as the user wrote it."""
    metric: str
    is_below: bool
    """Whether the condition holds below the limit; otherwise above it."""
    is_relative: bool
    """Whether the limit is relative to the baseline."""
    limit: float
    """Difference from the baseline, or value, in the metric's unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A condition checked on one model."""

    condition: Condition
    model: str
    status: Status
    explanation: str
    """The numbers, and for an inconclusive outcome what it means."""


def parse_condition(text: str) -> Condition:
    """Parse a condition.

    Raises:
        ConfigError: the text is no condition.
    """
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        raise ConfigError(f"expected a condition {_EXPECTED}; found {text!r}")
    is_relative = found["baseline"] is not None
    number = (found["margin"] or "0") if is_relative else found["number"].replace("−", "-")
    sign = -1 if found["sign"] in ("-", "−") else 1
    return Condition(
        text=" ".join(text.split()),
        metric=found["metric"].removeprefix("error/"),
        is_below=found["operator"].startswith("<"),
        is_relative=is_relative,
        limit=sign * float(number) if is_relative else float(number),
    )


def check(conditions: Iterable[Condition], comparison: Comparison) -> list[Outcome]:
    """Check conditions on every model except the baseline.

    A condition fails only if the measurements show it: if the whole 95% interval is beyond the
    limit. For a model at the limit, this happens with a probability of at most 2.5%.

    Raises:
        ConfigError: a metric was not measured, or a condition is relative to a baseline and there
            is only one model.
    """
    outcomes = []
    for condition in conditions:
        known = comparison.metrics
        if condition.metric not in known:
            hint = nearest(condition.metric, known) or f"expected one of {', '.join(known)}"
            raise ConfigError(f"{condition.text!r}: the metric {condition.metric!r} was not measured; {hint}")
        if condition.is_relative and not comparison.others:
            raise ConfigError(f"{condition.text!r} compares with the baseline; pass a second model to check")
        outcomes += [_outcome(condition, model) for model in comparison.others or comparison.models]
    return outcomes


def _outcome(condition: Condition, model: Compared) -> Outcome:
    measured = model.measured.get(condition.metric)
    if measured is None:
        status, why = Status.INCONCLUSIVE, f"{condition.metric} was not measured for this model"
    else:
        status = _status(condition, measured)
        why = _explanation(condition, measured, status)
    return Outcome(condition=condition, model=model.name, status=status, explanation=why)


def _status(condition: Condition, measured: Measured) -> Status:
    interval = measured.difference_interval if condition.is_relative else measured.interval
    if interval is None:
        return Status.INCONCLUSIVE
    low, high = interval
    if high < condition.limit if condition.is_below else low > condition.limit:
        return Status.FAILED
    if low >= condition.limit if condition.is_below else high <= condition.limit:
        return Status.PASSED
    return Status.INCONCLUSIVE


def _explanation(condition: Condition, measured: Measured, status: Status) -> str:
    decimals, form = measured.metric.scale.decimals, "+" if condition.is_relative else ""
    value = measured.difference if condition.is_relative else measured.value
    interval = measured.difference_interval if condition.is_relative else measured.interval
    what = "difference" if condition.is_relative else "value"
    if value is None or interval is None:
        return f"{measured.images:,} images are too few for an interval; at least 20 are needed"
    low, high = interval
    numbers = f"{what} {value:{form}.{decimals}f}, 95% interval [{low:{form}.{decimals}f}, {high:{form}.{decimals}f}]"
    text = f"{measured.metric.title}: {numbers} on {measured.images:,} images"
    if status is Status.INCONCLUSIVE:
        text += "; the interval contains the limit, so these images neither show the failure nor rule it out"
    if not condition.is_relative or status is Status.FAILED:
        return text
    return f"{text}. {_power_text(condition, measured, status is Status.INCONCLUSIVE)}"


def _power_text(condition: Condition, measured: Measured, is_inconclusive: bool) -> str:
    """Return which difference the condition detects with this number of images."""
    detectable, margin = measured.detectable, abs(condition.limit)
    assert detectable is not None
    scale = measured.metric.scale
    change = "a loss" if measured.metric.higher_is_better else "an increase"

    def amount(number: float) -> str:
        return f"{change} of {number:.{scale.decimals}f} {scale.difference}".rstrip()

    text = f"{measured.images:,} images show {amount(margin + detectable)} in four of five cases"
    if is_inconclusive and margin and detectable > margin:
        needed = math.ceil(measured.images * (detectable / margin) ** 2 / 100) * 100
        text += f"; {amount(2 * margin)} needs about {needed:,} images"
    return text


def to_junit(comparison: Comparison, outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as JUnit XML: a test case per condition and model.

    An inconclusive outcome is a skipped test case.
    """
    counts = {status: sum(outcome.status is status for outcome in outcomes) for status in Status}
    numbers = {
        "tests": str(len(outcomes)),
        "failures": str(counts[Status.FAILED]),
        "errors": "0",
        "skipped": str(counts[Status.INCONCLUSIVE]),
    }
    root = ElementTree.Element("testsuites", {"name": "advprop compare", **numbers})
    name = clean(f"{comparison.suite} of {comparison.data}")
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **numbers})
    for outcome in outcomes:
        title = f"fails if {outcome.condition.text}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": clean(outcome.model), "name": clean(title)})
        if outcome.status is Status.FAILED:
            failure = ElementTree.SubElement(case, "failure", {"message": clean(outcome.explanation)})
            failure.text = clean(outcome.explanation)
        elif outcome.status is Status.INCONCLUSIVE:
            ElementTree.SubElement(case, "skipped", {"message": clean(outcome.explanation)})
        else:
            ElementTree.SubElement(case, "system-out").text = clean(outcome.explanation)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'
