"""Adapt a classifier to unlabeled field images, and report whether that can be expected to help.

Shape suffixes: N images, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.adapt.confidence import CleanConfidence, confidence_of, read_confidence
from runtime.adapt.estimate import Estimate, Layer, estimate, with_affines
from runtime.adapt.moments import measure_moments
from runtime.adapt.sessions import fixed_batch_size
from runtime.adapt.verdict import CleanCheck, Predictions, Verdict, mean_evidence, predictions_of, verdict_of
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.model import first_output, session_of
from runtime.graph.norms import Norm, read_norms
from runtime.graph.structure import metadata, spec_of
from runtime.graph.summary import ADAPTATION_KEY
from runtime.preprocessing import Preprocessor
from runtime.spec import ModelSpec

__all__ = ["AdaptConfig", "Adaptation", "CleanImages", "adapt"]

AUTO_WEIGHT = 1 / 3
"""Largest weight of the field images with an automatic prior: two training images for each field
image. Larger weights amplify the noise of small samples, also under corruptions."""
_ATTEMPTS = 3
"""Number of times that the weight is halved to keep the loss on clean images within its limit."""
_BATCH = 4

Progress = Callable[[str], None]
"""Called with the name of each stage as it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptConfig:
    """Settings of an adaptation."""

    images: int = 128
    """Maximum number of field images."""
    prior: float | None = None
    """Number of training images that the statistics of the training images count for. With n field
    images, these have the weight n / (prior + n). None chooses a weight for each layer: a third,
    reduced by the share of the layer's shift that noise explains."""
    max_clean_loss: float = 0.5
    """Largest accepted loss of top-1 accuracy on clean images, in percentage points."""
    threads: int = 0
    """CPU threads; 0 uses all cores."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"images must be at least 1; found {self.images}")
        if self.prior is not None and not self.prior >= 0:
            raise ConfigError(f"prior must be auto or a number of images of at least 0; found {self.prior}")
        if not 0 <= self.max_clean_loss <= 100:
            raise ConfigError(f"max_clean_loss must be 0 to 100 percentage points; found {self.max_clean_loss}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanImages:
    """Images like those of the training data, to limit the loss on them."""

    images_NHWC: NDArray[np.uint8]
    """RGB images of the model's input size."""
    labels_N: NDArray[np.int64]
    """Positions of their classes among the model's classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """An adapted model, and what is expected of it."""

    model: onnx.ModelProto
    """The adapted graph."""
    verdict: Verdict
    """Whether it can be expected to be better on the field images."""
    images: int
    """Number of field images."""
    layers: tuple[Layer, ...]
    """Shift and weight of each normalized tensor, in the order of computation."""
    before: Predictions
    """Predictions of the original model for the field images."""
    after: Predictions
    """Predictions of the adapted model for them."""
    agreement: float
    """Share of the field images for which both predict the same class, 0 to 1."""
    clean: CleanCheck | None = None
    """What adapting costs on clean images; None if none were passed."""
    recorded: CleanConfidence | None = None
    """Accuracy and confidence on clean images that the model file records; None if it does not."""

    @property
    def expected_accuracy(self) -> tuple[float, float] | None:
        """Expected accuracy on the field images before and after, 0 to 1.

        It is the mean confidence, corrected by the difference from the accuracy on clean images.
        None if that is unknown. It is an estimate for people and does not affect the verdict.
        """
        if self.clean is not None:
            origins = (self.clean.before, self.clean.after)
        elif self.recorded is not None:
            origins = (self.recorded, self.recorded)
        else:
            return None
        before, after = (
            origin.expected_accuracy(seen.confidence)
            for origin, seen in zip(origins, (self.before, self.after), strict=True)
        )
        return before, after

    @property
    def evidence(self) -> float:
        """Mean evidence of a shift over the layers, 0 to 1."""
        return mean_evidence(self.layers)

    @property
    def weight(self) -> float:
        """Mean weight of the field images over the layers, 0 to 1."""
        return float(np.mean([layer.weight for layer in self.layers]))


def adapt(
    model: onnx.ModelProto,
    images_NHWC: NDArray[np.uint8],
    config: AdaptConfig | None = None,
    *,
    clean: CleanImages | None = None,
    progress: Progress | None = None,
) -> Adaptation:
    """Adapt a float32 classifier to field images by re-estimating its BatchNorm statistics.

    Args:
        model: a classifier that advprop wrote, with its spec and its norms; not changed.
        images_NHWC: uint8 RGB field images of the model's input size. All are used.
        config: settings (default: `AdaptConfig()`).
        clean: images like those of the training data. They limit the loss on such images. If the
            model has no statistics of clean images, they provide them.
        progress: called with the name of each stage.

    Raises:
        ModelFileError: the model has no norms, or is adapted already.
        ConfigError: the prior is automatic, but there are no statistics of clean images.
        DataError: there are no images.
    """
    config, progress = config or AdaptConfig(), progress or (lambda stage: None)
    spec = _check_model(model)
    convert = Preprocessor.of(spec).convert
    norms = _with_clean(model, read_norms(model), config, clean, convert)
    inputs = convert(images_NHWC)
    progress("running the model")
    outputs_NK = _outputs(model, inputs, config.threads)
    shift: Estimate | None = None
    if config.prior is not None:
        # A small prior adds noise to early layers, which looks like a shift of later ones.
        progress("measuring the shift")
        shift = _estimate(model, norms, inputs, spec, dataclasses.replace(config, prior=None), 1.0)
    factor = 1.0
    for attempt in range(1 + _ATTEMPTS):
        progress("estimating statistics")
        found = _estimate(model, norms, inputs, spec, config, factor)
        result = _judged(model, norms, found, shift or found, outputs_NK, spec)
        if clean is None or not result.verdict.adapts:
            return result
        progress("checking clean images")
        result = dataclasses.replace(result, clean=_check_clean(model, result.model, clean, spec, config.threads))
        assert result.clean is not None
        if result.clean.loss <= config.max_clean_loss:
            return dataclasses.replace(result, verdict=Verdict.LARGER_PRIOR) if attempt else result
        if config.prior is not None:
            break
        factor /= 2
    return dataclasses.replace(result, verdict=Verdict.CLEAN_LOSS)


def _check_model(model: onnx.ModelProto) -> ModelSpec:
    spec = spec_of(model, "the model")
    if spec is None or not read_norms(model):
        raise ModelFileError(
            "the model has no record of its BatchNorms, so it cannot be adapted; expected a float32 file that "
            "advprop export or advprop convert wrote, of a network whose BatchNorms were folded",
            fix="export it again with this version; networks without BatchNorm, and re-parameterized ones, have none",
        )
    if metadata(model, ADAPTATION_KEY):
        raise ModelFileError("the model is already adapted", fix="adapt the file that it was made from")
    if spec.output_form == "topk":
        raise ModelFileError(
            "the model outputs its most probable classes only; expected all logits or probabilities",
            fix="export it without --output topk",
        )
    return spec


def _with_clean(
    model: onnx.ModelProto,
    norms: dict[str, Norm],
    config: AdaptConfig,
    clean: CleanImages | None,
    convert: Callable[[NDArray[np.uint8]], NDArray[Any]],
) -> dict[str, Norm]:
    """Return the norms with statistics of clean images."""
    if all(norm.clean is not None for norm in norms.values()):
        return norms
    if clean is not None:
        found = measure_moments(model, norms, _batches(model, convert(clean.images_NHWC)))
        return {name: dataclasses.replace(norm, clean=found[name]) for name, norm in norms.items()}
    if config.prior is None:
        raise ConfigError(
            "the model has no statistics of clean images, so a shift cannot be distinguished from noise",
            fix="pass clean images with --clean DIR, or a prior with --prior N",
        )
    return norms


def _estimate(
    model: onnx.ModelProto,
    norms: Mapping[str, Norm],
    inputs: NDArray[Any],
    spec: ModelSpec,
    config: AdaptConfig,
    factor: float,
) -> Estimate:
    def weighting(layer: Layer) -> float:
        if config.prior is not None:
            return len(inputs) / (config.prior + len(inputs))
        return factor * AUTO_WEIGHT * layer.evidence

    size = (spec.preprocessing.height, spec.preprocessing.width)
    return estimate(model, norms, inputs, weighting, size=size, threads=config.threads)


def _judged(
    model: onnx.ModelProto,
    norms: Mapping[str, Norm],
    found: Estimate,
    shift: Estimate,
    outputs_NK: NDArray[Any],
    spec: ModelSpec,
) -> Adaptation:
    pairs = zip(found.layers, shift.layers, strict=True)
    layers = tuple(dataclasses.replace(seen, weight=layer.weight) for layer, seen in pairs)
    before, after = (predictions_of(outputs, spec.output_form) for outputs in (outputs_NK, found.outputs_NK))
    return Adaptation(
        model=with_affines(model, norms, found.affines),
        verdict=verdict_of(layers, before, after, len(outputs_NK), len(spec.classes)),
        images=len(outputs_NK),
        layers=layers,
        before=before,
        after=after,
        agreement=float((outputs_NK.argmax(1) == found.outputs_NK.argmax(1)).mean()),
        recorded=read_confidence(model),
    )


def _check_clean(
    model: onnx.ModelProto,
    adapted: onnx.ModelProto,
    clean: CleanImages,
    spec: ModelSpec,
    threads: int,
) -> CleanCheck:
    inputs, output_form = Preprocessor.of(spec).convert(clean.images_NHWC), spec.output_form
    before, after = (
        confidence_of(_outputs(graph, inputs, threads), clean.labels_N, output_form) for graph in (model, adapted)
    )
    return CleanCheck(before=before, after=after)


def _outputs(model: onnx.ModelProto, inputs: NDArray[Any], threads: int) -> NDArray[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = session_of(model, options)
    return np.concatenate([first_output(session, batch) for batch in _batches(model, inputs)])


def _batches(model: onnx.ModelProto, inputs: NDArray[Any]) -> Iterator[NDArray[Any]]:
    size = fixed_batch_size(model) or _BATCH
    return (inputs[start : start + size] for start in range(0, len(inputs), size))
