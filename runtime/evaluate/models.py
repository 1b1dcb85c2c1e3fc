"""`Model`: a classifier to evaluate, created from a model file, a checkpoint or a function.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.backends.open import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES
from runtime.errors import ConfigError, SpecError
from runtime.evaluate.names import ModelPath, find_model, unique_names
from runtime.loading import load
from runtime.preprocessing import Preprocessor, normalize
from runtime.session import Session
from runtime.spec import METADATA_KEY, ModelSpec
from runtime.system.files import sha256_file

__all__ = [
    "CheckpointLoader",
    "Model",
    "ModelSource",
    "load_model",
    "load_models",
    "model_of",
    "same_inputs",
    "with_adapted",
]

_TINY = np.finfo(np.float32).tiny

Predict: TypeAlias = Callable[[NDArray[np.float32]], NDArray[Any]]
"""Normalized images, (N, 3, H, W) → logits, (N, K)."""


Logits: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[Any]]
"""uint8 RGB at the network's input size, (N, H, W, 3) → logits or log-probabilities, (N, K)."""

Adapt: TypeAlias = Callable[[NDArray[np.uint8]], tuple[Logits, bool]]
"""Field images, (N, H, W, 3) → the logits of the model that is adapted to them, and True; or those of
the original model, and False, if the verdict is not to adapt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A classifier to evaluate."""

    name: str
    """Name in tables and file names."""
    spec: ModelSpec
    """Its classes and preprocessing."""
    logits: Logits
    """Returns logits or log-probabilities."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts that a result records, such as `sha256` and `backend`; plain values."""
    size_open: bool = False
    """Whether it accepts image sizes other than its spec's."""
    adapt: Adapt | None = None
    """Adapts the model to images like those of `logits`; None for models that cannot be adapted."""
    field_images: int = 0
    """Number of images of each cell that it is adapted to before it is tested; 0 for none."""
    is_adapted: bool = False
    """Whether `logits` are those of an adapted model."""


def model_of(
    name: str,
    spec: ModelSpec,
    predict: Predict,
    facts: Mapping[str, Any] | None = None,
    *,
    size_open: bool = False,
) -> Model:
    """Create a model from a function from normalized images, (N, 3, H, W), to logits, (N, K)."""

    def logits(images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        return predict(normalize(images_NHWC, spec.preprocessing))

    return Model(name=name, spec=spec, logits=logits, facts=facts or {}, size_open=size_open)


def same_inputs(one: ModelSpec, other: ModelSpec) -> bool:
    """Return whether two models can share images: input size, crop and classes are equal."""
    return _geometry(one) == _geometry(other) and (one.classes, one.wnids) == (other.classes, other.wnids)


def _geometry(spec: ModelSpec) -> dict[str, Any]:
    """Return the preprocessing without normalization, which each model applies itself."""
    fields = dataclasses.asdict(spec.preprocessing)
    # Images are padded with the mean, so it matters if there is padding.
    return {
        key: fields[key]
        for key in fields
        if key != "std" and (key != "mean" or spec.preprocessing.crop_mode == "border")
    }


class CheckpointLoader(Protocol):
    """Loads a checkpoint for evaluation, such as `advprop.checkpoints.load_predictor`.

    Worker processes import it by its name, so it must be defined at the top level of a module.
    """

    def __call__(self, path: Path, *, route: str, device: str) -> tuple[ModelSpec, Predict, bool, dict[str, Any]]:
        """Return the spec, the function, whether any image size is accepted, and facts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The arguments of `load_model`, for loading a model in another process."""

    path: Path
    """An ONNX file, an engine, or a checkpoint (`.pt` or `.pth`)."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    threads: int = 0
    """CPU threads per run; 0 leaves the number to the backend."""
    route: str = "main"
    """BatchNorm route of a checkpoint."""
    exact: bool = True
    """On a CPU, round the tensors of ONNX files as a GPU does."""
    checkpoint_loader: CheckpointLoader | None = None
    """Loads checkpoints."""

    def load(self) -> Model:
        """Load the model.

        Raises:
            AdvPropError: see `load_model`.
        """
        return load_model(
            self.path,
            device=self.device,
            threads=self.threads,
            route=self.route,
            exact=self.exact,
            checkpoint_loader=self.checkpoint_loader,
        )


def load_model(
    path: Path,
    *,
    device: str = "auto",
    threads: int = 0,
    route: str = "main",
    exact: bool = True,
    checkpoint_loader: CheckpointLoader | None = None,
) -> Model:
    """Load an ONNX file, an engine or a checkpoint.

    Args:
        path: the file; `.pt` and `.pth` files are checkpoints.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads per run; 0 leaves the number to the backend.
        route: BatchNorm route of a checkpoint.
        exact: on a CPU, compute ONNX files with the roundings of a GPU: Q/DQ nodes as written, FP16
            tensors rounded to FP16. If false, ONNX Runtime chooses its kernels; on some CPUs its
            INT8 kernels saturate, and its FP16 kernels do not round.
        checkpoint_loader: loads checkpoints, such as `advprop.checkpoints.load_predictor`.

    Raises:
        InputError: the file does not exist, is not a model, has no spec, or does not have the
            route; or it is a checkpoint and no loader is passed.
        BackendUnavailable: a library or GPU that the model needs is missing.
    """
    if path.suffix in CHECKPOINT_SUFFIXES:
        if checkpoint_loader is None:
            raise ConfigError(
                f"{path} is a checkpoint, which the runtime cannot load by itself: pass "
                "checkpoint_loader=advprop.checkpoints.load_predictor, or evaluate the ONNX file exported from it"
            )
        spec, predict, size_open, facts = checkpoint_loader(path, route=route, device=device)
        return model_of(ModelPath(path=path).default_name(route), spec, predict, facts, size_open=size_open)
    if path.suffix in ENGINE_SUFFIXES:
        session = load(path, device=device, threads=threads)
        return _from_session(session, path, {"kind": "engine", "sha256": sha256_file(path)})
    return _load_onnx(path, device, threads, exact)


def with_adapted(models: Sequence[Model], counts: Sequence[int]) -> list[Model]:
    """Return the models, each followed by itself adapted to images of every cell.

    Args:
        models: models to test.
        counts: numbers of images to adapt to.

    Raises:
        ConfigError: a model cannot be adapted.
    """
    if not counts:
        return list(models)
    fixed = next((model for model in models if model.adapt is None), None)
    if fixed is not None:
        raise ConfigError(f"{fixed.name} cannot be adapted; --adapt needs float32 ONNX files on this machine")
    return [
        dataclasses.replace(
            model,
            name=f"{model.name}.adapted-{count}" if count else model.name,
            field_images=count,
            facts={**model.facts, "field_images": count} if count else model.facts,
        )
        for model in models
        for count in (0, *counts)
    ]


def load_models(
    load: Callable[..., Model], paths: Sequence[Path], reference: Path | None, routes: Sequence[str] = ("main",)
) -> tuple[list[Model], Model | None]:
    """Load models and their reference, each of them once, with distinct names.

    Args:
        load: `load_model`, or a similar function that accepts a path and `route`.
        paths: FILE, NAME=FILE, or the folder of a training run; a checkpoint is loaded once for each
            of `routes`. Names are those of `runtime.evaluate.names`.
        reference: the reference model; a checkpoint is loaded with the first of `routes`.
        routes: BatchNorm routes of checkpoints.

    Raises:
        ConfigError: two models have the same NAME.
        DataError: a folder contains no checkpoint.
    """
    found = [find_model(path) for path in paths]
    compared = None if reference is None else find_model(reference)

    def keys(model: ModelPath) -> list[tuple[Path, str]]:
        return [(model.path.resolve(), route) for route in (routes if model.is_checkpoint else ("main",))]

    passed = [(model, key) for model in found for key in keys(model)]
    asked: dict[tuple[Path, str], ModelPath] = {}
    for model, key in passed:
        asked.setdefault(key, model)
    if compared is not None:
        asked.setdefault(keys(compared)[0], compared)
    names = unique_names([(model, route) for (_, route), model in asked.items()])
    known = {
        key: dataclasses.replace(load(model.path, route=key[1]), name=name)
        for (key, model), name in zip(asked.items(), names, strict=True)
    }
    models = list({id(model): model for model in (known[key] for _, key in passed)}.values())
    return models, None if compared is None else known[keys(compared)[0]]


def _load_onnx(path: Path, device: str, threads: int, exact: bool) -> Model:
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
        **({"adaptation": json.loads(summary.adaptation)} if summary.adaptation else {}),
        "arithmetic": "as written, every rounding done" if exact else "ONNX Runtime's choice of kernels",
    }
    model = _from_session(session, path, facts)
    return dataclasses.replace(model, adapt=partial(_adapted, path, threads)) if summary.precision == "fp32" else model


def _adapted(path: Path, threads: int, field_NHWC: NDArray[np.uint8]) -> tuple[Logits, bool]:
    """Adapt an ONNX file to field images, see `Adapt`."""
    import onnx

    from runtime.adapt.adapt import AdaptConfig, adapt
    from runtime.graph.model import open_session
    from runtime.graph.read import load_onnx

    model: onnx.ModelProto = load_onnx(path)
    found = adapt(model, field_NHWC, AdaptConfig(threads=threads))
    session = open_session(found.model if found.verdict.adapts else model)
    spec = ModelSpec.from_json(session.get_modelmeta().custom_metadata_map[METADATA_KEY], where=str(path))
    convert = Preprocessor.of(spec).convert

    def logits(images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        outputs_NK: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: convert(images_NHWC)})[0]
        return _as_logits(outputs_NK, spec)

    return logits, found.verdict.adapts


def _as_logits(outputs_NK: NDArray[Any], spec: ModelSpec) -> NDArray[Any]:
    return np.log(np.maximum(outputs_NK.astype(np.float64), _TINY)) if spec.output_form == "probs" else outputs_NK


def _from_session(session: Session, path: Path, facts: dict[str, Any]) -> Model:
    spec, backend = session.spec, session.backend
    if spec.output_form == "topk":
        raise SpecError(
            f"{path} outputs only its top probabilities; evaluate a file that was exported without --output topk"
        )

    def logits(images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        batch = Preprocessor.of(spec).convert(images_NHWC)
        outputs_NK = session.run(batch.astype(backend.input.dtype, copy=False))
        return _as_logits(outputs_NK, spec)

    facts |= {
        "arch": spec.arch,
        "backend": backend.name,
        "device": backend.device,
        "route": spec.route,
        "checkpoint_sha256": spec.checkpoint_sha256,
    }
    size = backend.input.shape[1:3] if spec.input_form.endswith("NHWC") else backend.input.shape[2:]
    name = ModelPath(path=path).default_name()
    return Model(name=name, spec=spec, logits=logits, facts=facts, size_open=min(size) < 0)
