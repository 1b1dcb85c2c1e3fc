"""Reads images by name from a folder, a tar file or an array."""

from __future__ import annotations

import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.preprocessing import SUFFIXES

__all__ = ["ArraySource", "FolderSource", "ImageSource", "TarSource", "open_source"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class ImageSource(ABC):
    """A collection of named images."""

    names: Sequence[str]
    """Names of the images, sorted: the order is the same on every machine."""

    @abstractmethod
    def read(self, name: str) -> bytes | NDArray[np.uint8]:
        """Return an encoded image, or its pixels, uint8 (H, W, 3). Raises DataError if it cannot be read."""

    def close(self) -> None:  # noqa: B027  # most sources keep no file open
        """Close open files; no image can be read afterward."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class FolderSource(ImageSource):
    """The image files in a folder and its subfolders, named by their relative paths."""

    def __init__(self, folder: Path) -> None:
        """List the images in `folder`."""
        self._folder = folder
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        self.names = [path.relative_to(folder).as_posix() for path in paths]

    def read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self._folder / name}: {error.strerror or error}") from error


class TarSource(ImageSource):
    """The image files in a tar file, named by their paths in it; the file is not unpacked."""

    def __init__(self, path: Path) -> None:
        """List the images in `path`. Raises DataError if it is not a complete tar file."""
        self._path = path
        try:
            self._tar = tarfile.open(path)  # noqa: SIM115  # `close` closes it
        except (OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{path} is not a tar file ({error})") from error
        try:
            members = [member for member in self._tar.getmembers() if member.isfile()]
        except (OSError, EOFError, tarfile.TarError) as error:
            self.close()
            raise DataError(f"{path} is not a complete tar file ({error})") from error
        self._members = {member.name: member for member in members if _is_image(member.name)}
        self.names = sorted(self._members)

    def read(self, name: str) -> bytes:
        try:
            file = self._tar.extractfile(self._members[name])
            assert file is not None
            return file.read()
        except (KeyError, OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{self._path}: {name} cannot be read ({error})") from error

    def close(self) -> None:
        self._tar.close()


class ArraySource(ImageSource):
    """The images in a `.npy` file, or in the first array of a `.npz` file that has images, named by their numbers."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises DataError if it has no uint8 array of shape (N, H, W, 3)."""
        self._path = path
        try:
            arrays = _arrays(path)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a complete NumPy file of images ({error})") from error
        fitting = [array for array in arrays if _is_pixels(array)]
        if not fitting:
            found = ", ".join(f"{array.dtype} {array.shape}" for array in arrays) or "nothing"
            raise DataError(f"{path}: expected an array of images, uint8 (N, H, W, 3); found {found}")
        self._array = fitting[0]
        self.names = [str(row) for row in range(len(self._array))]

    def read(self, name: str) -> NDArray[np.uint8]:
        if not (name.isdecimal() and int(name) < len(self._array)):
            raise DataError(f"{self._path} has no image {name}: it has {len(self._array)}")
        return np.array(self._array[int(name)])


def open_source(path: Path) -> ImageSource:
    """Open a folder, a tar file (`.tar`, `.tar.gz`, …) or a NumPy file (`.npy`, `.npz`).

    Raises:
        DataError: `path` is none of these, or is damaged.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.is_file() and path.name.lower().endswith(_TARS):
        return TarSource(path)
    if path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        return ArraySource(path)
    found = "a file of another kind" if path.exists() else "nothing at this path"
    raise DataError(
        f"{path}: expected a folder, a tar file or a NumPy file of images; found {found}. Calibration needs a few "
        "hundred photographs like those that the model will see"
    )


def _arrays(path: Path) -> list[NDArray[np.generic]]:
    if path.suffix.lower() == ".npy":
        return [np.load(path, mmap_mode="r", allow_pickle=False)]
    with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
        return [content[key] for key in content.files]


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


def _is_pixels(array: NDArray[np.generic]) -> bool:
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3 and len(array) > 0
