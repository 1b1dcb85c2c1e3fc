"""`ForeignOptions`: what must be known about a classifier that another tool wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from runtime.errors import ConfigError
from runtime.spec import CROP_MODES, INTERPOLATIONS, ImageSizes, ModelSpec, Preprocessing

__all__ = ["LAYOUTS", "ForeignOptions", "Layout", "convert_command", "read_classes"]

Layout: TypeAlias = Literal["NCHW", "NHWC"]
"""Layout of an image input: channels first, or channels last."""
LAYOUTS: tuple[Layout, ...] = ("NCHW", "NHWC")

_WNID = re.compile(r"n\d{8}")
_MAX_CLASS_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignOptions:
    """What the ONNX file of another tool does not contain, and `convert_classifier` needs.

    Raises:
        ConfigError: a value is not valid.
    """

    image_sizes: ImageSizes | None = None
    """Image size, or the range of sizes that the converted file accepts (default: the size that the
    file itself fixes)."""
    mean: tuple[float, float, float] | None = None
    """RGB mean of each channel, for pixels in [0, 1]. Required unless the input is uint8 pixels."""
    std: tuple[float, float, float] | None = None
    """RGB standard deviation of each channel, for pixels in [0, 1]. Required like `mean`."""
    interpolation: str = "bicubic"
    """Resampling filter, one of `runtime.spec.INTERPOLATIONS`."""
    crop_pct: float = 0.875
    """Crop size divided by the size of the resized image; above 0."""
    crop_mode: str = "center"
    """One of `runtime.spec.CROP_MODES`."""
    layout: Layout | None = None
    """One of LAYOUTS (default: the position of the dimension with 3 channels)."""
    bgr: bool = False
    """Whether the network expects the channels in the order blue, green, red. `mean` and `std` are
    in the order red, green, blue all the same."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the output (default: their numbers)."""
    wnids: tuple[str, ...] = ()
    """WordNet ids in the order of the output, if the classes have them."""
    output: str | None = None
    """Name of the output with the logits or probabilities; required if there are several."""

    def __post_init__(self) -> None:
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES), ("layout", LAYOUTS)):
            value = getattr(self, name)
            if value not in known and not (name == "layout" and value is None):
                raise ConfigError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}; found {value!r}")
        if not 0 < self.crop_pct <= 2:
            raise ConfigError(f"crop_pct must be above 0 and at most 2; found {self.crop_pct}")
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std describe the normalization together; pass both or none")

    def preprocessing(self, height: int, width: int) -> Preprocessing:
        """Return the preprocessing for images of this size; without a mean, of pixels in [0, 1].

        Raises:
            SpecError: `mean` or `std` is not valid.
        """
        return Preprocessing(
            height=height,
            width=width,
            mean=self.mean or (0.0, 0.0, 0.0),
            std=self.std or (1.0, 1.0, 1.0),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            exif="upright",
        )

    def spec(self, arch: str, preprocessing: Preprocessing, classes: int, output_form: str) -> ModelSpec:
        """Return the spec of a converted file with this number of classes.

        Raises:
            ConfigError: the number of class names differs.
        """
        names = self.classes or self.wnids
        if names and len(names) != classes:
            raise ConfigError(
                f"the class list has {len(names)} names (the first is {names[0]!r}), but the model has {classes} "
                "outputs",
                fix="list one name per output, in the order of the outputs",
            )
        return ModelSpec(
            arch=arch,
            classes=names or tuple(map(str, range(classes))),
            wnids=self.wnids,
            preprocessing=preprocessing,
            output_form=output_form,
        )


def convert_command(path: Path) -> str:
    """Return the command that describes a file without a spec, for error messages."""
    return f"advprop convert {path} --img-size HxW --mean R,G,B --std R,G,B"


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read a file of class names: one name per line, or JSON.

    The JSON is a list of names, an object from the class number to its name, or an object with such
    an object as `id2label`, as in the `config.json` of Hugging Face. Instead of a name, it can
    contain a pair of WordNet id and name, as in Keras' `imagenet_class_index.json`.

    Returns:
        Names, and WordNet ids: those of the pairs, or the names if all of them are WordNet ids.
        Otherwise there are none.

    Raises:
        ConfigError: the file cannot be read, or has another format.
    """
    try:
        if path.stat().st_size > _MAX_CLASS_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_CLASS_FILE_BYTES // 2**20} MiB; expected class names")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the class names in {path}: {error}") from error
    if text.lstrip()[:1] in ("[", "{"):
        entries = _entries_of_json(text, path)
    else:
        entries = [line.strip() for line in text.strip().splitlines()]
    pairs = [_id_and_name(entry, path) for entry in entries]
    names, wnids = tuple(name for _, name in pairs), tuple(wnid for wnid, _ in pairs if wnid)
    if len(names) < 2:
        raise ConfigError(f"{path} has {len(names)} class names; expected at least two, one per line or as JSON")
    if len(wnids) not in (0, len(names)):
        raise ConfigError(f"{path} has WordNet ids for {len(wnids)} of {len(names)} classes; expected all or none")
    return names, wnids or (names if all(map(_WNID.fullmatch, names)) else ())


def _entries_of_json(text: str, path: Path) -> list[Any]:
    """Return the names or pairs in a JSON text, in the order of their numbers."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected one class name per line, or JSON") from error
    if isinstance(content, Mapping):
        content = content.get("id2label", content)
    if isinstance(content, list):
        return content
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} contains {str(content)[:80]!r}; expected class names")
    by_number = {int(key): name for key, name in content.items() if key.isdecimal() and len(key) < 10}
    if len(by_number) < len(content) or sorted(by_number) != list(range(len(by_number))):
        raise ConfigError(
            f"{path} is a JSON object whose keys are not the numbers 0 to {len(content) - 1}; expected a list of class "
            'names, or an object such as {"0": "cat", "1": "dog"}'
        )
    return [by_number[number] for number in sorted(by_number)]


def _id_and_name(entry: Any, path: Path) -> tuple[str, str]:
    """Return the WordNet id, which may be empty, and the name of one class."""
    pair = entry if isinstance(entry, list) else ["", entry]
    if len(pair) == 2 and all(isinstance(part, str) for part in pair) and pair[1].strip():
        return pair[0], pair[1].strip()
    raise ConfigError(f"{path} contains {str(entry)[:80]!r}, which is not a class name or [WordNet id, name]")
