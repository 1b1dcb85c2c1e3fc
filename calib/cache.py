"""Histograms on disk, so that a calibration that was cut off goes on, and another of the same images is quick."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from calib.histograms import BINS, Histogram
from runtime.graph.model import is_large
from runtime.system.cache import entries, limit_bytes, prune, remove_leftovers
from runtime.system.files import atomic_write, cache_folder

__all__ = ["cache_file", "load_histograms", "save_histograms"]

log = logging.getLogger(__name__)

_FORMAT = 1


def cache_file(model: onnx.ModelProto, images_sha256: str) -> Path | None:
    """Returns where the histograms of this very model on these images are kept.

    None for models beyond 2 GiB, and where `ADVPROP_CACHE_GB` turns the cache off.
    """
    if is_large(model) or limit_bytes() == 0:
        return None
    digest = hashlib.sha256(f"{_FORMAT} {BINS} {images_sha256}".encode())
    digest.update(model.SerializeToString(deterministic=True))
    return cache_folder("histograms") / f"{digest.hexdigest()}.npz"


def save_histograms(path: Path, histograms: Mapping[str, Histogram], images: int) -> None:
    """Writes the histograms after `images` images; what was used longest ago goes. Raises OutputError."""
    content: dict[str, np.ndarray] = {
        "images": np.asarray(images),
        "names": np.asarray(list(histograms)),
        "counts": np.stack([histogram.counts for histogram in histograms.values()]),
        "ranges": np.asarray([[item.top, item.amax] for item in histograms.values()]),
        "zeros": np.asarray([item.zeros for item in histograms.values()]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]  # its stub wants arrays as positions
    remove_leftovers(path.parent)
    prune(entries(path.parent), limit_bytes())


def load_histograms(path: Path, names: list[str]) -> tuple[dict[str, Histogram], int]:
    """Returns what was saved of exactly these tensors, and after how many images; nothing where there is none."""
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
            os.utime(path)
            return histograms, int(content["images"])
    except FileNotFoundError:
        return {}, 0
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged and made anew: %s", path, error)
        return {}, 0
