"""Histograms of a network's activations over any number of images, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.cache import load_histograms, save_histograms
from calib.histograms import Histogram
from runtime.errors import DataError
from runtime.graph.model import open_session, with_outputs

__all__ = ["collect_histograms"]

_SAVED_EVERY = 64
"""Images after which histograms are written to the cache."""


def collect_histograms(
    model: onnx.ModelProto,
    batches: Iterable[NDArray[Any]],
    tensors: Collection[str],
    progress: Callable[[int], None] | None = None,
    *,
    cache: Path | None = None,
    threads: int = 2,
) -> dict[str, Histogram]:
    """Counts the magnitudes of float32 tensors over all images, in one pass.

    Args:
        model: a float32 graph with one input.
        batches: inputs of the graph; each is dropped once it has run.
        tensors: names of node outputs, or of the input.
        progress: called after each batch with its number of images.
        cache: file of the histograms so far, by `calib.cache`: read at the start and written now and then,
            so that a run that is cut off goes on where it was. It must be of these images and this model.
        threads: threads that count; the network has ONNX Runtime's.

    Raises:
        DataError: no batch, or a value that is not finite; the message names the tensor.
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
            if cache and seen - saved >= _SAVED_EVERY:
                save_histograms(cache, histograms, seen)
                saved = seen
    if not seen:
        raise DataError("calibration needs images, and none were given")
    if cache and seen > max(saved, known_images):
        save_histograms(cache, histograms, seen)
    return histograms


def _count(histogram: Histogram, values: NDArray[np.float32], name: str) -> None:
    try:
        histogram.add(values)
    except ValueError as error:
        raise DataError(f"the tensor {name} has values that are not finite on a calibration image") from error
