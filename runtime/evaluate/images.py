"""Labeled images of a test set, which are read on demand in any process."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.preprocessing import ImageLike
from runtime.system.image_sources import SUFFIXES

__all__ = ["ArrayFile", "Folder", "LabeledImages", "Source", "class_folders", "image_files", "open_array"]


class Source(Protocol):
    """Reads images. It is small and picklable, because it is sent to worker processes."""

    def read(self, name: str) -> ImageLike:
        """Return the image with this name, not decoded."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Image files, named by their paths relative to a folder."""

    root: Path

    def read(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """Rows of a `.npy` file, uint8 (N, H, W, 3), named by their numbers."""

    path: Path

    def read(self, name: str) -> NDArray[np.uint8]:
        return np.array(open_array(self.path)[int(name)])


def open_array(path: Path) -> NDArray[np.uint8]:
    """Memory-map a `.npy` file of images. Raises DataError if it is not such a file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} is not a complete .npy file ({error}); copy or download it again") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise DataError(f"{path}: expected images, uint8 (N, H, W, 3); found {array.dtype} {array.shape}")
    images: NDArray[np.uint8] = array
    return images


@dataclass(frozen=True, slots=True)
class LabeledImages:
    """Images with their classes, in an order that is the same on every machine."""

    source: Source
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
        """Return at most `limit` of the images, drawn at random from every class in proportion.

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
            # Images are ranked by their relative position within their class, which draws from all
            # classes in proportion.
            ranked += [((rank + 0.5) / len(names), _draw(seed, f"{label}"), name) for rank, name in enumerate(names)]
        chosen = {name for *_, name in sorted(ranked)[:limit]}
        pairs = [pair for pair in zip(self.names, self.labels, strict=True) if pair[0] in chosen]
        return LabeledImages(self.source, tuple(name for name, _ in pairs), tuple(label for _, label in pairs))


def _draw(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=8).digest()


def class_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in `root`, except hidden ones.

    Raises:
        DataError: the folder does not exist.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing of that name"
        raise DataError(f"{root}: expected a folder of CLASS/IMAGE files; found {found}")
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: Path, labels: Mapping[str, int]) -> LabeledImages:
    """List the images in class folders and their subfolders.

    Args:
        root: the folder that contains the class folders.
        labels: class folder → class.

    Raises:
        DataError: there are no image files.
    """
    pairs = sorted((name, label) for folder, label in labels.items() for name in _files(root, folder))
    if not pairs:
        raise DataError(f"{root}: expected image files ({', '.join(SUFFIXES)}) in its class folders; found none")
    return LabeledImages(Folder(root), tuple(name for name, _ in pairs), tuple(label for _, label in pairs))


def _files(root: Path, folder: str) -> Iterator[str]:
    """Yield the image files below a folder by their paths relative to `root`, with slashes."""
    for where, _, names in os.walk(root / folder, followlinks=True):
        home = Path(where).relative_to(root).as_posix()
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                # Interning saves memory: ImageNet-C has the same 50,000 names in each of 75 cells.
                yield sys.intern(f"{home}/{name}")
