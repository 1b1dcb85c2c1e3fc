"""What was found about each image, block by block, and its journal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.evaluate.progress_log import Lines

__all__ = ["CLEAN", "Key", "OutcomeJournal", "Outcomes"]

CLEAN = "clean"
"""The attack that changes nothing; its ε is 0."""

Key = tuple[str, float, int]
"""Attack, ε in 1/255, and the number of a block of images."""

Outcomes = dict[str, tuple[NDArray[np.bool_], NDArray[np.int64]]]
"""Model → images still right, (N,), and how often it was asked about each, (N,)."""


class OutcomeJournal(Lines):
    """The finished attacks of one run, each on one block of images."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """As `Lines`."""
        self.done: dict[Key, Outcomes] = {}
        super().__init__(folder, plan)

    def add(self, key: Key, outcomes: Outcomes) -> None:
        """Notes a finished attack. Raises OutputError."""
        models = {
            name: {"right": right_N.astype(int).tolist(), "queries": queries_N.tolist()}
            for name, (right_N, queries_N) in outcomes.items()
        }
        self.write({"attack": key[0], "epsilon": key[1], "block": key[2], "models": models})

    def _take(self, entry: Any) -> None:
        key = (str(entry["attack"]), float(entry["epsilon"]), int(entry["block"]))
        self.done[key] = {
            str(name): (np.asarray(found["right"], np.int64).astype(bool), np.asarray(found["queries"], np.int64))
            for name, found in dict(entry["models"]).items()
        }
