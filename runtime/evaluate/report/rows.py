"""`Report`: models with all of their measurements, in groups that can be compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.evaluate.cells import CLEAN, IMAGES
from runtime.evaluate.report.inputs import Attack, Inputs, Latency
from runtime.evaluate.results import Result

__all__ = ["CORRUPTED", "Entry", "Group", "Report", "comparable_facts", "report_of", "uncorrupted_cell", "why_separate"]

CORRUPTED = ("imagenet-c", "corruptions", "cifar10-c")
"""Suites with corruptions and severities, in order of preference."""

_DISTINGUISHING = ("precision", "route", "arithmetic", "device", "backend", "weights")
"""Facts that distinguish models with the same name, in order of preference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model."""

    place: int
    """Number of the model in the report, from 0. It determines color and marker."""
    label: str
    """Its name, with distinguishing facts if other models have the same name."""
    facts: Mapping[str, Any]
    """Facts about the model, as results record them."""
    results: Mapping[str, Result]
    """Suite → result."""
    latencies: tuple[Latency, ...] = ()
    attacks: tuple[Attack, ...] = ()
    is_reference: bool = False
    """Whether other models are compared with this one."""

    @property
    def precision(self) -> str:
        """Precision such as fp32, fp16 or int8; "" if unknown."""
        return str(self.facts.get("precision") or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Models that were measured on the same images of a suite and can be compared."""

    suite: str
    entries: tuple[Entry, ...]
    why_separate: str = ""
    """Why the group cannot be compared with the suite's first group; "" for the first group."""

    @property
    def results(self) -> list[tuple[Entry, Result]]:
        """The models with their results on the suite."""
        return [(entry, entry.results[self.suite]) for entry in self.entries]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The content of a report."""

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    """For each suite, the largest group comes first."""
    gaps: tuple[str, ...]
    """Missing measurements and comparisons, and why they are missing."""
    files: tuple[tuple[str, str], ...]
    """Name and SHA-256 of the input files."""

    def suites(self) -> list[str]:
        """Return the suites that have results."""
        return list(dict.fromkeys(group.suite for group in self.groups))

    def why_separate(self, entry: Entry, suite: str) -> str:
        """Return why a model cannot be compared with others on a suite; "" if it can."""
        groups = (group for group in self.groups if group.suite == suite and entry in group.entries)
        return next((group.why_separate for group in groups), "")


def uncorrupted_cell(result: Result) -> str | None:
    """Return the cell of images without corruptions: `images` or `clean`, or None."""
    return next((cell for cell in (IMAGES, CLEAN) if cell in result["cells"]), None)


def report_of(inputs: Inputs) -> Report:
    """Group the inputs by model, and into groups that can be compared."""
    entries = _entries(inputs)
    groups = tuple(group for suite in _suites(inputs.results) for group in _groups(entries, suite))
    hashes = {str(entry.facts.get("sha256")) for entry in entries}
    ignored = [
        f"{kind} of {item.name} ({item.sha256[:12]}) ignored: no evaluation result has this model hash"
        for kind, items in (("latency", inputs.latencies), ("attacks", inputs.attacks))
        for item in items
        if item.sha256 not in hashes
    ]
    separate = [
        f"{', '.join(entry.label for entry in group.entries)} on {group.suite}: not compared, because "
        f"{group.why_separate}"
        for group in groups
        if group.why_separate
    ]
    gaps = (*separate, *ignored, *_metric_gaps(entries), *_missing_inputs(entries, groups))
    return Report(
        entries=entries,
        groups=groups,
        gaps=tuple(dict.fromkeys(gaps)),
        files=tuple((Path(name).name, sha256) for name, sha256 in inputs.files),
    )


def _suites(results: Sequence[Result]) -> list[str]:
    found = {str(result["suite"]): None for result in results}
    first = [suite for suite in ("imagenet", "cifar10", *CORRUPTED) if suite in found]
    return [*first, *sorted(set(found) - set(first))]


def _identity(model: Mapping[str, Any]) -> str:
    return json.dumps(model, sort_keys=True)


def _entries(inputs: Inputs) -> tuple[Entry, ...]:
    models: dict[str, dict[str, Result]] = {}
    for result in inputs.results:
        models.setdefault(_identity(result["model"]), {})[result["suite"]] = result
    references = {_identity(result["reference"]) for result in inputs.results if result["reference"]}
    facts = [next(iter(results.values()))["model"] for results in models.values()]
    labels = _labels(facts)
    found = [
        Entry(
            place=0,
            label=label,
            facts=own,
            results=results,
            latencies=tuple(item for item in inputs.latencies if item.sha256 == own.get("sha256")),
            attacks=tuple(item for item in inputs.attacks if item.sha256 == own.get("sha256")),
            is_reference=identity in references,
        )
        for (identity, results), own, label in zip(models.items(), facts, labels, strict=True)
    ]
    found.sort(key=lambda entry: not entry.is_reference)  # the reference comes first
    return tuple(dataclasses.replace(entry, place=place) for place, entry in enumerate(found))


def _labels(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of models; names that occur twice are followed by the facts that differ."""
    names = Counter(str(model["name"]) for model in models)
    labels: list[str] = []
    for model in models:
        name = str(model["name"])
        same = [other for other in models if str(other["name"]) == name]
        keys = [key for key in _DISTINGUISHING if len({str(other.get(key)) for other in same}) > 1]
        facts = ", ".join(str(model.get(key)) for key in keys)
        label = f"{name} ({facts})" if names[name] > 1 and facts else name
        numbered = (label if number == 1 else f"{label} {number}" for number in itertools.count(1))
        labels.append(next(label for label in numbered if label not in labels))
    return labels


def _groups(entries: Sequence[Entry], suite: str) -> list[Group]:
    shown: dict[str, list[Entry]] = {}
    for entry in entries:
        if suite in entry.results:
            shown.setdefault(json.dumps(comparable_facts(entry.results[suite]), sort_keys=True), []).append(entry)
    ordered = sorted(shown.values(), key=lambda members: -len(members))
    first = ordered[0][0]
    return [
        Group(
            suite=suite,
            entries=tuple(members),
            why_separate=why_separate(
                comparable_facts(first.results[suite]), comparable_facts(members[0].results[suite]), first.label
            ),
        )
        for members in ordered
    ]


_TASK_TITLES = {
    "cells": "number of cells",
    "images": "images",
    "names_sha256": "names or labels",
    "resize": "resize",
    "classes_asked": "classes to choose from",
    "table": "table of severities",
    "seed": "seed of the corruptions",
}
"""Keys of `comparable_facts` → titles for messages."""


def comparable_facts(result: Result) -> dict[str, Any]:
    """Return everything that must be equal for two results to be comparable."""
    settings, generated = result["settings"], result["settings"]["table"] is not None
    return {
        "cells": sorted(result["cells"]),
        "images": {name: cell["images"] for name, cell in result["cells"].items()},
        "names_sha256": {name: cell["names_sha256"] for name, cell in result["cells"].items()},
        "resize": {name: cell["resize"] for name, cell in result["cells"].items()},
        "classes_asked": settings["classes_asked"],
        "table": settings["table"],
        "seed": settings["seed"] if generated else None,
    }


def why_separate(first: Mapping[str, Any], other: Mapping[str, Any], first_label: str) -> str:
    """Return the first fact that differs between two results, as a phrase; "" if none does.

    Args:
        first: `comparable_facts` of one result.
        other: `comparable_facts` of the other one.
        first_label: name of the first model.
    """
    key = next((key for key in first if first[key] != other[key]), None)
    if key is None:
        return ""
    a, b = first[key], other[key]
    if isinstance(a, dict) and isinstance(b, dict):
        cell = next(name for name in a if a[name] != b.get(name))
        a, b = a[cell], b.get(cell)
    elif isinstance(a, list) and isinstance(b, list):
        a, b = len(a), len(b)
    detail = "" if key == "names_sha256" else f": {b} instead of {a}"  # hashes are of no use to a reader
    return f"its images differ from those of {first_label} ({_TASK_TITLES[key]}{detail})"


_OF_IMAGENET = ("mce_alexnet", "relative_mce_alexnet")
"""Metrics that other test sets need not have."""


def _has_own_mce(entry: Entry, result: Result) -> bool:
    """Return whether a result has an mCE relative to the reference, or is the reference's."""
    return "mce_reference" in result["metrics"] or (entry.is_reference and not result["reference"])


def _metric_gaps(entries: Sequence[Entry]) -> list[str]:
    """Return messages about missing metrics and outputs that were not finite."""
    gaps = []
    missing: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for entry in entries:
        for result in entry.results.values():
            for name in ("mce_alexnet", "relative_mce_alexnet", "mce_reference", "mean_error"):
                why = result["metrics"].get(name, {}).get("why_not")
                if why and not (name in _OF_IMAGENET and _has_own_mce(entry, result)):
                    names, labels = missing.setdefault((result["suite"], why), ({}, {}))
                    names[name] = labels[entry.label] = None
            not_finite = sum(cell["counts"]["not_finite"] for cell in result["cells"].values())
            if not_finite:
                gaps.append(
                    f"{entry.label} on {result['suite']}: {not_finite} outputs were not finite; they count as wrong"
                )
    return gaps + [
        f"no {', '.join(names)} for {', '.join(labels)} on {suite}: {why}"
        for (suite, why), (names, labels) in missing.items()
    ]


def _missing_inputs(entries: Sequence[Entry], groups: Sequence[Group]) -> list[str]:
    """Return messages about missing measurements, each with the command that adds it."""
    suites, gaps = {group.suite for group in groups}, []
    if not suites & set(CORRUPTED):
        gaps.append("no corruptions: run advprop eval --suite corruptions or --suite imagenet-c")
    if not any(result["reference"] for entry in entries for result in entry.results.values()):
        gaps.append("no comparison with a reference: run advprop eval --reference MODEL")
    if any(result["settings"]["imagenet_classes"] for entry in entries for result in entry.results.values()):
        others = [name for name in ("imagenet-a", "stylized") if name not in suites]
        gaps += [f"no {name}: run advprop eval --suite {name}" for name in others]
    if not any(entry.latencies for entry in entries):
        gaps.append("no latency, so no plots of accuracy against it: add files written by advprop bench")
    if not any(entry.attacks for entry in entries):
        gaps.append("no attacks, so no plots of accuracy against ε: add files written by advprop attack")
    return gaps
