"""Worker processes that decode and corrupt blocks of images.

Workers are started with `spawn`, so they share neither the model nor its libraries with the main
process. They import only NumPy, Pillow, OpenCV and SciPy.

Shape suffixes: N images, H height, W width, C channels.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailable, DataError
from runtime.evaluate.corruptions import corrupt
from runtime.preprocessing import decode_and_fit
from runtime.spec import Preprocessing
from runtime.system.decode import decode
from runtime.system.files import atomic_write, output_dir
from runtime.system.image_sources import ImageSource

__all__ = ["Corruption", "Workers", "corrupt_block", "in_order", "load_block", "use_one_core"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_CACHE_FORMAT = 1
"""Version of the cache. Increase it when `corrupt` returns different pixels."""
_BAD_IMAGE_FIX = "remove or replace the file: every image of a test set counts, so none is skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """The corruption of a block."""

    name: str
    severity: int
    seed: int
    table: str
    """`imagenet`, `tiny` or `cifar`."""


def load_block(
    source: ImageSource, names: Sequence[str], preprocessing: Preprocessing, resize: str
) -> NDArray[np.uint8]:
    """Decode images and resize them to the network's input size.

    Args:
        source: reads the images.
        names: names of the images.
        preprocessing: preprocessing of the model.
        resize: `fit`: resize and crop as the model specifies; `none`: use the pixels unchanged.

    Returns:
        uint8 RGB, (N, H, W, 3).

    Raises:
        DataError: an image cannot be decoded, or the images differ in size and may not be resized.
    """
    files = ((source.read(name), source.describe(name)) for name in names)
    try:
        if resize == "fit":
            return np.stack([decode_and_fit(content, preprocessing, described) for content, described in files])
        images = [np.asarray(decode(*file, exif=preprocessing.exif)) for file in files]
    except DataError as error:
        raise DataError(error.message, fix=_BAD_IMAGE_FIX) from error
    other = next((place for place, image in enumerate(images) if image.shape != images[0].shape), None)
    if other is not None:
        sizes = [f"{image.shape[1]}×{image.shape[0]} ({names[place]})" for place, image in enumerate(images)]
        raise DataError(
            f"images must all have the same size if they are not resized; found {sizes[0]} and {sizes[other]}. Check "
            "that these are the images as released, or resize them with --resize fit, which is a different test"
        )
    return np.stack(images)


def corrupt_block(
    images_NHWC: NDArray[np.uint8], names: Sequence[str], corruption: Corruption, cache: Path | None
) -> NDArray[np.uint8]:
    """Corrupt images that have the network's input size, or read them from the cache.

    Args:
        images_NHWC: uint8 RGB.
        names: names of the images, which seed their random numbers.
        corruption: the corruption to apply.
        cache: folder of the cache; None disables the cache.

    Raises:
        BackendUnavailable: OpenCV, SciPy or the textures of frost are missing.
        OutputError: the cache cannot be written.
    """
    file = None if cache is None else cache / _cache_name(images_NHWC, names, corruption)
    if file is not None and (cached_NHWC := _read_cached(file, images_NHWC.shape)) is not None:
        return cached_NHWC
    pairs = zip(images_NHWC, names, strict=True)
    corrupted_NHWC = np.stack(
        [
            corrupt(image, corruption.name, corruption.severity, key=name, seed=corruption.seed, table=corruption.table)
            for image, name in pairs
        ]
    )
    if file is not None:
        output_dir(file.parent)
        with atomic_write(file) as stream:
            np.save(stream, corrupted_NHWC)
    return corrupted_NHWC


def _cache_name(images_NHWC: NDArray[np.uint8], names: Sequence[str], corruption: Corruption) -> str:
    """Return a file name with a hash of everything that the corrupted pixels depend on."""
    import cv2
    import PIL
    import scipy

    versions = [np.__version__, cv2.__version__, PIL.__version__, scipy.__version__]
    facts = [_CACHE_FORMAT, list(names), corruption.seed, corruption.table, images_NHWC.shape, versions]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    digest.update(images_NHWC.tobytes())
    return f"{corruption.name}-{corruption.severity}/{digest.hexdigest()}.npy"


def _read_cached(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Return the images in a file of the cache; None if it does not exist or is damaged."""
    try:
        images: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def in_order(
    submit: Callable[[_Item], Future[_Result]], items: Iterable[_Item], ahead: int
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in order, while up to `ahead` further items are in progress.

    Raises:
        BackendUnavailable: a worker process died.
    """
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, submit(item)))
            if len(waiting) > ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise BackendUnavailable(
            "a worker process died, probably because memory ran out: use fewer --workers or a smaller --batch-size. "
            "The same command resumes. (In your own script, put the call under "
            "`if __name__ == '__main__':`.)"
        ) from error


class Workers:
    """A pool of worker processes. Without workers, the calling process does the work."""

    def __init__(self, count: int) -> None:
        """Create a pool that starts up to `count` processes as they are needed."""
        self.ahead = 2 * count
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _initialize_worker) if count else None

    def submit(self, work: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
        """Call `work` in a worker process, or immediately if the pool has no workers."""
        if self._pool is not None:
            return self._pool.submit(work, *arguments)
        return self.completed(work(*arguments))

    def completed(self, result: _Result) -> Future[_Result]:
        """Return a future that already has its result."""
        future: Future[_Result] = Future()
        future.set_result(result)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _initialize_worker() -> None:
    """Ignore Ctrl-C, which the parent process handles; end together with it; use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    use_one_core()


def use_one_core() -> None:
    """Limit OpenCV to one core in this process."""
    try:
        import cv2
    except ImportError:  # only corruptions need it, and they report that it is missing
        return
    cv2.setNumThreads(1)


def _exit_with_parent() -> None:
    """End this process with its parent. It would otherwise wait forever if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
