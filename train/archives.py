"""Images in tar files, with random access and without unpacking.

Two layouts of timm and WebDataset are supported:

    by class     train.tar with CLASS/IMAGE files, or train/CLASS.tar with IMAGE files. Subfolders of
                 classes, and folders that contain all classes, do not matter.
    WebDataset   shards train*.tar or train/*.tar with KEY.jpg and KEY.cls, which is a class number

A tar file is a list of headers, each followed by a file. One pass over the headers finds every
image, so order, augmentation and resuming are as exact as for a folder. Compressed tar files are
not supported because they do not allow random access.
"""

from __future__ import annotations

import logging
import tarfile
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, overload

from timm.utils.misc import natural_key

from runtime.errors import DataError
from runtime.system.image_sources import is_image_name, unread_format
from train.data import ImageData, ImageSet, Origin, by_class, class_names, median_short_side

__all__ = ["TarMember", "find_archives", "image_archives", "tar_members"]

log = logging.getLogger(__name__)

_PARTS = {"train": ("train",), "val": ("val", "validation")}


class TarMember(NamedTuple):
    """A file inside an uncompressed tar file."""

    archive: str
    """Path of the tar file."""
    name: str
    """Path inside it."""
    offset: int
    """Position of its first byte."""
    size: int
    """Size in bytes."""

    def read(self) -> bytes:
        """Return the file's content.

        Raises:
            DataError: the tar file cannot be read, or is truncated.
        """
        try:
            # Opened for every file, because worker processes cannot share a file object.
            with Path(self.archive).open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(f"cannot read {self.archive}: {error.strerror}") from error
        if len(content) != self.size:
            raise DataError(f"{self.archive} is truncated at {self.name}")
        return content


def tar_members(path: Path) -> list[TarMember]:
    """List the files of an uncompressed tar file, in its order, in one pass over its headers.

    Raises:
        DataError: it is compressed, damaged or not a tar file.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return [TarMember(str(path), file.name, file.offset_data, file.size) for file in tar if file.isreg()]
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"cannot read {path} as an uncompressed tar file: {error}. Decompress it first, for example with gunzip"
        ) from error


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
        shards = {part: _read_shards(members[part], root / part) for part in ("train", "val")}
        count = 1 + max(max(shard.labels) for shard in shards.values())
        return ImageData(
            name=root.resolve().name,
            classes=class_names(count),
            wnids=(),
            train=shards["train"],
            val=shards["val"],
            short_side=median_short_side(shards["train"]),
        )
    grouped, unread = _group_by_class(members["train"])
    held_out, _ = _group_by_class(members["val"], known=grouped)
    empty = {name: counts for name, counts in unread.items() if not grouped[name]}
    return by_class(Origin.of(root), grouped, held_out, TarImages, empty)


def _group_by_class(
    members: Sequence[TarMember], known: Collection[str] = ()
) -> tuple[dict[str, list[TarMember]], dict[str, Counter[str]]]:
    """Group images by the outermost folder in the tar file, or by its name if it has no folders.

    A folder that contains all images is not a class, because there are at least two.

    Args:
        members: files of all tar files of a part.
        known: class names. Such a folder is a class even if it contains all images.

    Returns:
        The images by class, and the number of files by class and suffix of an image format that is
        not decoded.
    """
    files = [
        (member, [part for part in PurePosixPath(member.name).parent.parts if part != "."])
        for member in members
        if is_image_name(member.name) or (unread_format(member.name) and is_image_name(f"{member.name}.png"))
    ]
    while files and all(parts and parts[0] == files[0][1][0] for _, parts in files) and files[0][1][0] not in known:
        files = [(member, parts[1:]) for member, parts in files]
    found: dict[str, list[TarMember]] = defaultdict(list)
    unread: dict[str, Counter[str]] = defaultdict(Counter)
    for member, parts in files:
        name = parts[0] if parts else Path(member.archive).stem
        if suffix := unread_format(member.name):
            unread[name][suffix] += 1
            found[name] += []
        else:
            found[name].append(member)
    for name, counts in unread.items():
        log.warning("%s: skipped %d files, formats that are not decoded (%s)", name, counts.total(), ", ".join(counts))
    return {name: sorted(images, key=lambda file: natural_key(file.name)) for name, images in found.items()}, unread


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
