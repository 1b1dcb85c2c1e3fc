"""Choose calibration images, identified by their content to make a calibration reproducible."""

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
from runtime.preprocessing import Preprocessor, decode_and_fit, fit_to_input
from runtime.spec import Preprocessing
from runtime.system.decode import decode
from runtime.system.files import write_text
from runtime.system.image_sources import ImageSource, open_source, spread

__all__ = ["BATCH", "KINDS", "Adversary", "CalibrationImage", "CalibrationSet", "calibration_set", "check_mix"]

log = logging.getLogger(__name__)

FORMAT = "advprop.calib/1"
BATCH = 4
"""Batch size: small enough for a layer's output to stay in the CPU caches until it is counted."""
KINDS = ("clean", "corrupted", "adversarial")
"""Variants of an image: unchanged; corrupted by noise, blur, spatter or saturation (the corruptions
that ImageNet-C reserves for validation, so its mCE remains a fair test); or adversarial."""

Adversary: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Returns adversarial versions of normalized images, float32 (N, 3, H, W)."""


@dataclass(frozen=True, slots=True)
class CalibrationImage:
    """One calibration image."""

    name: str
    """Name within its source."""
    sha256: str
    """SHA-256 of its file or, for an array, of its pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSet:
    """The images of a calibration, in the order of use, and the variants of each."""

    source: Path
    """Folder, tar file or array that contains the images."""
    images: tuple[CalibrationImage, ...]
    """Images on which thresholds are chosen."""
    held: tuple[CalibrationImage, ...] = ()
    """Held-out images, on which the budget is measured."""
    mix: tuple[str, ...] = ("clean",)
    """Variants, from KINDS; each image is used once per variant."""
    seed: int = 0
    """Seed of the corruptions. The corruption of an image depends on this seed and on the image's
    hash."""

    @property
    def sha256(self) -> str:
        """Hash of the images' hashes and, unless the mix is clean only, the mix and seed."""
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
        """Yield batches of normalized images, float32 (N, 3, H, W), with N up to `size`.

        Args:
            spec: preprocessing of the network.
            count: maximum number of images, all variants together, evenly spaced over the set; 0
                for all.
            kinds: variants to yield (default: the whole mix).
            held: yield the held-out images instead.
            adversary: attacks the images of the variant `adversarial`.
            size: batch size.
        """
        kinds = kinds or self.mix
        images = self.held if held else self.images
        chosen = spread(images, max(1, count // len(kinds))) if count else list(images)
        with open_source(self.source) as reader:
            for start in range(0, len(chosen), size):
                few = chosen[start : start + size]
                fitted = [decode_and_fit(reader.read(image.name), spec, reader.describe(image.name)) for image in few]
                for kind in kinds:
                    pixels = fitted
                    if kind == "corrupted":
                        pixels = [_corrupt(*pair, self.seed) for pair in zip(fitted, few, strict=True)]
                    batch = Preprocessor(spec).convert(np.stack(pixels))
                    yield adversary(batch) if kind == "adversarial" and adversary else batch

    def save(self, path: Path) -> None:
        """Write a manifest from which `calibration_set` restores this set.

        Raises:
            OutputError: `path` cannot be written.
        """
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
    """Raise ConfigError if a kind is unknown, repeated, or needs an adversary that is missing."""
    for kind in mix:
        if kind not in KINDS:
            raise ConfigError(
                f"a calibration mix contains {', '.join(KINDS)}; found {kind!r}; {nearest(kind, KINDS)}".rstrip("; ")
            )
    if not mix or len(set(mix)) < len(mix):
        raise ConfigError(
            f"a calibration mix needs at least one kind, and each kind once; found {','.join(mix) or 'none'}"
        )
    if "adversarial" in mix and adversary is None:
        raise ConfigError(
            "adversarial images need gradients, which an ONNX file cannot provide; calibrate with "
            "advprop-export CHECKPOINT --trt int8, or remove adversarial from the mix"
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
    """Choose calibration images.

    Args:
        source: a folder, a tar file, an array (see `open_source`), or the manifest (`NAME.calib.json`)
            of an earlier set, which is then used unchanged.
        count: maximum number of images, evenly spaced over the sorted names.
        spec: the network's preprocessing. If given, images that cannot be preprocessed are skipped.
        held: also hold out images for a budget: up to `count` more, or a quarter of all images if
            there are too few.
        mix: variants of each image, from KINDS.
        seed: seed of the corruptions.

    Raises:
        DataError: there are no usable images, all images are copies of one, or they differ from the
            manifest.
    """
    if source.suffix == ".json":
        return _from_manifest(source)
    with open_source(source) as reader:
        available = len(reader.names)
        total = min(available, 2 * count if held else count)
        found = _usable_images(reader, spread(reader.names, total), spec)
    if not found:
        raise DataError(
            f"{source}: found {available} images, none of which can be used; pass a few hundred photographs "
            "like those that the model will see"
        )
    if len(found) > 1 and len({image.sha256 for image in found}) == 1:
        raise DataError(
            f"{source}: all {len(found)} images are copies of the same image; pass a few hundred different images"
        )
    apart = spread(range(len(found)), max(len(found) - count, len(found) // 4)) if held else []
    return CalibrationSet(
        source=source.resolve(),
        images=tuple(image for place, image in enumerate(found) if place not in set(apart)),
        held=tuple(found[place] for place in apart),
        mix=tuple(mix),
        seed=seed,
    )


def _usable_images(reader: ImageSource, names: Sequence[str], spec: Preprocessing | None) -> list[CalibrationImage]:
    found = []
    small = 0
    for name in names:
        try:
            content = reader.read(name)
            image = decode(content)
            if spec is not None:
                pixels = fit_to_input(image, spec)
                if (pixels == pixels[0, 0]).all():
                    raise DataError("all its pixels have the same color")
                small += 2 * min(image.size) < min(spec.height, spec.width)
        except DataError as error:
            log.warning("skipped %s: %s", name, error)
            continue
        found.append(CalibrationImage(name, _sha256(content)))
    if small and spec is not None:
        log.warning(
            "%d of %d images are less than half as large as the network's input (%d x %d); enlarged images lack "
            "the detail of the images that the model will see",
            *(small, len(found), spec.height, spec.width),
        )
    return found


def _sha256(content: bytes | NDArray[np.uint8]) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(str(content.shape).encode() + content.tobytes()).hexdigest()


def _corrupt(image_HWC: NDArray[np.uint8], image: CalibrationImage, seed: int) -> NDArray[np.uint8]:
    """Apply a validation corruption and severity that depend on the seed and the image's hash."""
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
        raise DataError(f"no such calibration manifest: {path}") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a calibration manifest ({error})") from error
    if not chosen.images:
        raise DataError(f"{path} lists no images")
    with open_source(chosen.source) as reader:
        there = set(reader.names)
        for image in (*chosen.images, *chosen.held):
            if image.name not in there:
                raise DataError(f"{path} lists an image that does not exist: {image.name} in {chosen.source}")
            if _sha256(reader.read(image.name)) != image.sha256:
                raise DataError(
                    f"{image.name} is not the image that {path} lists: its content has changed. Calibrate again with "
                    f"--data {chosen.source}"
                )
    return chosen
