"""What a result says of how it was made: everything that its counts follow from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.models import Model
from runtime.evaluate.results import FORMAT
from runtime.evaluate.suites import Suite
from runtime.spec import ModelSpec

__all__ = ["alike", "describe", "described", "difference", "versions_of"]


def alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two models can be shown the very same images: their size, crop and classes are the same."""
    return _geometry(one) == _geometry(other) and (one.classes, one.wnids) == (other.classes, other.wnids)


def _geometry(spec: ModelSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec.preprocessing)
    # Normalization is each model's own; but padding is with the mean.
    return {
        key: fields[key]
        for key in fields
        if key != "std" and (key != "mean" or spec.preprocessing.crop_mode == "border")
    }


def describe(
    model: Model, reference: Model | None, suite: Suite, config: SuiteConfig, batch_size: int, shard: str
) -> dict[str, Any]:
    """Returns a result without counts: JSON's own kinds of values, in the order in which they are read."""
    return {
        "format": FORMAT,
        "suite": suite.name,
        "model": described(model),
        "reference": None if reference is None else described(reference),
        "data": {
            "path": str(config.data),
            "clean": None if config.clean is None else str(config.clean),
            "skipped": list(suite.skipped),
        },
        "settings": {
            "seed": suite.seed,
            "limit": config.limit,
            "table": suite.table,
            "classes_asked": len(suite.classes or model.spec.classes),
            "imagenet_classes": len(model.spec.wnids) == len(model.spec.classes) == 1000,
            "batch_size": batch_size,
            "preprocessing": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(model.spec.preprocessing).items()
            },
        },
        "versions": _versions(model, suite),
        "cells": {
            cell.id: {
                "images": len(cell.images),
                "names_sha256": cell.images.sha256,
                "resize": cell.resize,
                "parts": [shard],
            }
            for cell in suite.cells
        },
    }


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Says what differs first in two descriptions: `model.sha256 is 'a' and not 'b', as`; "" where nothing does."""
    for key in dict.fromkeys([*other, *one]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = difference(a, b)
            if inner:
                return f"{key}.{inner}"
        elif a != b:
            return f"{key} is {a!r} and not {b!r}, as"
    return ""


def described(model: Model) -> dict[str, Any]:
    """Returns what a result says of a model."""
    return {"name": model.name, "classes": len(model.spec.classes), **model.facts}


def versions_of(model: Model) -> dict[str, str]:
    """Returns the versions of what decodes images and runs a model."""
    import PIL

    found = {"advprop": _installed("advprop"), "numpy": np.__version__, "pillow": PIL.__version__}
    if model.facts.get("backend") == "onnxruntime":
        found["onnxruntime"] = _installed("onnxruntime-gpu") or _installed("onnxruntime")
    return found


def _versions(model: Model, suite: Suite) -> dict[str, str]:
    found = versions_of(model)
    if suite.table is not None:
        import cv2
        import scipy

        found |= {"opencv": cv2.__version__, "scipy": scipy.__version__}
    return found


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
