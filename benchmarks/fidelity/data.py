"""Training subsets, held-out images and validation images, as folders of links to CIFAR-10's files."""

from __future__ import annotations

import random
from pathlib import Path

from runtime.errors import DataError
from runtime.system.image_sources import class_folders, find_images
from runtime.system.locks import file_lock

__all__ = ["HELD_OUT", "prepare"]

HELD_OUT = 5_000
"""Training images that are held out to choose settings."""
_WAIT_S = 600.0
_CURVE = 0.2
"""Share of the held-out images that the trainer measures after every epoch."""


def prepare(cifar: Path, out: Path, images: int, held_out: int = HELD_OUT) -> Path:
    """Link a stratified training subset.

    The subset of a smaller number is part of that of a larger one. A subset contains held-out images
    only if there are not enough others; the settings are never chosen on such a subset.

    Args:
        cifar: folder with train/CLASS/* and val/CLASS/*.
        out: folder for the links.
        images: training images.
        held_out: images that are held out.

    Returns:
        Folder with train/CLASS, held/CLASS (the held-out images) and val/CLASS (a fifth of them).

    Raises:
        DataError: there are not enough training images.
    """
    folder = out / f"train-{images}"
    out.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_suffix(".lock"), timeout_s=_WAIT_S):
        if not (folder / "complete").exists():
            _link(cifar, folder, images, held_out)
    return folder


def _link(cifar: Path, folder: Path, images: int, held_out: int) -> None:
    classes = class_folders(cifar / "train")
    found = find_images(cifar / "train", classes)
    for name, files in found.items():
        shuffled = sorted(files)
        random.Random(name).shuffle(shuffled)
        held, per_class = held_out // len(found), images // len(found)
        if len(shuffled) < per_class:
            raise DataError(f"{cifar / 'train'} has {len(shuffled)} images of the class {name}; expected {per_class}")
        parts = {
            "held": shuffled[:held],
            "val": shuffled[: max(1, round(held * _CURVE))],
            "train": (shuffled[held:] + shuffled[:held])[:per_class],
        }
        for part, chosen in parts.items():
            target = folder / part / name
            target.mkdir(parents=True, exist_ok=True)
            for file in chosen:
                source = (cifar / "train" / file).resolve()
                link = target / source.name
                if not link.is_symlink():
                    link.symlink_to(source)
    (folder / "complete").touch()
