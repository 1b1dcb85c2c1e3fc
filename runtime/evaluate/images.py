"""Labeled images of a test set, which any process can read on demand."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import DataError
from runtime.system.image_sources import SUFFIXES, FolderSource, ImageSource, find_images

__all__ = ["LabeledImages", "image_files"]


@dataclass(frozen=True, slots=True)
class LabeledImages:
    """Images with their classes, in an order that is the same on every machine."""

    source: ImageSource
    """Reads the images."""
    names: tuple[str, ...]
    """Names of the images in `source`. They also seed the random numbers of corruptions."""
    labels: tuple[int, ...]
    """Positions of their classes among the model's classes."""

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.labels)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sha256(self) -> str:
        """Hash of the names and classes, in their order."""
        lines = "".join(f"{name}\t{label}\n" for name, label in zip(self.names, self.labels, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def limited(self, limit: int, seed: int) -> LabeledImages:
        """Return at most `limit` randomly drawn images, stratified by class.

        The draw depends only on names, classes and `seed`. A smaller limit draws a subset of the
        images that a larger limit draws.
        """
        if limit >= len(self):
            return self
        classes: dict[int, list[str]] = defaultdict(list)
        for name, label in zip(self.names, self.labels, strict=True):
            classes[label].append(name)
        ranked = []
        for label, names in classes.items():
            names.sort(key=lambda name: _draw(seed, name))
            # Ranking images by their relative position within their class stratifies the draw.
            ranked += [((rank + 0.5) / len(names), _draw(seed, f"{label}"), name) for rank, name in enumerate(names)]
        chosen = {name for *_, name in sorted(ranked)[:limit]}
        pairs = [pair for pair in zip(self.names, self.labels, strict=True) if pair[0] in chosen]
        return LabeledImages(self.source, tuple(name for name, _ in pairs), tuple(label for _, label in pairs))

    def divided(self, count: int, seed: int) -> tuple[LabeledImages, LabeledImages]:
        """Draw `count` images, stratified by class, and return them and the others.

        Images with the same positions and classes are drawn from all sets of equal length.
        """
        numbered = LabeledImages(self.source, tuple(map(str, range(len(self)))), self.labels)
        drawn = {int(name) for name in numbered.limited(count, seed).names}
        return self._at(sorted(drawn)), self._at([place for place in range(len(self)) if place not in drawn])

    def _at(self, places: Sequence[int]) -> LabeledImages:
        return LabeledImages(
            self.source, tuple(self.names[place] for place in places), tuple(self.labels[place] for place in places)
        )


def _draw(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=8).digest()


def image_files(root: Path, labels: Mapping[str, int]) -> LabeledImages:
    """List the images in class folders and their subfolders.

    Args:
        root: the folder that contains the class folders.
        labels: class folder → class.

    Raises:
        DataError: there are no image files.
    """
    found = find_images(root, list(labels))
    pairs = sorted((name, labels[folder]) for folder, names in found.items() for name in names)
    if not pairs:
        raise DataError(f"{root}: expected image files ({', '.join(SUFFIXES)}) in its class folders; found none")
    return LabeledImages(FolderSource(root), tuple(name for name, _ in pairs), tuple(label for _, label in pairs))
