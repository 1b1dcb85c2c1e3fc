"""`ModelSpec`, the description inside every model file, and the image sizes of a network.

Training creates the spec. It is stored unchanged in the checkpoint, in the ONNX file
(`metadata_props["advprop.spec"]`) and in the engine's sidecar, which makes a model usable without
its training code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import ConfigError, SpecError

__all__ = [
    "CROP_MODES",
    "INPUT_FORMS",
    "INTERPOLATIONS",
    "METADATA_KEY",
    "OUTPUT_FORMS",
    "ImageSizes",
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

_MAX_IMAGE_SIZE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a decoded RGB image becomes the network's input, as in timm's evaluation transform."""

    height: int
    """Input height in pixels."""
    width: int
    """Input width in pixels."""
    mean: tuple[float, float, float]
    """RGB mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """RGB standard deviation of each channel, for pixels in [0, 1]."""
    interpolation: str
    """Resampling filter, one of INTERPOLATIONS."""
    crop_pct: float
    """The image is resized to `size / crop_pct` before its center is cropped."""
    crop_mode: str = "center"
    """timm's crop mode: `center` (resize the short side, then crop), `squash` (resize both sides,
    then crop) or `border` (resize the long side, then pad with the mean)."""

    def __post_init__(self) -> None:
        _require(self.height > 0 and self.width > 0, "height and width", "positive pixels", self)
        for name in ("mean", "std"):
            values = getattr(self, name)
            valid = len(values) == 3 and all(math.isfinite(value) for value in values)
            _require(valid, name, "three finite numbers", values)
        _require(min(self.std) > 0, "std", "numbers above zero", self.std)
        _require(self.interpolation in INTERPOLATIONS, "interpolation", INTERPOLATIONS, self.interpolation)
        _require(0 < self.crop_pct <= 2, "crop_pct", "a number in (0, 2]", self.crop_pct)
        _require(self.crop_mode in CROP_MODES, "crop_mode", CROP_MODES, self.crop_mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything that is needed to prepare a classifier's input and to interpret its output."""

    arch: str
    """timm's name of the architecture."""
    classes: tuple[str, ...]
    """Readable class names, in the order of the logits."""
    preprocessing: Preprocessing
    """How an image becomes the network's input."""
    wnids: tuple[str, ...] = ()
    """WordNet ids in the order of the logits; empty if the dataset has none."""
    dataset: str = ""
    """Name of the training dataset."""
    recipe: str = ""
    """Training recipe, e.g. `advprop`."""
    route: str = "main"
    """BatchNorm route of the exported weights."""
    input_form: str = "float32 NCHW"
    """Input of the model file, one of INPUT_FORMS: normalized floats, or uint8 RGB pixels of the
    network's size, which the file normalizes itself."""
    output_form: str = "logits"
    """Output of the model file, one of OUTPUT_FORMS. `topk` has two outputs, `probs` and `classes`,
    sorted by decreasing probability."""
    checkpoint_sha256: str = ""
    """SHA-256 of the checkpoint that the file was exported from; empty in the checkpoint itself."""

    def __post_init__(self) -> None:
        _require(bool(self.arch), "arch", "the name of an architecture", self.arch)
        _require(len(self.classes) >= 2, "classes", "at least two names", self.classes)
        _require(self.input_form in INPUT_FORMS, "input_form", INPUT_FORMS, self.input_form)
        _require(self.output_form in OUTPUT_FORMS, "output_form", OUTPUT_FORMS, self.output_form)
        valid = not self.wnids or len(self.wnids) == len(self.classes)
        _require(valid, "wnids", f"none or {len(self.classes)} ids", f"{len(self.wnids)} ids")

    def to_json(self) -> str:
        """Return the spec as compact JSON with sorted keys. Equal specs return equal text."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, where: str = "the model file") -> ModelSpec:
        """Parse the text that `to_json` returns.

        Args:
            text: the JSON text.
            where: where the text was found, for error messages.

        Raises:
            SpecError: the text is not JSON, has another schema, or has missing, unknown or invalid
                fields.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"the spec in {where} is not JSON ({error})", fix="export the model again") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise SpecError(
                f"the spec in {where} has schema {found!r}, expected {SCHEMA!r}",
                fix="export the model again with this version of advprop",
            )
        del content["schema"]
        try:
            content["preprocessing"] = Preprocessing(**_with_tuples(content["preprocessing"]))
            return cls(**_with_tuples(content))
        except (KeyError, TypeError, AttributeError) as error:
            raise SpecError(f"the spec in {where} is incomplete or has unknown fields: {error}") from error


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """The smallest, usual and largest image size of a network, each (height, width) in pixels.

    All three are equal if the network accepts one size only.
    """

    smallest: tuple[int, int]
    usual: tuple[int, int]
    largest: tuple[int, int]

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.smallest, self.usual, self.largest, strict=True):
            if not 1 <= low <= middle <= high <= _MAX_IMAGE_SIZE:
                raise ConfigError(f"image sizes need 1 ≤ min ≤ opt ≤ max ≤ {_MAX_IMAGE_SIZE}; found {self}")

    @classmethod
    def parse(cls, text: str) -> ImageSizes:
        """Parse `SIZE` or `MIN:OPT:MAX`. A size is `N` for a square, or `HEIGHTxWIDTH`.

        Raises:
            ConfigError: the text has another format, or the sizes are not in ascending order.
        """
        try:
            sizes = [_parse_size(part) for part in text.lower().split(":")]
            smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
        except ValueError as error:
            raise ConfigError(
                f"an image size is N, HEIGHTxWIDTH, or a range MIN:OPT:MAX such as 160:224:320; found {text!r}"
            ) from error
        return cls(smallest, usual, largest)

    @property
    def fixed(self) -> bool:
        """Whether the network accepts one size only."""
        return self.smallest == self.largest

    def __str__(self) -> str:
        sizes = (self.usual,) if self.fixed else (self.smallest, self.usual, self.largest)
        return ":".join(f"{height}x{width}" for height, width in sizes)


def _parse_size(text: str) -> tuple[int, int]:
    height, by, width = text.partition("x")
    return int(height), int(width if by else height)


def _with_tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with its lists as tuples: JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _require(condition: bool, field: str, expected: object, found: object) -> None:
    if not condition:
        raise SpecError(f"{field} of a model spec: found {found!r}, expected {expected}")
