"""Write the page of `benchmarks.adapt_cifar` from its results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fidelity.report import table
from benchmarks.fidelity.results import Difference, paired, spread
from runtime.errors import DataError
from runtime.system.files import write_text

COUNTS = ("32", "128", "512")
MIXED = "128"
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CLEAN = "clean-0"
_WORSE = 0.01

Cells = dict[str, dict[str, Any]]
"""Cell, such as `fog-3` → its results."""

INTRO = (
    "This page adapts the exported files of the [fidelity study](fidelity.md) (`cifar_resnet20`, vanilla and AdvProp, "
    "{seeds} seeds each) to corrupted images of CIFAR-10: fifteen corruptions at {severities}. In each "
    "cell, `advprop adapt` sees 32, 128 or 512 field images without labels, and 1,024 other images test the result. If "
    "the verdict refuses, the original file counts."
)

COMMANDS = """```sh
python -m benchmarks.adapt_cifar runs/fidelity --data cifar10 --out runs/adapt-cifar
python -m benchmarks.adapt_cifar runs/fidelity --data cifar10 --out runs/adapt-cifar --routes
python -m benchmarks.adapt_cifar runs/fidelity --out runs/adapt-cifar \\
    --report docs/results/adapt_cifar.md
```"""


def read_cells(out: Path) -> dict[str, Cells]:
    """Return model → the cells that all models of its kind have."""
    found: dict[str, Cells] = {}
    for path in sorted(out.glob("cells/*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    if not found:
        raise DataError(f"{out} has no results; run the command without --report first")
    for kind in ("mixture", ""):
        names = [name for name in found if name.startswith("mixture") == bool(kind)]
        common = set.intersection(*(set(found[name]) for name in names)) if names else set()
        found |= {name: {cell: found[name][cell] for cell in sorted(common)} for name in names}
    return found


def write_page(out: Path, page: Path) -> None:
    """Write the page.

    Raises:
        DataError: there are no results.
        OutputError: the page cannot be written.
    """
    found = read_cells(out)
    seeds = [name for name in found if name.startswith("advprop-")]
    severities = _severities(cell for cell in found[seeds[0]] if cell != CLEAN)
    parts = [
        "# Does AdvProp's gain survive adaptation?",
        INTRO.format(seeds=len(seeds), severities=severities),
        COMMANDS,
        "## Vanilla and AdvProp",
        _recipes(found),
        "## By kind of corruption",
        _groups(found),
        "## Is the verdict right?",
        _verdicts(found),
    ]
    if any(name.startswith("mixture") for name in found):
        parts += ["## The auxiliary route as the prior", _mixtures(found)]
    write_text(page, "\n\n".join(map(_wrapped, parts)) + "\n")


def _severities(cells: Iterable[str]) -> str:
    found = sorted({cell.rpartition("-")[2] for cell in cells})
    return ("severity " if len(found) == 1 else "severities ") + ", ".join(found)


def _wrapped(block: str) -> str:
    prose = not block.startswith(("|", "#", "```"))
    return "\n\n".join(
        textwrap.fill(part, 100, break_on_hyphens=False) if prose and not part.startswith(("|", "```")) else part
        for part in block.split("\n\n")
    )


def _error(cells: Cells, count: str, selects: Callable[[str], bool]) -> float:
    """Return the mean error of the selected cells, in percent; `count` is "" without adaptation."""
    accuracies = [
        result[count]["accuracy"] if count else result["before"] for cell, result in cells.items() if selects(cell)
    ]
    return 100 * (1 - float(np.mean(accuracies)))


def _by_seed(found: dict[str, Cells], recipe: str, count: str, selects: Callable[[str], bool]) -> dict[int, float]:
    names = [name for name in found if name.startswith(f"{recipe}-")]
    return {int(name.rpartition("-")[2]): _error(found[name], count, selects) for name in names}


def _gain(found: dict[str, Cells], count: str, selects: Callable[[str], bool]) -> Difference | None:
    """Return the error of vanilla minus that of AdvProp."""
    return paired(_by_seed(found, "vanilla", count, selects), _by_seed(found, "advprop", count, selects))


def _recipes(found: dict[str, Cells]) -> str:
    counts = ("", *COUNTS)
    header = ["", "no adaptation", *(f"{count} images" for count in COUNTS)]
    rows = []
    for title, selects in (
        ("corruption error", lambda cell: cell != CLEAN),
        ("clean error", lambda cell: cell == CLEAN),
    ):
        rows += [
            [f"{recipe}, {title}", *(spread(_by_seed(found, recipe, count, selects)) for count in counts)]
            for recipe in ("vanilla", "advprop")
        ]
        rows.append([f"gain of AdvProp, {title}", *(str(_gain(found, count, selects)) for count in counts)])
    return (
        _headline(found) + "\n\nPercent: mean ± standard deviation over seeds; gains in points with their 95 % "
        "interval over seeds. Errors on clean images show whether the verdict refuses what is not shifted.\n\n"
        + table(header, rows)
    )


def _headline(found: dict[str, Cells]) -> str:
    def mean(recipe: str, count: str) -> float:
        return float(np.mean(list(_by_seed(found, recipe, count, lambda cell: cell != CLEAN).values())))

    changes = {recipe: mean(recipe, "") - mean(recipe, MIXED) for recipe in ("vanilla", "advprop")}
    gains = [mean("vanilla", count) - mean("advprop", count) for count in ("", MIXED)]
    both = mean("vanilla", "") - mean("advprop", MIXED)
    return (
        f"Adapting to {MIXED} images lowers the corruption error of vanilla by {changes['vanilla']:.1f} points, and "
        f"that of AdvProp by {changes['advprop']:.1f}. The mean gain of AdvProp is {gains[0]:.1f} points without "
        f"adaptation and {gains[1]:.1f} with it. Both together lower the error by {both:.1f} points."
    )


def _groups(found: dict[str, Cells]) -> str:
    rows = []
    for group, names in GROUPS.items():

        def selects(cell: str, names: Iterable[str] = names) -> bool:
            return cell.rpartition("-")[0] in names

        row = [group]
        for recipe in ("vanilla", "advprop"):
            row += [spread(_by_seed(found, recipe, count, selects)) for count in ("", MIXED)]
        rows.append([*row, *(str(_gain(found, count, selects)) for count in ("", MIXED))])
    header = ["corruptions", "vanilla", f"vanilla, {MIXED} images", "advprop", f"advprop, {MIXED} images"]
    return "Mean error in percent, and gain of AdvProp in points.\n\n" + table(
        [*header, "gain", f"gain, {MIXED} images"], rows
    )


def _verdicts(found: dict[str, Cells]) -> str:
    rows = []
    for recipe in ("vanilla", "advprop"):
        for count in COUNTS:
            for adapts in (True, False):
                changes = [
                    result[count]["forced"] - result["before"]
                    for name in found
                    if name.startswith(f"{recipe}-")
                    for result in found[name].values()
                    if (result[count]["verdict"] in ("ADAPT", "LARGER_PRIOR")) == adapts
                ]
                if changes:
                    numbers = (
                        len(changes),
                        sum(change > 0 for change in changes),
                        sum(change < 0 for change in changes),
                        sum(change < -_WORSE for change in changes),
                    )
                    verdict = "adapt" if adapts else "do not adapt"
                    worst = f"{100 * min(changes):+.1f}".replace("-", "−")
                    rows.append([recipe, count, verdict, *map(str, numbers), worst])
    return (
        "How often the adapted file was in fact better on the test images. The rows of “do not adapt” show what "
        "--force would have done. The last column is the smallest change of accuracy, in points.\n\n"
        + table(
            ["network", "images", "verdict", "cells", "better", "worse", "more than 1 point worse", "smallest change"],
            rows,
        )
    )


def _mixtures(found: dict[str, Cells]) -> str:
    """Return the table of mixtures of main and auxiliary BatchNorms, and of choices between them."""
    seeds = sorted({name.split("-")[1] for name in found if name.startswith("mixture")})
    shares = sorted({int(name.split("-")[2]) for name in found if name.startswith("mixture")})
    by_seed = {seed: {share: found[f"mixture-{seed}-{share}"] for share in shares} for seed in seeds}
    cells = [cell for cell in next(iter(by_seed.values()))[0] if cell != CLEAN]

    def mean(choose: Callable[[dict[int, Cells], str], float]) -> str:
        return spread(
            {int(seed): 100 - 100 * float(np.mean([choose(by_seed[seed], cell) for cell in cells])) for seed in seeds}
        )

    rows = []
    for share in shares:

        def before(models: dict[int, Cells], cell: str, share: int = share) -> float:
            return float(models[share][cell]["before"])

        def after(models: dict[int, Cells], cell: str, share: int = share) -> float:
            return float(models[share][cell][MIXED]["accuracy"])

        clean = spread({int(seed): 100 - 100 * by_seed[seed][share][CLEAN]["before"] for seed in seeds})
        rows.append([f"{share} %", clean, mean(before), mean(after)])

    def chosen(key: Callable[[dict[str, Any]], float]) -> str:
        def accuracy(models: dict[int, Cells], cell: str) -> float:
            best = min(shares, key=lambda share: key(models[share][cell]))
            return float(models[best][cell][MIXED]["accuracy"])

        return mean(accuracy)

    rows += [
        ["chosen in each cell by the smallest shift", "–", "–", chosen(lambda result: result[MIXED]["shift"])],
        ["chosen by the lowest entropy", "–", "–", chosen(lambda result: result[MIXED]["entropy_after"])],
        ["chosen by the labels (a bound)", "–", "–", chosen(lambda result: -result[MIXED]["accuracy"])],
    ]
    return (
        "The prior of an adaptation need not be the main BatchNorm: these files have statistics and affine parameters "
        "of (1 − share) · main + share · auxiliary. Each is adapted to 128 images. Error in percent, at "
        f"{_severities(cells)}. `advprop adapt` starts from the main BatchNorm only: a choice without labels gains "
        "little.\n\n" + table(["share of the auxiliary route", "clean", "corruptions", "corruptions, 128 images"], rows)
    )
