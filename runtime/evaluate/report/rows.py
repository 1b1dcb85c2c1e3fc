"""`Report`: models with all that was measured on them, and which of it may be compared."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.evaluate.cells import CLEAN, IMAGES
from runtime.evaluate.report.inputs import Inputs
from runtime.evaluate.report.measured import Attack, Latency
from runtime.evaluate.results import Result

__all__ = ["CORRUPTED", "Entry", "Group", "Report", "main_cell", "report_of"]

CORRUPTED = ("imagenet-c", "corruptions", "cifar10-c")
"""Suites with corruptions and severities, in the order in which they are preferred."""

_TELLING = ("precision", "route", "arithmetic", "device", "backend", "weights", "sha256")
"""Facts that tell models of one name apart, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A model."""

    place: int
    """Its number in the report, from 0: its color and marker."""
    label: str
    """Its name, with what tells it from another of the same name."""
    facts: Mapping[str, Any]
    """What results say of it."""
    results: Mapping[str, Result]
    """By suite."""
    latencies: tuple[Latency, ...] = ()
    attacks: tuple[Attack, ...] = ()
    is_reference: bool = False
    """Whether others were compared with it."""

    @property
    def precision(self) -> str:
        """fp32, fp16, int8, …; "" where results do not say."""
        return str(self.facts.get("precision") or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Models that were shown the very same images of a suite, and may be compared on it."""

    suite: str
    entries: tuple[Entry, ...]
    apart: str = ""
    """Why it is not compared with the suite's first group; "" of that group itself."""

    @property
    def results(self) -> list[tuple[Entry, Result]]:
        return [(entry, entry.results[self.suite]) for entry in self.entries]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a page is made of."""

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    """Of each suite the largest first."""
    gaps: tuple[str, ...]
    """What is not there, or not compared, and why."""
    files: tuple[tuple[str, str], ...]
    """Name and SHA-256 of what it was made of."""

    def suites(self) -> list[str]:
        """The suites that something was measured on."""
        return list(dict.fromkeys(group.suite for group in self.groups))

    def apart(self, entry: Entry, suite: str) -> str:
        """Why an entry's numbers on a suite are not compared with the others'; "" where they are."""
        return next((group.apart for group in self.groups if group.suite == suite and entry in group.entries), "")


def main_cell(result: Result) -> str | None:
    """The cell of images that are not corrupted here: the set's own, or the clean ones beside it."""
    return next((cell for cell in (IMAGES, CLEAN) if cell in result["cells"]), None)


def report_of(inputs: Inputs) -> Report:
    """Puts together what belongs together."""
    entries = _entries(inputs)
    groups = tuple(group for suite in _suites(inputs.results) for group in _groups(entries, suite))
    hashes = {str(entry.facts.get("sha256")) for entry in entries}
    strangers = [
        f"{kind} of {item.name} ({item.sha256[:12]}) left out: no result is of a model with that hash"
        for kind, items in (("latency", inputs.latencies), ("attacks", inputs.attacks))
        for item in items
        if item.sha256 not in hashes
    ]
    apart = [
        f"{', '.join(entry.label for entry in group.entries)} on {group.suite}: {group.apart}; not compared"
        for group in groups
        if group.apart
    ]
    return Report(
        entries=entries, groups=groups, gaps=(*apart, *strangers, *_missing(entries, groups)), files=inputs.files
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
    wanted = {_identity(result["reference"]) for result in inputs.results if result["reference"]}
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
            is_reference=identity in wanted,
        )
        for (identity, results), own, label in zip(models.items(), facts, labels, strict=True)
    ]
    found.sort(key=lambda entry: not entry.is_reference)  # the reference comes first
    return tuple(dataclasses.replace(entry, place=place) for place, entry in enumerate(found))


def _labels(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names, with the facts that differ where several models have the same one."""
    names = Counter(str(model["name"]) for model in models)
    labels = []
    for model in models:
        name = str(model["name"])
        same = [other for other in models if str(other["name"]) == name]
        telling = [key for key in _TELLING if len({str(other.get(key)) for other in same}) > 1]
        extra = ", ".join(str(model.get(key))[: 8 if key == "sha256" else None] for key in telling)
        labels.append(f"{name} ({extra})" if names[name] > 1 else name)
    return labels


def _groups(entries: Sequence[Entry], suite: str) -> list[Group]:
    shown: dict[str, list[Entry]] = {}
    for entry in entries:
        if suite in entry.results:
            shown.setdefault(json.dumps(_images(entry.results[suite]), sort_keys=True), []).append(entry)
    ordered = sorted(shown.values(), key=lambda members: -len(members))
    first = _images(ordered[0][0].results[suite])
    beside = ordered[0][0].label
    return [
        Group(suite=suite, entries=tuple(members), apart=_why(first, _images(members[0].results[suite]), beside))
        for members in ordered
    ]


def _images(result: Result) -> dict[str, Any]:
    """All that must be equal for two models to have been asked the same."""
    settings, made = result["settings"], result["settings"]["table"] is not None
    return {
        "cells": sorted(result["cells"]),
        "images": {name: cell["images"] for name, cell in result["cells"].items()},
        "names and labels": {name: cell["names_sha256"] for name, cell in result["cells"].items()},
        "resize": {name: cell["resize"] for name, cell in result["cells"].items()},
        "classes asked": settings["classes_asked"],
        "table of severities": settings["table"],
        "seed of the corruptions": settings["seed"] if made else None,
    }


def _why(first: Mapping[str, Any], other: Mapping[str, Any], beside: str) -> str:
    key = next((key for key in first if first[key] != other[key]), None)
    if key is None:
        return ""
    a, b = first[key], other[key]
    if isinstance(a, dict) and isinstance(b, dict):
        cell = next(name for name in a if a[name] != b.get(name))
        a, b = a[cell], b.get(cell)
    elif isinstance(a, list) and isinstance(b, list):
        a, b = len(a), len(b)
    if key == "names and labels":
        return f"other images than {beside} (their names or labels differ)"
    return f"other images than {beside} ({key}: {b} instead of {a})"


def _missing(entries: Sequence[Entry], groups: Sequence[Group]) -> list[str]:
    results = [(entry, result) for entry in entries for result in entry.results.values()]
    there, gaps = {group.suite for group in groups}, []
    without: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for entry, result in results:
        for name in ("mce_alexnet", "relative_mce_alexnet", "mean_error"):
            why = result["metrics"].get(name, {}).get("why_not")
            if why:
                names, labels = without.setdefault((result["suite"], why), ({}, {}))
                names[name] = labels[entry.label] = None
        wrong = sum(cell["counts"]["not_finite"] for cell in result["cells"].values())
        if wrong:
            gaps.append(f"{entry.label} on {result['suite']}: {wrong} answers were not finite; they count as wrong")
    gaps += [
        f"no {', '.join(names)} of {', '.join(labels)} on {suite}: {why}"
        for (suite, why), (names, labels) in without.items()
    ]
    if not there & set(CORRUPTED):
        gaps.append("no corruptions: advprop eval --suite corruptions or imagenet-c")
    if not any(result["reference"] for _, result in results):
        gaps.append("no change against a reference: advprop eval --reference MODEL compares image by image")
    gaps += [f"no {name}: advprop eval --suite {name}" for name in ("imagenet-a", "stylized") if name not in there]
    for title, there_are in (
        ("latency, so no pictures of accuracy against it", any(entry.latencies for entry in entries)),
        ("attacks, so no accuracy against ε", any(entry.attacks for entry in entries)),
    ):
        if not there_are:
            gaps.append(f"no {title}: no file with them was given")
    return list(dict.fromkeys(gaps))
