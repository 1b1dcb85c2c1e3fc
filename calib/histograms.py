"""Collect histograms of activations over any number of images, and cache them on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from runtime.errors import DataError
from runtime.graph.model import is_large, open_session, with_outputs
from runtime.system.cache import entries, limit_bytes, private_folder, prune, remove_leftovers
from runtime.system.files import atomic_write

__all__ = ["BINS", "Histogram", "cache_file", "collect_histograms", "load_histograms", "save_histograms"]

log = logging.getLogger(__name__)

BINS = 4096
"""Number of bins. At least half of them are used: the range ends at the power of two above the
largest magnitude."""
_MIN_TOP = 2.0**-100
"""Smallest range. It keeps the bin width representable in float32; smaller magnitudes do not
matter."""
_SAVE_INTERVAL = 64
"""Number of images after which the histograms are written to the cache."""
_CACHE_FORMAT = 1


class Histogram:
    """Counts the magnitudes of a tensor.

    The range is a power of two. If a larger value arrives, the range doubles and neighboring bins
    merge. The counts therefore depend neither on the order of the images nor on the batch size.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        """Number of values per bin, (BINS,); bin i covers magnitudes from i · `width` to (i + 1) ·
        `width`."""
        self.top = 0.0
        """Upper end of the range; 0 until the first value that is not zero."""
        self.amax = 0.0
        """Largest magnitude, exact."""
        self.zeros = 0
        """Zeros counted before the range is known."""

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.top / BINS

    @property
    def centers(self) -> NDArray[np.float64]:
        """Magnitude at the center of each bin, (BINS,)."""
        middles: NDArray[np.float64] = (np.arange(BINS, dtype=np.float64) + 0.5) * self.width
        return middles

    def add(self, values: NDArray[np.float32]) -> None:
        """Count `values`, an array of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("not finite")
        if largest == 0.0 and self.top == 0.0:
            self.zeros += magnitudes.size
            return
        self._extend_range(largest)
        magnitudes *= np.float32(BINS / self.top)
        bins = magnitudes.astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)
        self.amax = max(self.amax, largest)

    def _extend_range(self, largest: float) -> None:
        if self.top == 0.0:
            self.top = max(2.0 ** (np.floor(np.log2(largest)) + 1), _MIN_TOP)
            self.counts[0] += self.zeros
            self.zeros = 0
        while self.top <= largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2


def collect_histograms(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    tensors: Collection[str],
    progress: Callable[[int], None] | None = None,
    *,
    cache: Path | None = None,
    threads: int = 2,
) -> dict[str, Histogram]:
    """Count the magnitudes of float32 tensors over all images in one pass.

    Args:
        model: a float32 graph with one input.
        batches: inputs of the graph; no batch is kept after it has run.
        tensors: names of node outputs or of the input.
        progress: called after each batch with its number of images.
        cache: file from `cache_file` for this model and these images. It is read first and updated
            after every 64 images, so an interrupted run resumes.
        threads: number of threads that count; ONNX Runtime uses its own.

    Raises:
        DataError: there is no batch, or a value is not finite; the message names the tensor.
    """
    input_name = model.graph.input[0].name
    wanted = list(dict.fromkeys(tensors))
    names = [name for name in wanted if name != input_name]
    session = open_session(with_outputs(model, names))
    histograms, known_images = load_histograms(cache, wanted) if cache else ({}, 0)
    histograms = histograms or {name: Histogram() for name in wanted}
    seen = saved = 0
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            seen += len(batch)
            if progress:
                progress(len(batch))
            if seen <= known_images:
                continue
            outputs = session.run(names, {input_name: batch}) if names else []
            values = dict(zip(names, outputs, strict=True)) | {input_name: batch}
            list(pool.map(lambda name, values=values: _count(histograms[name], values[name], name), histograms))
            if cache and seen - saved >= _SAVE_INTERVAL:
                cache = _save_or_warn(cache, histograms, seen)
                saved = seen
    if not seen:
        raise DataError("calibration needs at least one batch of images; found none")
    if cache and seen > max(saved, known_images):
        _save_or_warn(cache, histograms, seen)
    return histograms


def _save_or_warn(cache: Path, histograms: Mapping[str, Histogram], seen: int) -> Path | None:
    """Save histograms and return `cache`; None if it cannot be written, with a warning."""
    try:
        save_histograms(cache, histograms, seen)
    except OSError as error:  # includes OutputError
        log.warning("the calibration goes on without a cache, so it cannot resume: %s", error)
        return None
    return cache


def _count(histogram: Histogram, values: NDArray[np.float32], name: str) -> None:
    try:
        histogram.add(values)
    except ValueError as error:
        raise DataError(f"the tensor {name} has values that are not finite on a calibration image") from error


def cache_file(model: onnx.ModelProto, images_sha256: str) -> Path | None:
    """Return the path at which the histograms of this model on these images are cached.

    Returns None for models larger than 2 GiB, and if the cache is disabled or must not be used.
    """
    if is_large(model) or limit_bytes() == 0:
        return None
    folder = private_folder("histograms")
    if folder is None:
        return None
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {BINS} {images_sha256}".encode())
    digest.update(model.SerializeToString(deterministic=True))
    return folder / f"{digest.hexdigest()}.npz"


def save_histograms(path: Path, histograms: Mapping[str, Histogram], images: int) -> None:
    """Write histograms counted over `images` images, and delete old files over the size limit.

    Raises:
        OSError: the file cannot be written.
    """
    content: dict[str, np.ndarray] = {
        "images": np.asarray(images),
        "names": np.asarray(list(histograms)),
        "counts": np.stack([histogram.counts for histogram in histograms.values()]),
        "ranges": np.asarray([[item.top, item.amax] for item in histograms.values()]),
        "zeros": np.asarray([item.zeros for item in histograms.values()]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]  # its stub expects positional arrays
    remove_leftovers(path.parent)
    prune(entries(path.parent), limit_bytes())


def load_histograms(path: Path, names: list[str]) -> tuple[dict[str, Histogram], int]:
    """Return the saved histograms of exactly these tensors and the image count, or ({}, 0)."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            if content["names"].tolist() != names or content["counts"].shape != (len(names), BINS):
                return {}, 0
            histograms = {}
            for row, name in enumerate(names):
                histogram = histograms[name] = Histogram()
                histogram.counts = content["counts"][row].astype(np.int64)
                histogram.top, histogram.amax = (float(value) for value in content["ranges"][row])
                histogram.zeros = int(content["zeros"][row])
            os.utime(path)  # mark the file as recently used
            return histograms, int(content["images"])
    except FileNotFoundError:
        return {}, 0
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("the cached histograms in %s are damaged and will be collected again: %s", path, error)
        return {}, 0
