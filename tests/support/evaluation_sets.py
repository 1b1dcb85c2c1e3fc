"""Tiny test sets in the released layouts, models with known answers, and helpers for runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.corruptions.weather import frost_texture
from runtime.evaluate.models import Model, model_of
from runtime.evaluate.results import Result, write_result
from runtime.evaluate.run import RunConfig
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
WNIDS = ("n00000001", "n00000002", "n00000003")


def spec_of(classes: tuple[str, ...] = tuple(COLORS), wnids: tuple[str, ...] = WNIDS, size: int = 32) -> ModelSpec:
    preprocessing = Preprocessing(
        height=size, width=size, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0
    )
    return ModelSpec(arch="toy", classes=classes, wnids=wnids, preprocessing=preprocessing)


def picture(color: str, number: int, size: int = 32) -> NDArray[np.uint8]:
    """Return an image of mostly one color, noisy enough that some corruptions change its class."""
    random = np.random.default_rng([number, *COLORS[color]])
    base = np.asarray(COLORS[color]) * 0.3 + 90
    return np.clip(base + random.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)


def save(folder: Path, color: str, number: int, size: int = 32) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(color, number, size)).save(folder / f"{number}.png")


def labeled_folder(root: Path, names: Mapping[str, str] | None = None, count: int = 8, size: int = 32) -> Path:
    """Write `root/NAME/*.png`. `names`: folder → color; default: class names."""
    for name, color in (names or {color: color for color in COLORS}).items():
        for number in range(count):
            save(root / name, color, number, size)
    return root


def mean_color(images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of each channel as logits."""
    return images_NCHW.mean((2, 3)) * np.float32(8)


def one_pixel(images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return one noisy pixel as logits: often wrong, and more often under corruptions."""
    return images_NCHW[:, :, 16, 16]


def toy(
    name: str = "toy",
    spec: ModelSpec | None = None,
    predict: Callable[[NDArray[np.float32]], NDArray[np.float32]] = mean_color,
    size_open: bool = False,
) -> Model:
    return model_of(name, spec or spec_of(), predict, {"sha256": name}, size_open=size_open)


def toy_onnx(path: Path, scale: float = 8.0, spec: ModelSpec | None = None) -> Path:
    """Write `mean_color` as an ONNX file."""
    spec = spec or spec_of()
    size = spec.preprocessing.height
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[n, 3, {size}, {size}] input) => (float[n, 3] logits)
    <float s = {{{scale}}}> {{ p = GlobalAveragePool(input) f = Flatten(p) logits = Mul(f, s) }}"""
    model = onnx.parser.parse_model(text)
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, path)
    return path


def config(name: str, data: Path, **options: Any) -> SuiteConfig:
    return SuiteConfig(name=name, data=data, **options)


def run_config(out: Path, **options: Any) -> RunConfig:
    return RunConfig(out=out, **{"workers": 0, "batch_size": 4, **options})


def hide_frost_textures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python find an installation of imagecorruptions-imaug without its files first."""
    info = folder / "imagecorruptions_imaug-1.1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: imagecorruptions-imaug\nVersion: 1.1.5\n")
    monkeypatch.syspath_prepend(str(folder))
    frost_texture.cache_clear()


def written(result: Result, path: Path) -> bytes:
    """Write a result and return its bytes."""
    write_result(path, result)
    return path.read_bytes()


def wait_for_lines(out: Path, count: int, process: subprocess.Popen[str]) -> Path:
    """Wait until a process has logged `count` lines of progress, and return the log's path."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for log in out.glob(".unfinished-*.jsonl"):
            if log.read_bytes().count(b"\n") >= count:
                return log
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        time.sleep(0.005)
    raise AssertionError("the evaluation did not start in time")
