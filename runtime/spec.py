"""`ModelSpec`: what a model file says about itself.

One spec is made when training starts and travels unchanged in the checkpoint, in the
ONNX file (`metadata_props["advprop.spec"]`) and in the engine's sidecar, so a model can
be fed correctly without its training code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import SpecError

__all__ = [
    "CROP_MODES",
    "INPUT_FORMS",
    "INTERPOLATIONS",
    "METADATA_KEY",
    "OUTPUT_FORMS",
    "ModelSpec",
    "Preprocessing",
]

METADATA_KEY = "advprop.spec"
"""Key of the spec's JSON in an ONNX file's `metadata_props`."""

SCHEMA = "advprop.spec/1"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
INPUT_FORMS = ("float32 NCHW", "float16 NCHW", "uint8 NCHW", "uint8 NHWC")
OUTPUT_FORMS = ("logits", "probs", "topk")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """From a decoded RGB image to the network's input, as timm's evaluation does it."""

    height: int
    """Input height, pixels."""
    width: int
    """Input width, pixels."""
    mean: tuple[float, float, float]
    """Per-channel RGB mean, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Per-channel RGB standard deviation, of pixels in [0, 1]."""
    interpolation: str
    """Resampling filter, one of INTERPOLATIONS."""
    crop_pct: float
    """The image is resized to `size / crop_pct` before the center is cut out."""
    crop_mode: str = "center"
    """timm's crop modes: `center` (resize the short side, crop), `squash` (resize both
    sides, then crop), `border` (resize the long side, pad with the mean)."""

    def __post_init__(self) -> None:
        _require(self.height > 0 and self.width > 0, "height and width", "positive pixels", self)
        for name in ("mean", "std"):
            values = getattr(self, name)
            fine = len(values) == 3 and all(math.isfinite(value) for value in values)
            _require(fine, name, "three finite numbers", values)
        _require(min(self.std) > 0, "std", "numbers above zero", self.std)
        _require(self.interpolation in INTERPOLATIONS, "interpolation", INTERPOLATIONS, self.interpolation)
        _require(0 < self.crop_pct <= 2, "crop_pct", "a number in (0, 2]", self.crop_pct)
        _require(self.crop_mode in CROP_MODES, "crop_mode", CROP_MODES, self.crop_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything needed to feed a classifier and to read its answers."""

    arch: str
    """timm's name of the architecture."""
    classes: tuple[str, ...]
    """Names people read, in the order of the logits."""
    preprocessing: Preprocessing
    """How an image becomes the network's input."""
    wnids: tuple[str, ...] = ()
    """WordNet ids in the order of the logits, where the data had them; else empty."""
    dataset: str = ""
    """What the model was trained on, in words."""
    recipe: str = ""
    """Training recipe, e.g. `advprop`."""
    route: str = "main"
    """BatchNorm route that the exported weights belong to."""
    input_form: str = "float32 NCHW"
    """What the file takes, one of INPUT_FORMS: normalized floats, or uint8 RGB pixels at the
    network's size, which it normalizes itself."""
    output_form: str = "logits"
    """What it gives, one of OUTPUT_FORMS; `topk` is two outputs, `probs` and `classes`, the largest first."""
    checkpoint_sha256: str = ""
    """SHA-256 of the checkpoint the file was made from; empty in the checkpoint itself."""

    def __post_init__(self) -> None:
        _require(bool(self.arch), "arch", "the name of an architecture", self.arch)
        _require(len(self.classes) >= 2, "classes", "at least two names", self.classes)
        _require(self.input_form in INPUT_FORMS, "input_form", INPUT_FORMS, self.input_form)
        _require(self.output_form in OUTPUT_FORMS, "output_form", OUTPUT_FORMS, self.output_form)
        fine = not self.wnids or len(self.wnids) == len(self.classes)
        _require(fine, "wnids", f"none or {len(self.classes)} ids", f"{len(self.wnids)} ids")

    def to_json(self) -> str:
        """Returns the spec as compact JSON with sorted keys: equal specs, equal bytes."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, where: str = "the model file") -> ModelSpec:
        """Reads `to_json`'s text; `where` names its source in errors.

        Raises:
            SpecError: not JSON, another schema, or missing, unknown or wrong fields.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"the spec in {where} is not JSON ({error}); export the model again") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise SpecError(
                f"the spec in {where} has schema {found!r}, expected {SCHEMA!r}; "
                "export the model again with this version of advprop"
            )
        del content["schema"]
        try:
            content["preprocessing"] = Preprocessing(**_tuples(content["preprocessing"]))
            return cls(**_tuples(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"the spec in {where} is incomplete or has unknown fields: {error}") from error


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _require(condition: bool, field: str, expected: object, found: object) -> None:
    if not condition:
        raise SpecError(f"{field} of a model spec: found {found!r}, expected {expected}")
