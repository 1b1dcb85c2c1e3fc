"""Write the page of `benchmarks.adapt` from its results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.evaluate.corruptions import CORRUPTIONS

KINDS = {"auto-32": "32 images", "auto-128": "128 images"}
FIXED = "fixed-128"
CELLS = 15 * 5
_WORSE = 0.01

INTRO = """# Adapting a deployed file to corrupted images

`advprop adapt` estimates the BatchNorm statistics of an exported file again, on unlabeled images of
the place where the model runs ([tutorial](../tutorials/adapt.md)). This page measures what that gains on corrupted
photographs, what it costs on clean ones, and whether its verdict is right.

EfficientNet-Lite0 with its real ImageNet weights (88 % top-1 without corruption; they are training
images), one image of each of 500 classes. A fixed draw divides them into {reference} images that the
export is verified on, 128 field images, and {test} test images: one test image is {step:.2f} points.
In each cell, the file is adapted to the corrupted field images, without labels, and tested on the
corrupted test images. The verdict sees the field images only.

```sh
python -m benchmarks.adapt imagenet_dev --out runs/adapt
python -m benchmarks.adapt imagenet_dev --out runs/adapt --report docs/results/adapt.md
```

Published mCE forbids adaptation. These errors must not be compared with it; `advprop eval --adapt N`
reports them as `mce_adapted_N`.
"""

SETTINGS = """## How the settings were chosen

The largest weight of the field images (a third), the reduction by the noise of each layer, and the
evidence from which images count as shifted (15 %) were chosen on speckle noise, Gaussian blur,
spatter and saturation, which are in no table above, and on clean images. The candidates were weights
of 1/5, 1/3, 1/2, 2/3 and 8/9 for all layers, and of 1/3, 1/2 and 1 reduced by noise. The test cells
were not used, but the photographs are the same, with other corruptions.

## Other networks and images

[Does AdvProp's gain survive adaptation?](adapt_cifar.md) adapts networks trained with and without
AdvProp to corrupted images of CIFAR-10. Nothing was chosen on them.

## Time

Adapting to 128 images, with the verdict, takes 3.0 times as long as running them on one core: the
median of twelve rounds, the largest is 3.1
(`python -m benchmarks.adapt imagenet_dev --out runs/adapt --time`, four times).

## Limits

One draw of images per network, and photographs of many classes. mCE of adapted networks trained with
AdvProp at ImageNet scale was not measured.
"""


def write_page(out: Path, target: Path) -> None:
    """Write the page and its picture `NAME.svg` in `images/`."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))}
    clean = results.pop("clean-0")
    cells = {tuple(result["cell"]): result for result in results.values() if result["cell"][0] in CORRUPTIONS}
    complete = {name for name in CORRUPTIONS if all((name, level) in cells for level in range(1, 6))}
    picture = target.parent.parent / "images" / f"{target.stem}.svg"
    _draw(cells, picture)
    test = clean["images"]
    parts = [
        INTRO.format(reference=500 - 128 - test, test=test, step=100 / test),
        _status(len(cells), len(complete)),
        _headline(clean, list(cells.values())),
        f"![Error by corruption, with and without adaptation](../images/{picture.name})\n",
        _by_corruption(cells),
        _verdicts(clean, list(cells.values())),
        _fixed_prior(clean, cells),
        _int8(out),
        SETTINGS,
    ]
    target.write_text("\n".join(part for part in parts if part))


def _status(cells: int, complete: int) -> str:
    if cells == CELLS:
        return ""
    return f"{cells} of the {CELLS} cells are measured so far; {complete} corruptions have all severities.\n"


def _headline(clean: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    rows = [["", "no adaptation", *KINDS.values()]]
    errors = [[1 - result["before"], *(1 - result[kind]["accuracy"] for kind in KINDS)] for result in cells]
    rows.append([f"mean error of {len(cells)} corrupted cells", *map(_percent, np.mean(errors, 0))])
    rows.append(["error on clean images", *map(_percent, _row(clean))])
    gained = np.mean(errors, 0)
    text = (
        f"Adapting to 128 images lowers the mean error by {100 * (gained[0] - gained[2]):.1f} points, to 32 images by "
        f"{100 * (gained[0] - gained[1]):.1f} points. The verdict refuses clean images.\n"
        if clean["auto-128"]["verdict"] == "NOT_SHIFTED"
        else ""
    )
    return "## Result\n\n" + _wrapped(text) + "\n" + _table(rows)


def _row(result: dict[str, Any]) -> list[float]:
    return [1 - result["before"], *(1 - result[kind]["accuracy"] for kind in KINDS)]


def _by_corruption(cells: dict[Any, dict[str, Any]]) -> str:
    rows = [["corruption", "severities", "no adaptation", *KINDS.values(), "largest gain", "smallest gain"]]
    for name in CORRUPTIONS:
        levels = [level for level in range(1, 6) if (name, level) in cells]
        if not levels:
            continue
        found = [cells[name, level] for level in levels]
        gains = [100 * (result["auto-128"]["accuracy"] - result["before"]) for result in found]
        means = np.mean([_row(result) for result in found], 0)
        severities = ", ".join(map(str, levels)) if len(levels) < 5 else "1–5"
        rows.append([name, severities, *map(_percent, means), f"{max(gains):+.1f}", f"{min(gains):+.1f}"])
    return (
        "Mean error of each corruption. The gains, in points, are those of single cells with 128 images.\n\n"
        + _table(rows)
    )


def _verdicts(clean: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    rows = [["images", "verdict", "cells", "better", "equal", "worse", "more than 1 point worse", "worst"]]
    for kind, title in KINDS.items():
        for adapts, verdict in ((True, "adapt"), (False, "do not adapt")):
            found = [result for result in (*cells, clean) if result[kind]["adapts"] is adapts]
            gains = [result[kind]["forced"] - result["before"] for result in found]
            counts = (
                sum(gain > 0 for gain in gains),
                sum(gain == 0 for gain in gains),
                sum(gain < 0 for gain in gains),
                sum(gain < -_WORSE for gain in gains),
            )
            worst = f"{100 * min(gains):+.1f}" if gains else ""
            rows.append([title, verdict, str(len(found)), *map(str, counts), worst])
    text = (
        "How often the adapted file was in fact better on the test images, whose labels the verdict does not see. "
        "The rows of “do not adapt” show what --force would have done.\n"
    )
    return "## Is the verdict right?\n\n" + _wrapped(text) + "\n" + _table(rows)


def _fixed_prior(clean: dict[str, Any], cells: dict[Any, dict[str, Any]]) -> str:
    found = [result for result in cells.values() if FIXED in result]
    if not found:
        return ""
    rows = [["", "no adaptation", "automatic prior", "prior of 16 images"]]
    means = 1 - np.mean([_forced(result) for result in found], 0)
    rows.append([f"mean error at severity 3, {len(found)} corruptions", *map(_percent, means)])
    rows.append(["error on clean images, with --force", *(_percent(1 - value) for value in _forced(clean))])
    text = (
        "A prior of 16 training images, as in the paper, gives 128 field images the weight 89 %. The noise of so few "
        "images then costs more than it has to.\n"
    )
    return "## Compared with a fixed prior\n\n" + _wrapped(text) + "\n" + _table(rows)


def _forced(result: dict[str, Any]) -> list[float]:
    return [result["before"], result["auto-128"]["forced"], result[FIXED]["forced"]]


def _int8(out: Path) -> str:
    found = {path.stem: json.loads(path.read_text()) for path in sorted((out / "int8").glob("*.json"))}
    if not found:
        return ""
    names = list(next(iter(found.values())))
    rows = [["error", *names]]
    for cell, values in found.items():
        name, severity = cell.rsplit("-", 1)
        rows.append([f"{name}, severity {severity}", *(_percent(1 - values[key]) for key in names)])
    means = np.mean([[1 - values[key] for key in names] for values in found.values()], 0)
    rows.append(["mean", *map(_percent, means)])
    old, new = (means[names.index(f"adapted INT8, {which} thresholds")] for which in ("old", "new"))
    text = (
        "Old thresholds are those of the original file on clean images, new ones those of the adapted file on its "
        f"field images, both by the default method on 64 images. New thresholds change the mean error by "
        f"{100 * (new - old):+.1f} points.\n"
    )
    command = "```sh\npython -m benchmarks.adapt imagenet_dev --out runs/adapt --int8\n```\n"
    return "## Do INT8 thresholds still serve?\n\n" + _wrapped(text) + "\n" + command + "\n" + _table(rows)


def _draw(cells: dict[Any, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "advprop"
    names = [name for name in CORRUPTIONS if any(name == cell[0] for cell in cells)]
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for number, name in enumerate(names):
        found = [result for cell, result in cells.items() if cell[0] == name]
        for offset, (key, color) in enumerate((("before", "#8a8f98"), ("auto-32", "#7fb2e5"), ("auto-128", "#1f5fa8"))):
            errors = [1 - (result[key] if key == "before" else result[key]["accuracy"]) for result in found]
            label = ("no adaptation", *KINDS.values())[offset] if number == 0 else None
            axes.bar(number + 0.27 * (offset - 1), 100 * np.mean(errors), 0.25, color=color, label=label)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=45, ha="right")
    axes.set_ylabel("mean error in %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100) + "\n" if text else ""
