"""Blocks of images made ready in worker processes: decoded once, corrupted, kept on disk if asked.

Shape suffixes: N images, H height, W width, C channels.

Workers are started afresh (`spawn`), so that they hold neither the model nor the libraries that run it; what they
import is NumPy, Pillow, OpenCV and SciPy.
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
from runtime.evaluate.images import Source
from runtime.preprocessing import decode, fit_to_input
from runtime.spec import Preprocessing
from runtime.system.files import atomic_write, output_dir

__all__ = ["Corruption", "Workers", "corrupt_block", "in_order", "load_block", "one_core"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_CACHE_FORMAT = 1
"""Goes up when `corrupt` gives other pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """How a block is corrupted."""

    name: str
    severity: int
    seed: int
    table: str
    """`imagenet`, `tiny` or `cifar`."""


def load_block(source: Source, names: Sequence[str], preprocessing: Preprocessing, resize: str) -> NDArray[np.uint8]:
    """Decodes images and brings them to the network's size.

    Args:
        source: reads them.
        names: which.
        preprocessing: the model's.
        resize: `fit`: resize and crop as the model says; `none`: take the pixels as they are.

    Returns:
        uint8 RGB, (N, H, W, 3).

    Raises:
        DataError: an image cannot be decoded, or without resizing they differ in size.
    """
    if resize == "fit":
        return np.stack([fit_to_input(decode(source.read(name)), preprocessing) for name in names])
    images = [np.asarray(decode(source.read(name))) for name in names]
    other = next((place for place, image in enumerate(images) if image.shape != images[0].shape), None)
    if other is not None:
        sizes = [f"{image.shape[1]}×{image.shape[0]} ({names[place]})" for place, image in enumerate(images)]
        raise DataError(
            f"images that are not to be resized must be of one size; found {sizes[0]} and {sizes[other]}. Are these "
            "the images as they were released? --resize fit resizes them, and is another test"
        )
    return np.stack(images)


def corrupt_block(
    images_NHWC: NDArray[np.uint8], names: Sequence[str], corruption: Corruption, cache: Path | None
) -> NDArray[np.uint8]:
    """Corrupts fitted images, or reads what was kept of doing so.

    Args:
        images_NHWC: uint8 RGB.
        names: the images' keys.
        corruption: how.
        cache: the folder to keep the result in; None keeps none.

    Raises:
        BackendUnavailable: OpenCV, SciPy or frost's textures are missing.
        OutputError: the cache cannot be written.
    """
    file = None if cache is None else cache / _cache_name(images_NHWC, names, corruption)
    if file is not None and (kept := _kept(file, images_NHWC.shape)) is not None:
        return kept
    pairs = zip(images_NHWC, names, strict=True)
    made_NHWC = np.stack(
        [
            corrupt(image, corruption.name, corruption.severity, key=name, seed=corruption.seed, table=corruption.table)
            for image, name in pairs
        ]
    )
    if file is not None:
        output_dir(file.parent)
        with atomic_write(file) as stream:
            np.save(stream, made_NHWC)
    return made_NHWC


def _cache_name(images_NHWC: NDArray[np.uint8], names: Sequence[str], corruption: Corruption) -> str:
    """A name that follows from everything the corrupted pixels follow from."""
    import cv2
    import PIL
    import scipy

    versions = [np.__version__, cv2.__version__, PIL.__version__, scipy.__version__]
    facts = [_CACHE_FORMAT, list(names), corruption.seed, corruption.table, images_NHWC.shape, versions]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    digest.update(images_NHWC.tobytes())
    return f"{corruption.name}-{corruption.severity}/{digest.hexdigest()}.npy"


def _kept(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    try:
        images: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError):  # none, or damaged: it is made again
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def in_order(
    submit: Callable[[_Item], Future[_Result]], items: Iterable[_Item], ahead: int
) -> Iterator[tuple[_Item, _Result]]:
    """Yields each item with its result, in order, having submitted up to `ahead` items more than were taken.

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
            "a worker process died, most often for want of memory: fewer --workers or a smaller --batch-size need "
            "less. The same command goes on from here. (In a script of your own, start the work below "
            "`if __name__ == '__main__':`.)"
        ) from error


class Workers:
    """Processes that make blocks ready; with none of them, this process does it itself."""

    def __init__(self, count: int) -> None:
        """Starts up to `count` processes, as they are needed."""
        self.ahead = 2 * count
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _begin) if count else None

    def submit(self, work: Callable[..., _Result], *arguments: Any) -> Future[_Result]:
        """Runs `work` in a process, or here and now."""
        if self._pool is not None:
            return self._pool.submit(work, *arguments)
        return self.ready(work(*arguments))

    def ready(self, result: _Result) -> Future[_Result]:
        """Returns `result` as if a process had made it."""
        future: Future[_Result] = Future()
        future.set_result(result)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Begins a worker: it leaves Ctrl-C to its parent, ends with it, and keeps to one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_core()


def one_core() -> None:
    """Makes OpenCV keep to one core in this process."""
    try:
        import cv2
    except ImportError:  # needed for corruptions only, which say so
        return
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    """A pool's process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
