"""`evaluate`, which measures model files and checkpoints on a test set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from advprop.checkpoints import load_predictor
from runtime.evaluate.models import Model, load_model, load_models
from runtime.evaluate.run import RunConfig
from runtime.evaluate.run import evaluate as evaluate_models

if TYPE_CHECKING:
    from runtime.evaluate.cells import SuiteConfig
    from runtime.evaluate.results import Result

__all__ = ["evaluate"]

_File: TypeAlias = str | PathLike[str]


def evaluate(
    models: _File | Sequence[_File],
    suite: SuiteConfig,
    run: RunConfig | None = None,
    *,
    reference: _File | None = None,
    device: str = "auto",
    threads: int = 0,
) -> list[Result]:
    """Evaluate model files and checkpoints on a test set, like `advprop eval`.

    A script that calls this needs `if __name__ == "__main__":`, because the worker processes that
    decode images import it.

    Args:
        models: an ONNX file, an engine or a checkpoint, or several of them.
        suite: the test set, such as `SuiteConfig(name="corruptions", data="photos/val")`.
        run: settings of the run (default: a progress log in the folder `evaluation`).
        reference: model that the others are compared with, image by image.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads of ONNX Runtime; 0 uses all cores.

    Returns:
        One result per model, in the same order. `result["metrics"]` contains the accuracy;
        `runtime.evaluate.write_result` writes it for `advprop report`.

    Raises:
        AdvPropError: see `runtime.evaluate.load_model` and `runtime.evaluate.evaluate`.
    """
    files = [models] if isinstance(models, str | PathLike) else models

    def load(path: Path, route: str = "main") -> Model:
        return load_model(path, device=device, threads=threads, route=route, checkpoint_loader=load_predictor)

    loaded, compared = load_models(load, [Path(file) for file in files], None if reference is None else Path(reference))
    suite = dataclasses.replace(suite, data=Path(suite.data), clean=None if suite.clean is None else Path(suite.clean))
    return evaluate_models(loaded, suite, run or RunConfig(out=Path("evaluation")), reference=compared)
