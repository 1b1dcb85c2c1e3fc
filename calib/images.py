"""The calibration set: which images, by their content, so that a result can be traced and repeated."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ConfigError, DataError, nearest
from runtime.preprocessing import Preprocessor, decode, fit_to_input
from runtime.spec import Preprocessing
from runtime.system.files import write_text
from runtime.system.image_sources import ImageSource, open_source, spread

__all__ = ["BATCH", "KINDS", "Adversary", "CalibrationImage", "CalibrationSet", "calibration_set", "check_mix"]

log = logging.getLogger(__name__)

FORMAT = "advprop.calib/1"
BATCH = 4
"""Images at once: few enough that a layer's output is still in the caches when it is counted."""
KINDS = ("clean", "corrupted", "adversarial")
"""What an image can be made into: left as it is, corrupted by noise, blur, spatter or saturation (the
corruptions that ImageNet-C keeps for validation, so that its mCE stays a test), or attacked."""

Adversary: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Normalized images, float32 (N, 3, H, W), → the same, attacked."""


@dataclass(frozen=True, slots=True)
class CalibrationImage:
    """One image."""

    name: str
    """What its source calls it."""
    sha256: str
    """SHA-256 of its file, or of its pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """Images, in the order in which they are used, and what is made of them."""

    source: Path
    """Folder, tar file or array that they are in."""
    images: tuple[CalibrationImage, ...]
    """Those that thresholds are chosen on."""
    held: tuple[CalibrationImage, ...] = ()
    """Others, on which a budget is kept."""
    mix: tuple[str, ...] = ("clean",)
    """KINDS; each image is used once as each."""
    seed: int = 0
    """Of the corruptions, which are drawn for each image by its hash."""

    @property
    def sha256(self) -> str:
        """Hash of the set: of its images' hashes in order, the mix and its seed."""
        digest = hashlib.sha256("".join(image.sha256 for image in (*self.images, *self.held)).encode())
        if self.mix != ("clean",):
            digest.update(f"{self.mix} {self.seed}".encode())
        return digest.hexdigest()

    def batches(
        self,
        spec: Preprocessing,
        count: int = 0,
        *,
        kinds: Sequence[str] = (),
        held: bool = False,
        adversary: Adversary | None = None,
        size: int = BATCH,
    ) -> Iterator[NDArray[np.float32]]:
        """Yields normalized images, float32 (N, 3, H, W), N up to `size`.

        Args:
            spec: how an image becomes the network's input.
            count: of the set's images only so many in all, spread over it; 0 for all.
            kinds: of the mix only these; default: all.
            held: the images that a budget is kept on.
            adversary: attacks the images of the kind `adversarial`.
            size: images at once.
        """
        kinds = kinds or self.mix
        images = self.held if held else self.images
        chosen = spread(images, max(1, count // len(kinds))) if count else list(images)
        with open_source(self.source) as reader:
            for start in range(0, len(chosen), size):
                few = chosen[start : start + size]
                fitted = [fit_to_input(decode(reader.read(image.name)), spec) for image in few]
                for kind in kinds:
                    pixels = fitted
                    if kind == "corrupted":
                        pixels = [_corrupted(*pair, self.seed) for pair in zip(fitted, few, strict=True)]
                    batch = Preprocessor(spec).convert(np.stack(pixels))
                    yield adversary(batch) if kind == "adversarial" and adversary else batch

    def save(self, path: Path) -> None:
        """Writes the manifest. Raises OutputError."""
        content = {
            "format": FORMAT,
            "source": str(self.source),
            "sha256": self.sha256,
            "mix": list(self.mix),
            "seed": self.seed,
            "images": [[image.name, image.sha256] for image in self.images],
            "held": [[image.name, image.sha256] for image in self.held],
        }
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_mix(mix: Sequence[str], adversary: Adversary | None) -> None:
    """Raises ConfigError where a kind is unknown, twice there, or needs an adversary that is not there."""
    for kind in mix:
        if kind not in KINDS:
            raise ConfigError(f"a calibration mix is of {', '.join(KINDS)}; found {kind!r}; {nearest(kind, KINDS)}")
    if not mix or len(set(mix)) < len(mix):
        raise ConfigError(f"a calibration mix names each kind once, at least one; found {','.join(mix) or 'none'}")
    if "adversarial" in mix and adversary is None:
        raise ConfigError(
            "adversarial images need gradients, which an ONNX file does not give; calibrate with "
            "advprop-export CHECKPOINT --trt int8, or leave adversarial out of the mix"
        )


def calibration_set(
    source: Path,
    count: int = 256,
    spec: Preprocessing | None = None,
    *,
    held: bool = False,
    mix: Sequence[str] = ("clean",),
    seed: int = 0,
) -> CalibrationSet:
    """Chooses calibration images.

    Args:
        source: a folder, a tar file, an array (see `open_source`), or the manifest (`calib.json`) of an
            earlier set, which is then taken as it is.
        count: the most images to take, spread evenly over the sorted names.
        spec: the network's input; images that cannot be fitted to it are left out too.
        held: hold images out for a budget: up to `count` more, or, where there are no more, a quarter.
        mix: KINDS to use.
        seed: of the corruptions.

    Raises:
        DataError: no images, only copies of one, or ones that are not those of the manifest.
    """
    if source.suffix == ".json":
        return _from_manifest(source)
    with open_source(source) as reader:
        available = len(reader.names)
        total = min(available, 2 * count if held else count)
        found = _readable(reader, spread(reader.names, total), spec)
    if not found:
        raise DataError(
            f"{source}: found {available} images, none of which can be used; give some hundred photographs "
            "such as the model will see"
        )
    if len(found) > 1 and len({image.sha256 for image in found}) == 1:
        raise DataError(f"{source}: all {len(found)} images are copies of one; give some hundred different ones")
    apart = spread(range(len(found)), max(len(found) - count, len(found) // 4)) if held else []
    return CalibrationSet(
        source=source.resolve(),
        images=tuple(image for place, image in enumerate(found) if place not in set(apart)),
        held=tuple(found[place] for place in apart),
        mix=tuple(mix),
        seed=seed,
    )


def _readable(reader: ImageSource, names: Sequence[str], spec: Preprocessing | None) -> list[CalibrationImage]:
    found = []
    small = 0
    for name in names:
        try:
            content = reader.read(name)
            image = decode(content)
            if spec is not None:
                pixels = fit_to_input(image, spec)
                if (pixels == pixels[0, 0]).all():
                    raise DataError("it is of one color")
                small += 2 * min(image.size) < min(spec.height, spec.width)
        except DataError as error:
            log.warning("skipped %s: %s", name, error)
            continue
        found.append(CalibrationImage(name, _sha256(content)))
    if small and spec is not None:
        log.warning(
            "%d of %d images are less than half as large as the network's input (%d x %d): enlarged, they lack "
            "the detail that the model will see",
            *(small, len(found), spec.height, spec.width),
        )
    return found


def _sha256(content: bytes | NDArray[np.uint8]) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(str(content.shape).encode() + content.tobytes()).hexdigest()


def _corrupted(image_HWC: NDArray[np.uint8], image: CalibrationImage, seed: int) -> NDArray[np.uint8]:
    """One of the validation corruptions at one of five severities, both drawn from the image's hash."""
    from runtime.evaluate.corruptions import EXTRAS, corrupt

    draw = int.from_bytes(hashlib.sha256(f"{seed} {image.sha256}".encode()).digest()[:4])
    name, severity = EXTRAS[draw % len(EXTRAS)], draw // len(EXTRAS) % 5 + 1
    return corrupt(image_HWC, name, severity, key=image.sha256, seed=seed)


def _from_manifest(path: Path) -> CalibrationSet:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, expected {FORMAT!r}")
        chosen = CalibrationSet(
            source=Path(content["source"]),
            images=tuple(CalibrationImage(str(name), str(sha256)) for name, sha256 in content["images"]),
            held=tuple(CalibrationImage(str(name), str(sha256)) for name, sha256 in content["held"]),
            mix=tuple(str(kind) for kind in content["mix"]),
            seed=int(content["seed"]),
        )
    except FileNotFoundError as error:
        raise DataError(f"no such manifest of a calibration set: {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not the manifest of a calibration set ({error})") from error
    if not chosen.images:
        raise DataError(f"{path} names no images")
    with open_source(chosen.source) as reader:
        there = set(reader.names)
        for image in (*chosen.images, *chosen.held):
            if image.name not in there:
                raise DataError(f"{path} names an image that is not there: {image.name} in {chosen.source}")
            if _sha256(reader.read(image.name)) != image.sha256:
                raise DataError(
                    f"{image.name} is not the image that {path} names: its content has changed; calibrate anew"
                )
    return chosen
