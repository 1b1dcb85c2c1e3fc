"""Datasets by name, read through timm: torchvision, Hugging Face, TFDS and WebDataset.

    torch/cifar10            torchvision, downloaded with data.download = true
    hfds/uoft-cs/cifar10     Hugging Face, cached on disk (needs the package `datasets`)
    hfids/…, wds/…, tfds/…   streams: Hugging Face, WebDataset, TensorFlow Datasets

The first two have random access, like a folder. A stream has its own order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from timm.data import create_dataset

from runtime.errors import ConfigError, DataError, first_line
from runtime.system.decode import ImageLike
from train.archives import find_archives, image_archives
from train.config import DataConfig
from train.data import (
    ImageData,
    ImageSet,
    ImageStream,
    class_names,
    embedded_digits,
    median_short_side,
)
from train.distributed import barrier, rank
from train.folders import image_files

__all__ = ["open_data"]

log = logging.getLogger(__name__)

_RANDOM, _STREAMED = ("torch", "hfds"), ("hfids", "wds", "tfds")
_NEEDS = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}


def open_data(config: DataConfig, *, seed: int = 0, record: Path | None = None) -> ImageData:
    """Open the dataset that `config` describes.

    Args:
        config: settings of the data.
        seed: seed of the split, if the images are in one folder.
        record: `split.csv` of the run that resumes.

    Raises:
        DataError: there are no images, or they do not form a dataset.
        ConfigError: the kind of dataset is unknown, or the package that reads it is missing.
    """
    if config.dataset is not None:
        if rank() != 0:  # the first process downloads while the others wait
            barrier()
        data = _open_named(config.dataset, config)
        if rank() == 0:
            barrier()
        return data
    if config.root is not None:
        try:
            if _is_archived(config.root):
                return image_archives(config.root)
            return image_files(config, seed=seed, record=record)
        except OSError as error:
            raise DataError(f"cannot read --data {config.root}: {error.strerror or error}") from error
    data = embedded_digits()
    log.warning(
        "no --data given: training on the embedded digits, %d images (and %d for validation)",
        len(data.train),
        len(data.val),
    )
    return data


def _is_archived(root: Path) -> bool:
    """Return whether the images are in tar files, without unpacked class folders next to them."""
    folder = root / "train"
    unpacked = folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir())
    return not unpacked and bool(find_archives(root)["train"])


def _open_named(name: str, config: DataConfig) -> ImageData:
    kind, slash, rest = name.partition("/")
    kind = kind.lower()
    if kind not in _RANDOM + _STREAMED or not slash:
        raise ConfigError(
            f"--dataset {name!r}: unknown kind of dataset; expected "
            f"{', '.join(f'{kind}/…' for kind in _RANDOM + _STREAMED)}. "
            "For a folder or tar files, pass --data only"
        )
    if kind in _STREAMED:
        return _open_streams(name, kind, config)
    train, val = (_create_dataset(name, kind, config, split) for split in (config.train_split, config.val_split))
    image_set = _open_torchvision if kind == "torch" else _open_hugging_face
    trained, names = image_set(train, name)
    return ImageData(
        name=rest,
        classes=names or class_names(1 + max(trained.labels)),
        wnids=(),
        train=trained,
        val=image_set(val, name)[0],
        short_side=median_short_side(trained),
    )


def _create_dataset(name: str, kind: str, config: DataConfig, split: str, **more: Any) -> Any:
    root = None if config.root is None else str(config.root)
    if kind in ("torch", "wds") and root is None:
        raise ConfigError(f"--dataset {name} needs --data DIR, the folder with its files")
    keys = {"input_key": config.input_key or None, "target_key": config.target_key or None} if kind != "torch" else {}
    try:
        return create_dataset(name, root=root, split=split, download=config.download, **keys, **more)
    except ImportError as error:
        raise ConfigError(f"--dataset {name} needs a package: pip install {_NEEDS.get(kind, 'torchvision')}") from error
    except (RuntimeError, AssertionError, OSError, ValueError, KeyError, TypeError) as error:
        hint = "; --set data.download=true downloads it" if kind in ("torch", "tfds") and not config.download else ""
        raise DataError(
            f"timm cannot open {name}, split {split!r}, in {root}: {first_line(error) or type(error).__name__}{hint}. "
            "The names of the splits are data.train_split and data.val_split"
        ) from error


class _Items:
    """Images that a function reads, by index."""

    def __init__(self, read: Callable[[int], ImageLike], indices: Sequence[int], names: Callable[[int], str]) -> None:
        self._read, self._indices, self._names = read, indices, names

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> ImageLike: ...

    @overload
    def __getitem__(self, index: slice) -> _Items: ...

    def __getitem__(self, index: int | slice) -> ImageLike | _Items:
        if isinstance(index, slice):
            return _Items(self._read, self._indices[index], self._names)
        try:
            return self._read(self._indices[index])
        except (OSError, SyntaxError, ValueError, AssertionError) as error:
            raise DataError(f"cannot read {self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        return self._names(self._indices[index])


def _open_torchvision(dataset: Any, name: str) -> tuple[ImageSet, tuple[str, ...]]:
    labels = getattr(dataset, "targets", None)
    if labels is None:
        raise DataError(f"{name} has no list of labels, so it cannot be used for training")

    def read(index: int) -> ImageLike:
        image: ImageLike = dataset[index][0]
        return image

    images = _Items(read, range(len(dataset)), lambda index: f"{name}[{index}]")
    return ImageSet(images, [int(label) for label in labels]), tuple(map(str, getattr(dataset, "classes", ())))


def _open_hugging_face(dataset: Any, name: str) -> tuple[ImageSet, tuple[str, ...]]:
    reader = dataset.reader

    def read(index: int) -> ImageLike:
        with reader[index][0] as file:
            content: bytes = file.read()
        return content

    labels = [int(label) for label in reader.iter_targets()]
    return ImageSet(_Items(read, range(len(labels)), lambda index: f"{name}[{index}]"), labels), _class_names(reader)


def _class_names(reader: Any) -> tuple[str, ...]:
    """Return the class names that timm's reader provides, in label order; they may be missing."""
    by_index = {index: label for label, index in (getattr(reader, "class_to_idx", None) or {}).items()}
    return tuple(str(by_index[index]) for index in sorted(by_index))


def _open_streams(name: str, kind: str, config: DataConfig) -> ImageData:
    def opener(split: str) -> Callable[[bool, int, int], Any]:
        def open_stream(training: bool, batch_size: int, seed: int) -> Any:
            return _create_dataset(name, kind, config, split, is_training=training, batch_size=batch_size, seed=seed)

        return open_stream

    train, val = ImageStream(opener(config.train_split)), ImageStream(opener(config.val_split))
    names = _class_names(val.open(False, 1, 0).reader)
    if not names and not config.num_classes:
        raise ConfigError(f"the number of classes of {name} is unknown; add --set data.num_classes=N")
    return ImageData(
        name=str(Path(config.root).name) if kind == "wds" and config.root else name.partition("/")[2],
        classes=names or class_names(config.num_classes),
        wnids=(),
        train=train,
        val=val,
        short_side=median_short_side(val),
    )
