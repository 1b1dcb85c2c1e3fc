"""Find and read images in folders, tar files and NumPy arrays, by one set of rules.

- An image file has one of SUFFIXES, in any case. Files of other image formats are counted.
- Hidden and system entries (`.Trash`, `._1.jpg`, `__MACOSX`, `@eaDir`, …) are skipped at every
  level.
- Links are followed, except those that lead back to a folder that is being read, or into the folder
  of another class.
- An image's name is its path relative to the source, with forward slashes. Names are sorted as
  text.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self, TypeVar

from runtime.errors import DataError
from runtime.system.files import is_url, no_such

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "SUFFIXES",
    "ArraySource",
    "FolderSource",
    "ImageSource",
    "TarSource",
    "class_folders",
    "find_images",
    "image_paths",
    "is_image_name",
    "open_array",
    "open_source",
    "read_array",
    "spread",
    "unread_format",
]

log = logging.getLogger(__name__)

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Suffixes of image files, in lower case."""

_UNREAD_SUFFIXES = (
    *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jpx", ".jxl"),
    *(".nef", ".orf", ".pcx", ".psd", ".raf", ".rw2", ".svg", ".tga", ".xcf"),
)
"""Suffixes of image formats that are not decoded, in lower case."""

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"})
"""Files and folders that operating systems and network drives create."""

_Item = TypeVar("_Item")


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """Return `count` items, evenly spaced from first to last; all of them if there are fewer."""
    import numpy as np

    if len(items) <= count:
        return list(items)
    return [items[round(position)] for position in np.linspace(0, len(items) - 1, count)]


def is_image_name(name: str) -> bool:
    """Return whether a relative path has an image suffix and no hidden part."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(map(_is_hidden, path.parts))


def unread_format(name: str) -> str:
    """Return the suffix of an image format that is not decoded, or "" for any other file."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in _UNREAD_SUFFIXES else ""


def _is_hidden(name: str) -> bool:
    return name in _SYSTEM_NAMES or (name.startswith(".") and name not in (".", ".."))


def class_folders(root: Path) -> list[str]:
    """Return the names of the folders in `root`, sorted, without hidden ones.

    Raises:
        DataError: `root` is not a folder.
    """
    if not root.is_dir():
        if is_url(root):
            raise DataError(no_such("folder of CLASS/IMAGE files", root))
        found = "a file" if root.exists() else "no such file or folder"
        raise DataError(f"{root}: expected a folder of CLASS/IMAGE files; found {found}")
    with _data_errors(root):
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    hidden = [name for name in folders if _is_hidden(name)]
    if hidden:
        log.warning("%s: skipped %d hidden or system folders (%s)", root, len(hidden), ", ".join(hidden[:5]))
    return [name for name in folders if not _is_hidden(name)]


def find_images(root: Path, folders: Sequence[str] = ("",)) -> dict[str, list[str]]:
    """Find the image files below folders, at any depth.

    Skipped entries are logged in one line.

    Args:
        root: the dataset's folder.
        folders: class folders in `root`; by default, `root` itself.

    Returns:
        Folder → names of its images, relative to `root` and sorted.

    Raises:
        DataError: a folder cannot be read.
    """
    walk = _Walk(root, folders)
    with _data_errors(root):
        found = {folder: sorted(walk.names(folder)) for folder in folders}
    if walk.skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(walk.skipped.items()))
        log.warning("%s: skipped %s", root, counts)
    return found


@contextlib.contextmanager
def _data_errors(root: Path) -> Iterator[None]:
    """Convert errors of the operating system to DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror or error}") from error


class _Walk:
    """Walks a dataset's folders once."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self._root = root
        self._real = {folder: os.path.realpath(root / folder) for folder in folders}
        self.skipped: Counter[str] = Counter()

    def names(self, folder: str) -> Iterator[str]:
        """Yield the images below a folder."""
        foreign = [real for other, real in self._real.items() if other != folder and real != self._real[folder]]
        yield from self._walk(folder, foreign, (self._real[folder],))

    def _walk(self, place: str, foreign: Sequence[str], parents: tuple[str, ...]) -> Iterator[str]:
        with os.scandir(self._root / place) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = f"{place}/{entry.name}" if place else entry.name
            if _is_hidden(entry.name):
                self.skipped["hidden or system entries"] += 1
                continue
            is_folder = entry.is_dir()
            if not is_folder and not entry.name.lower().endswith(SUFFIXES):
                if unread := unread_format(entry.name):
                    self.skipped[f"{unread} files, a format that is not decoded"] += 1
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else f"{parents[-1]}{os.sep}{entry.name}"
            if entry.is_symlink() and any(_is_inside(real, other) for other in foreign):
                self.skipped["links into the folder of another class"] += 1
            elif is_folder and any(_is_inside(parent, real) for parent in parents):
                self.skipped["links to a folder that contains them"] += 1
            elif is_folder:
                yield from self._walk(name, foreign, (*parents, real))
            elif entry.is_file():
                # ImageNet-C has the same 50,000 names in each of 75 cells.
                yield sys.intern(name)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def image_paths(folder: Path) -> list[Path]:
    """Return the image files below `folder`, sorted.

    Raises:
        DataError: the folder does not exist or has no image files.
    """
    if not folder.is_dir():
        raise DataError(no_such("folder of images", folder))
    names = find_images(folder)[""]
    if not names:
        raise DataError(f"{folder}: found no image files; expected {', '.join(SUFFIXES)}")
    return [folder / name for name in names]


class ImageSource(ABC):
    """Images by name."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of the images, sorted: the order is the same on every machine."""

    @abstractmethod
    def read(self, name: str) -> bytes | NDArray[np.uint8]:
        """Return an encoded image, or its pixels, uint8 (H, W, 3).

        Raises:
            DataError: the image cannot be read.
        """

    @abstractmethod
    def describe(self, name: str) -> str:
        """Return the name of an image for messages."""

    def close(self) -> None:  # noqa: B027  # most sources hold nothing open
        """Close the files that the source holds open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class FolderSource(ImageSource):
    """The image files below a folder. Small and picklable, for worker processes."""

    root: Path

    @cached_property
    def names(self) -> Sequence[str]:
        return find_images(self.root)[""]

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"no such image file: {self.root / name}") from error
        except OSError as error:
            raise DataError(f"cannot read {self.root / name}: {error.strerror or error}") from error

    def describe(self, name: str) -> str:
        return str(self.root / name)


class TarSource(ImageSource):
    """The image files in a tar file, compressed or not. Nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        """List `path`.

        Raises:
            DataError: it is damaged or not a tar file.
        """
        self._path = path
        try:
            self._tar = tarfile.open(path)  # noqa: SIM115  # `close` closes it
        except (OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{path} is not a tar file ({error})") from error
        try:
            members = [member for member in self._tar.getmembers() if member.isfile()]
        except (OSError, EOFError, tarfile.TarError) as error:
            self.close()
            raise DataError(f"{path} is damaged: its list of files is incomplete ({error})") from error
        self._members = {member.name: member for member in members if is_image_name(member.name)}

    @property
    def names(self) -> Sequence[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        try:
            file = self._tar.extractfile(self._members[name])
            assert file is not None
            return file.read()
        except (KeyError, OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{self._path}: cannot read {name} ({error})") from error

    def describe(self, name: str) -> str:
        return f"{self._path}:{name}"

    def close(self) -> None:
        self._tar.close()


def read_array(path: Path, *, mapped: bool = False) -> NDArray[Any]:
    """Read a `.npy` file; `mapped` maps it into memory.

    Raises:
        DataError: the file is missing, damaged, or holds something else than one array.
    """
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # a damaged header causes many kinds
        raise DataError(f"{path} is not a complete .npy file ({error}); copy or download it again") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise DataError(f"{path} is an archive of arrays; expected one array, as numpy.save writes it")
    return found


def open_array(path: Path) -> NDArray[np.uint8]:
    """Map a `.npy` file of images into memory.

    Returns:
        uint8, (N, H, W, 3).

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    array: NDArray[np.uint8] = read_array(path, mapped=True)
    if not _are_images(array):
        raise DataError(f"{path}: expected images, uint8 (N, H, W, 3); found {array.dtype} {array.shape}")
    return array


def _are_images(array: NDArray[Any]) -> bool:
    return bool(array.dtype == "uint8" and array.ndim == 4 and array.shape[-1] == 3)


@dataclass(frozen=True)
class ArraySource(ImageSource):
    """The rows of a `.npy` file, or of the first image array in a `.npz` file, named by number."""

    path: Path

    @cached_property
    def _images(self) -> NDArray[np.uint8]:
        import numpy as np

        if self.path.suffix.lower() != ".npz":
            return open_array(self.path)
        try:
            with self.path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as content:
                arrays = [content[key] for key in content.files]
        except Exception as error:  # a damaged file causes many kinds
            raise DataError(f"{self.path} is not a complete .npz file ({error}); copy or download it again") from error
        images: NDArray[np.uint8] | None = next((array for array in arrays if _are_images(array)), None)
        if images is None:
            found = ", ".join(f"{array.dtype} {array.shape}" for array in arrays) or "nothing"
            raise DataError(f"{self.path}: expected an array of images, uint8 (N, H, W, 3); found {found}")
        return images

    @property
    def names(self) -> Sequence[str]:
        return [str(row) for row in range(len(self._images))]

    def read(self, name: str) -> NDArray[np.uint8]:
        import numpy as np

        if not (name.isdecimal() and int(name) < len(self._images)):
            raise DataError(f"{self.path} has no image {name}; it has {len(self._images)} images")
        return np.array(self._images[int(name)])

    def describe(self, name: str) -> str:
        return f"{self.path}, image {name}"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # the mapped file cannot be pickled


def open_source(path: Path) -> ImageSource:
    """Open a folder, a tar file (`.tar`, `.tar.gz`, …) or a NumPy file (`.npy`, `.npz`) of images.

    Raises:
        DataError: `path` is something else, or is damaged.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # the name is too long
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if is_folder:
        return FolderSource(path)
    if is_file and path.name.lower().endswith(_TARS):
        return TarSource(path)
    if is_file and path.suffix.lower() in (".npy", ".npz"):
        source = ArraySource(path)
        _ = source.names  # reports a damaged file now
        return source
    if is_url(path):
        raise DataError(no_such("folder of images", path))
    found = "a file of another kind" if path.exists() else "no such file or folder"
    raise DataError(f"{path}: expected a folder, a tar file or a NumPy file of images; found {found}")
