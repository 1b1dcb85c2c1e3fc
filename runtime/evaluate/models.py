"""`Model`: whatever is evaluated. A model file, a checkpoint, or any function from images to logits.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.open import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES
from runtime.errors import ConfigError, SpecError
from runtime.loading import load
from runtime.preprocessing import network_input, normalize
from runtime.session import Session
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file
from runtime.system.lazy import elsewhere

__all__ = ["CHECKPOINT_LOADER", "Model", "ModelSource", "load_model", "load_models", "model_of"]

CHECKPOINT_LOADER = "advprop.checkpoints.predictor:load_predictor"
"""What loads checkpoints: imported when there is one, since the runtime depends on nothing else of ours."""

_SMALLEST = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A classifier to evaluate."""

    name: str
    """What tables and file names call it."""
    spec: ModelSpec
    """Its classes, and how images are made its input."""
    logits: Callable[[NDArray[np.uint8]], NDArray[Any]]
    """uint8 RGB at the network's size, (N, H, W, 3) → logits, (N, K). The log of probabilities will do too."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a result says of it: `sha256`, how it is run, …; plain values."""
    size_open: bool = False
    """Whether it takes images of other sizes than its spec's."""


def model_of(
    name: str,
    spec: ModelSpec,
    predict: Callable[[NDArray[np.float32]], NDArray[Any]],
    facts: Mapping[str, Any] | None = None,
    *,
    size_open: bool = False,
) -> Model:
    """Makes a model of a function from normalized float32 images, (N, 3, H, W), to logits, (N, K)."""

    def logits(images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        return predict(normalize(images_NHWC, spec.preprocessing))

    return Model(name=name, spec=spec, logits=logits, facts=facts or {}, size_open=size_open)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """What `load_model` needs to load a model, in this process or another."""

    path: Path
    """`.pt` and `.pth` files are checkpoints."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    threads: int = 0
    """CPU threads inside one run; 0 leaves it to the backend."""
    route: str = "main"
    """BatchNorm route of a checkpoint."""
    exact: bool = True
    """On a CPU, compute ONNX files as a GPU rounds them."""

    def load(self) -> Model:
        """Loads it. Raises as `load_model` does."""
        return load_model(self.path, device=self.device, threads=self.threads, route=self.route, exact=self.exact)


def load_model(path: Path, *, device: str = "auto", threads: int = 0, route: str = "main", exact: bool = True) -> Model:
    """Loads a model file, an engine, or a checkpoint.

    Args:
        path: `.pt` and `.pth` files are checkpoints.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads inside one run; 0 leaves it to the backend.
        route: BatchNorm route of a checkpoint.
        exact: on a CPU, compute ONNX files as a GPU rounds them: Q/DQ nodes as they are written, FP16 tensors in FP16.
            Else ONNX Runtime chooses its kernels, of which those for INT8 saturate on some CPUs, and those for FP16
            round nothing.

    Raises:
        InputError: no such file, not a model, no such route, or one that does not describe itself.
        BackendUnavailable: what runs it is missing.
    """
    if path.suffix in CHECKPOINT_SUFFIXES:
        return _checkpoint(path, device, route)
    if path.suffix in ENGINE_SUFFIXES:
        session = load(path, device=device, threads=threads)
        return _of_session(session, path, {"kind": "engine", "sha256": sha256_file(path)})
    return _onnx(path, device, threads, exact)


def load_models(
    load: Callable[..., Model], paths: Sequence[Path], reference: Path | None, routes: Sequence[str] = ("main",)
) -> tuple[list[Model], Model | None]:
    """Loads models, and the one that they are compared with: each once, under names that tell them apart.

    Args:
        load: `load_model`, or what does as it does, called with a path and `route`.
        paths: checkpoints are loaded by each of `routes`.
        reference: a checkpoint is loaded by the first of `routes`.
        routes: BatchNorm routes of checkpoints.

    Raises:
        ConfigError: the same file twice.
    """
    known: dict[tuple[Path, str], Model] = {}

    def keys(path: Path) -> list[tuple[Path, str]]:
        return [(path.resolve(), route) for route in (routes if path.suffix in CHECKPOINT_SUFFIXES else ("main",))]

    pairs = [(path, key) for path in paths for key in keys(path)]
    for path, key in (*pairs, *([(reference, keys(reference)[0])] if reference else [])):
        if key not in known:
            known[key] = load(path, route=key[1])
    names = Counter(model.name for model in known.values())
    for key, model in known.items():
        if names[model.name] > 1:
            known[key] = dataclasses.replace(model, name=f"{model.name}-{model.facts['sha256'][:8]}")
    models = list({id(model): model for model in (known[key] for _, key in pairs)}.values())
    if len({model.name for model in models}) < len(models):
        raise ConfigError("two of the models are the same file; give each once")
    return models, known[keys(reference)[0]] if reference else None


def _onnx(path: Path, device: str, threads: int, exact: bool) -> Model:
    from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
    from runtime.backends.options import Threads
    from runtime.graph.summary import summarize

    summary = summarize(path)
    session = Session(OnnxRuntimeBackend(path, device, Threads(intra=threads), exact=exact), path)
    facts = {
        "kind": "onnx",
        "sha256": summary.sha256,
        "size_bytes": summary.size_bytes,
        "precision": summary.precision,
        "calibration_sha256": summary.calibration_sha256,
        "arithmetic": "as written, every rounding done" if exact else "ONNX Runtime's choice of kernels",
    }
    return _of_session(session, path, facts)


def _of_session(session: Session, path: Path, facts: dict[str, Any]) -> Model:
    spec, backend = session.spec, session.backend
    if spec.output_form == "topk":
        raise SpecError(f"{path} gives the largest few probabilities only; evaluate one exported without --output topk")

    def logits(images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        batch = network_input(images_NHWC, spec.preprocessing, spec.input_form)
        answers_NK = session.run(batch.astype(backend.input.dtype, copy=False))
        if spec.output_form == "probs":
            return np.log(np.maximum(answers_NK.astype(np.float64), _SMALLEST))
        return answers_NK

    facts |= {
        "arch": spec.arch,
        "backend": backend.name,
        "device": backend.device,
        "route": spec.route,
        "checkpoint_sha256": spec.checkpoint_sha256,
    }
    places = backend.input.shape[1:3] if spec.input_form.endswith("NHWC") else backend.input.shape[2:]
    return Model(name=path.stem, spec=spec, logits=logits, facts=facts, size_open=min(places) < 0)


def _checkpoint(path: Path, device: str, route: str) -> Model:
    loader = elsewhere(CHECKPOINT_LOADER, f"evaluating the checkpoint {path}", "evaluate its ONNX file")
    spec, predict, size_open, facts = loader(path, route=route, device=device)
    return model_of(f"{path.stem}.{route}", spec, predict, facts, size_open=size_open)
