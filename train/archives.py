"""Images in tar files, with random access and without unpacking.

Two layouts of timm and WebDataset are supported:

    by class     train.tar with CLASS/IMAGE files, or train/CLASS.tar with IMAGE files
    WebDataset   shards train*.tar or train/*.tar with KEY.jpg and KEY.cls, which is a class number

A tar file is a list of headers, each followed by a file. One pass over the headers finds every
image, so order, augmentation and resuming are as exact as for a folder. Compressed tar files are
not supported because they do not allow random access.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import overload

from timm.utils.misc import natural_key

from runtime.errors import DataError
from runtime.system.image_sources import TarMember, is_image_name, tar_members
from train.data import ImageData, ImageSet, by_class, class_names, median_short_side

__all__ = ["find_archives", "image_archives"]

log = logging.getLogger(__name__)

_PARTS = {"train": ("train",), "val": ("val", "validation")}


class TarImages:
    """Encoded images in tar files."""

    def __init__(self, members: Sequence[TarMember]) -> None:
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> TarImages: ...

    def __getitem__(self, index: int | slice) -> bytes | TarImages:
        if isinstance(index, slice):
            return TarImages(self._members[index])
        return self._members[index].read()

    def name(self, index: int) -> str:
        """Return the tar file and the path in it."""
        return f"{self._members[index].archive}:{self._members[index].name}"


def find_archives(root: Path) -> dict[str, list[Path]]:
    """Return the tar files of `train` and `val` below `root`; a list may be empty."""
    found = {}
    for part, names in _PARTS.items():
        places = (pattern for name in names for pattern in (f"{name}/*.tar", f"{name}.tar", f"*{name}*.tar"))
        matches = (sorted(root.glob(pattern), key=lambda path: natural_key(path.name)) for pattern in places)
        found[part] = next((files for files in matches if files), [])
    return found


def image_archives(root: Path) -> ImageData:
    """Open the dataset in the tar files of `root`. This reads all of their headers.

    Raises:
        DataError: a part is missing, a file is not an uncompressed tar file, there are no images,
            or their classes do not form a dataset.
    """
    archives = find_archives(root)
    for part, files in archives.items():
        if not files:
            raise DataError(f"{root}: found no tar files of {part}; expected {part}.tar, {part}/*.tar or *{part}*.tar")
    members = {part: [member for file in files for member in tar_members(file)] for part, files in archives.items()}
    if any(member.name.endswith(".cls") for member in members["train"]):
        train, val = _read_shards(members["train"], root / "train"), _read_shards(members["val"], root / "val")
        count = 1 + max(max(train.labels), max(val.labels))
        return ImageData(
            name=root.resolve().name,
            classes=class_names(count),
            wnids=(),
            train=train,
            val=val,
            short_side=median_short_side(train),
        )
    return by_class(root, _group_by_class(members["train"]), _group_by_class(members["val"]), TarImages)


def _group_by_class(members: Sequence[TarMember]) -> dict[str, list[TarMember]]:
    """Group images by their folder in the tar file, or by the tar file's name without a folder."""
    found: dict[str, list[TarMember]] = defaultdict(list)
    for member in members:
        if not is_image_name(member.name):
            continue
        folder = PurePosixPath(member.name).parent.name
        found[folder or Path(member.archive).stem].append(member)
    return {name: sorted(files, key=lambda file: natural_key(file.name)) for name, files in found.items()}


def _read_shards(members: Sequence[TarMember], where: Path) -> ImageSet:
    """Return WebDataset samples, whose files have the same name up to the first dot."""
    images: dict[tuple[str, str], TarMember] = {}
    labels: dict[tuple[str, str], int] = {}
    for member in members:
        path = PurePosixPath(member.name)
        key = (member.archive, str(path.parent / path.name.split(".", 1)[0]))
        if is_image_name(member.name):
            images[key] = member
        elif path.name.endswith(".cls"):
            text = member.read().decode("ascii", "replace").strip()
            if not text.isdecimal():
                raise DataError(f"{member.archive}: {member.name} holds {text[:40]!r}; expected a class number")
            labels[key] = int(text)
    both = [key for key in images if key in labels]
    if not both:
        raise DataError(
            f"{where}: found {len(images)} images and {len(labels)} labels, but no image KEY.jpg has a label KEY.cls"
        )
    if len(both) < len(images):
        log.warning("%s: ignored %d of %d images, which have no .cls file", where, len(images) - len(both), len(images))
    return ImageSet(TarImages([images[key] for key in both]), [labels[key] for key in both])
