"""Train image classifiers with AdvProp, export them to ONNX and build TensorRT engines.

    import advprop

    fitted = advprop.fit(advprop.TrainConfig(arch="resnet18"))
    exported = advprop.export(fitted.best)
    session = advprop.load(exported.onnx)

Importing this package loads nothing else: each name imports its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from advprop.shadowing import PACKAGES, check_packages

if TYPE_CHECKING:
    from advprop.evaluation import evaluate
    from calib.config import CalibrationConfig
    from calib.pipeline import calibrate_file as calibrate
    from export.config import EngineConfig, ExportConfig
    from export.pipeline import export_checkpoint as export
    from runtime import errors
    from runtime.adapt.adapt import AdaptConfig
    from runtime.adapt.file import adapt_file as adapt
    from runtime.backends.options import EngineOptions, Threads
    from runtime.batching.batcher import Batching
    from runtime.engine.build import build
    from runtime.engine.options import BuildOptions
    from runtime.evaluate.cells import SuiteConfig
    from runtime.evaluate.run import RunConfig
    from runtime.loading import load
    from runtime.prediction import Prediction
    from runtime.session import Session
    from runtime.spec import ImageSizes, ModelSpec, Preprocessing
    from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig
    from train.loop import fit

__all__ = [
    "AdaptConfig",
    "AttackConfig",
    "Batching",
    "BuildOptions",
    "CalibrationConfig",
    "DataConfig",
    "EngineConfig",
    "EngineOptions",
    "ExportConfig",
    "ImageSizes",
    "ModelSpec",
    "OptimConfig",
    "Prediction",
    "Preprocessing",
    "RunConfig",
    "Session",
    "SuiteConfig",
    "Threads",
    "TrainConfig",
    "adapt",
    "build",
    "calibrate",
    "errors",
    "evaluate",
    "export",
    "fit",
    "load",
]

_HOMES = {
    "advprop.evaluation": ("evaluate",),
    "calib.config": ("CalibrationConfig",),
    "calib.pipeline": ("calibrate_file",),
    "export.config": ("EngineConfig", "ExportConfig"),
    "export.pipeline": ("export_checkpoint",),
    "runtime": ("errors",),
    "runtime.adapt.adapt": ("AdaptConfig",),
    "runtime.adapt.file": ("adapt_file",),
    "runtime.backends.options": ("EngineOptions", "Threads"),
    "runtime.batching.batcher": ("Batching",),
    "runtime.engine.build": ("build",),
    "runtime.engine.options": ("BuildOptions",),
    "runtime.evaluate.cells": ("SuiteConfig",),
    "runtime.evaluate.run": ("RunConfig",),
    "runtime.loading": ("load",),
    "runtime.prediction": ("Prediction",),
    "runtime.session": ("Session",),
    "runtime.spec": ("ImageSizes", "ModelSpec", "Preprocessing"),
    "train.config": ("AttackConfig", "DataConfig", "OptimConfig", "TrainConfig"),
    "train.loop": ("fit",),
}
_NAMES = {"adapt_file": "adapt", "calibrate_file": "calibrate", "export_checkpoint": "export"}
"""Names of functions in their modules → names here."""
_MODULES = {_NAMES.get(name, name): (module, name) for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'advprop' has no attribute {name!r}")
    module, attribute = _MODULES[name]
    package = module.partition(".")[0]
    # Only the packages that the module imports: a local train.py is no problem for `load`.
    check_packages(PACKAGES if package == "advprop" else PACKAGES[: PACKAGES.index(package) + 1])
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
