"""Streaming histograms of magnitudes: any number of images, constant memory, the same result in any order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from calib.graphs import open_session
from runtime.errors import DataError

__all__ = ["BINS", "Histogram", "collect_histograms"]

BINS = 4096
"""Of which at least half are in use: the range is the power of two above the largest magnitude."""
_SMALLEST_TOP = 2.0**-100
"""So that bins have a width that float32 can hold; nothing smaller matters."""


class Histogram:
    """How often a tensor had which magnitude.

    The range is a power of two. When a larger value comes, it doubles and neighbouring bins merge, so
    the counts are the same whatever the order and the batches of the images.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        """Elements a bin, (BINS,); bin i is of magnitudes from i to i + 1 `width`s."""
        self.top = 0.0
        """Upper end of the range; 0 before any value but zeros."""
        self.amax = 0.0
        """Largest magnitude, exactly."""
        self.zeros = 0
        """Zeros that came before the range was known."""

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.top / BINS

    @property
    def centres(self) -> NDArray[np.float64]:
        """The magnitude in the middle of each bin, (BINS,)."""
        middles: NDArray[np.float64] = (np.arange(BINS, dtype=np.float64) + 0.5) * self.width
        return middles

    def add(self, values: NDArray[np.float32]) -> None:
        """Counts `values`, of any shape. Raises ValueError where one is not finite."""
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("not finite")
        if largest == 0.0 and self.top == 0.0:
            self.zeros += magnitudes.size
            return
        self._cover(largest)
        magnitudes *= np.float32(BINS / self.top)
        bins = magnitudes.astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)
        self.amax = max(self.amax, largest)

    def _cover(self, largest: float) -> None:
        if self.top == 0.0:
            self.top = max(2.0 ** (np.floor(np.log2(largest)) + 1), _SMALLEST_TOP)
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
    threads: int = 2,
) -> dict[str, Histogram]:
    """Counts the magnitudes of float32 tensors over all images, in one pass.

    Args:
        model: a float32 graph with one input.
        batches: inputs of the graph; each is dropped once it has run.
        tensors: names of node outputs, or of the input.
        progress: called after each batch with its number of images.
        threads: threads that count; the network has ONNX Runtime's.

    Raises:
        DataError: no batch, or a value that is not finite; the message names the tensor.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    input_name = probe.graph.input[0].name
    known = {value.name for value in probe.graph.output}
    names = [name for name in dict.fromkeys(tensors) if name != input_name]
    for name in names:
        if name not in known:
            probe.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = open_session(probe)
    histograms = {name: Histogram() for name in dict.fromkeys(tensors)}
    seen = 0
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            outputs = session.run(names, {input_name: batch}) if names else []
            values = dict(zip(names, outputs, strict=True)) | {input_name: batch}
            list(pool.map(lambda name, values=values: _count(histograms[name], values[name], name), histograms))
            seen += len(batch)
            if progress:
                progress(len(batch))
    if not seen:
        raise DataError("calibration needs images, and none were given")
    return histograms


def _count(histogram: Histogram, values: NDArray[np.float32], name: str) -> None:
    try:
        histogram.add(values)
    except ValueError as error:
        raise DataError(f"the tensor {name} has values that are not finite on a calibration image") from error
