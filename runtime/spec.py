"""`ModelSpec`, the description inside every model file, and the image sizes of a network.

Training creates the spec. It is stored unchanged in the checkpoint, in the ONNX file
(`metadata_props["advprop.spec"]`) and in the engine's sidecar, which makes a model usable without
its training code.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import ConfigError, SpecError

__all__ = [
    "CROP_MODES",
    "EXIF_RULES",
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
EXIF_RULES = ("upright", "ignore")

_MAX_IMAGE_SIZE = 8192
_MAX_RESIZED_PIXELS = 100_000_000
_MAX_NUMBER = 1e6
_MAX_CHARACTERS = 2**23
"""Maximum length of a spec's JSON. 100,000 class names need about half of it."""


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

    exif: str = "ignore"
    """What happens to the EXIF orientation of photographs, one of EXIF_RULES: `upright` applies it,
    as viewers do; `ignore` does not, as in torchvision and timm."""

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            valid = type(size) is int and 0 < size <= _MAX_IMAGE_SIZE
            _require(valid, name, f"a whole number of pixels from 1 to {_MAX_IMAGE_SIZE}", size)
        for name, lowest in (("mean", -_MAX_NUMBER), ("std", 1 / _MAX_NUMBER)):
            values = getattr(self, name)
            valid = isinstance(values, tuple) and len(values) == 3 and all(_in_range(one, lowest) for one in values)
            _require(valid, name, f"three numbers from {lowest:g} to {_MAX_NUMBER:g}", values)
        _require(self.interpolation in INTERPOLATIONS, "interpolation", INTERPOLATIONS, self.interpolation)
        valid = _in_range(self.crop_pct, 1e-6) and self.crop_pct <= 2
        _require(valid, "crop_pct", "a number above 0, at most 2", self.crop_pct)
        valid = self.height * self.width / self.crop_pct**2 <= _MAX_RESIZED_PIXELS
        _require(valid, "crop_pct", f"at most {_MAX_RESIZED_PIXELS:,} pixels before the crop", self.crop_pct)
        _require(self.crop_mode in CROP_MODES, "crop_mode", CROP_MODES, self.crop_mode)
        _require(self.exif in EXIF_RULES, "exif", EXIF_RULES, self.exif)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without `exif` if it is `ignore`, as in earlier versions."""
        fields = dataclasses.asdict(self)
        if self.exif == "ignore":
            del fields["exif"]
        return fields


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
        for name in ("arch", "dataset", "recipe", "route", "checkpoint_sha256"):
            _require(_is_text(getattr(self, name)), name, "text", getattr(self, name))
        _require(bool(self.arch), "arch", "the name of an architecture", self.arch)
        for name in ("classes", "wnids"):
            texts = getattr(self, name)
            _require(isinstance(texts, tuple) and all(map(_is_text, texts)), name, "a list of names", texts)
        _require(len(self.classes) >= 2, "classes", "at least two names", self.classes)
        _require(isinstance(self.preprocessing, Preprocessing), "preprocessing", "an object", self.preprocessing)
        _require(self.input_form in INPUT_FORMS, "input_form", INPUT_FORMS, self.input_form)
        _require(self.output_form in OUTPUT_FORMS, "output_form", OUTPUT_FORMS, self.output_form)
        valid = not self.wnids or len(self.wnids) == len(self.classes)
        _require(valid, "wnids", f"none or {len(self.classes)} ids", f"{len(self.wnids)} ids")

    def to_json(self) -> str:
        """Return the spec as compact JSON with sorted keys. Equal specs return equal text."""
        content = {"schema": SCHEMA, **dataclasses.asdict(self), "preprocessing": self.preprocessing.to_dict()}
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
            if not isinstance(text, str) or len(text) > _MAX_CHARACTERS:
                raise ValueError(f"expected a text of at most {_MAX_CHARACTERS:,} characters")
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
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


def _in_range(value: object, lowest: float) -> bool:
    """Return whether a value is a number from `lowest` to _MAX_NUMBER, and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value <= _MAX_NUMBER


def _is_text(value: object) -> bool:
    """Return whether a value is text that can be written as UTF-8."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _require(condition: bool, field: str, expected: object, found: object) -> None:
    if not condition:
        raise SpecError(f"{field} of a model spec: found {reprlib.repr(found)}, expected {expected}")
