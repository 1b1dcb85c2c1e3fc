"""Measure how often `advprop compare --fail-if` is wrong: false alarms, and losses that it misses.

    python -m benchmarks.gate

Each trial draws the answers of a baseline and of a model with a planted loss of accuracy, and
checks the condition `top1 < baseline - 0.5` with the code of the command. 200 seeded trials per
row; 20 seconds on one core. One row per number of images plants the loss that the command says
these images show in four of five cases. Results: docs/results/gate.md.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from runtime.evaluate.gate import Status
from tests.support.gate_trials import CHURN, trial

TRIALS = 200
IMAGES = (400, 2000, 10000)
LOSSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Planted losses, in percentage points."""


def reported_power(images: int) -> float:
    """Return the loss that the command says these images show in four of five cases, in points."""
    loss = 0.5
    for _ in range(20):
        loss = 0.5 + 280 * math.sqrt((CHURN + loss / 100) / images)
    return loss


def main() -> None:
    print(f"| images | true loss, points | {' | '.join(status.value for status in Status)} |")
    print("|---:|---:|---:|---:|---:|")
    for images in IMAGES:
        for loss in sorted((*LOSSES, reported_power(images))):
            random = np.random.default_rng([images, round(100 * loss)])
            found = Counter(trial(random, images, loss) for _ in range(TRIALS))
            shares = " | ".join(f"{found[status] / TRIALS:.1%}" for status in Status)
            print(f"| {images:,} | {loss:.2f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
