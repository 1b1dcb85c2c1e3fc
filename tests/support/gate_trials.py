"""Simulated comparisons: pairs of models with a planted loss of accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.comparison import compare
from runtime.evaluate.counts import NANO, Answers, count
from runtime.evaluate.gate import Status, check, parse_condition
from runtime.evaluate.results import FORMAT, Result, finished

CONDITION = "top1 < baseline - 0.5"
ACCURACY = 0.8
CHURN = 0.02
"""Share of images that the models answer differently at equal accuracy, as after quantization."""


def answers(right_N: NDArray[np.bool_]) -> Answers:
    confidence_N = np.full(len(right_N), int(0.8 * NANO))
    return Answers(np.where(right_N, 0, 1), right_N, right_N, confidence_N)


def result(name: str, right_N: NDArray[np.bool_], reference_N: NDArray[np.bool_] | None) -> Result:
    """Return the result that an evaluation of these answers writes."""
    other = None if reference_N is None else answers(reference_N)
    counts = count(answers(right_N), np.arange(len(right_N)), other, calibration=True)
    settings = {"seed": 0, "limit": None, "table": None, "classes_asked": 10, "imagenet_classes": False}
    cell = {"images": len(right_N), "names_sha256": "", "resize": "fit", "parts": ["1/1"], "counts": counts.to_dict()}
    return finished(
        {
            "format": FORMAT,
            "suite": "clean",
            "model": {"name": name, "sha256": name},
            "reference": None if reference_N is None else {"name": "baseline", "sha256": "baseline"},
            "data": {"path": "simulated"},
            "settings": settings,
            "cells": {"images": cell},
        }
    )


def trial(random: np.random.Generator, images: int, loss: float) -> Status:
    """Return the outcome for one pair of models whose true accuracies differ by `loss` points."""
    baseline_N = random.random(images) < ACCURACY
    flips = CHURN / 2
    lost_N = random.random(images) < (flips + loss / 100) / ACCURACY
    gained_N = random.random(images) < flips / (1 - ACCURACY)
    model_N = np.where(baseline_N, ~lost_N, gained_N)
    results = [result("baseline", baseline_N, None), result("model", model_N, baseline_N)]
    (outcome,) = check([parse_condition(CONDITION)], compare(results, [], "baseline"))
    return outcome.status
