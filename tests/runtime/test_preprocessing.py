import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from runtime.errors import DataError
from runtime.preprocessing import Preprocessor, fit_to_input
from runtime.spec import INTERPOLATIONS, Preprocessing
from runtime.system.decode import ImageLike, decode

SPEC = Preprocessing(
    height=96,
    width=96,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.875,
)
SPECS = [
    *(replace(SPEC, interpolation=name) for name in ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")),
    replace(SPEC, crop_pct=1.0),
    replace(SPEC, crop_pct=0.904, height=75, width=75),
    replace(SPEC, height=64, width=96),
    replace(SPEC, crop_mode="squash"),
    replace(SPEC, crop_mode="border"),
    replace(SPEC, crop_mode="border", height=64, width=96, crop_pct=1.0),
    replace(SPEC, crop_pct=1.2),
]


def timm_transform(spec: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    return create_transform(
        (3, spec.height, spec.width),
        is_training=False,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
    )


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [(200, 150), (150, 201), (96, 96), (40, 60), (333, 110), (110, 110)])
def test_pixels_are_bit_equal_to_timms_evaluation_transform(spec: Preprocessing, size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = timm_transform(spec)(image).numpy()
    found = Preprocessor(spec)([image])[0]
    assert found.dtype == np.float32
    assert found.shape == (3, spec.height, spec.width)
    assert np.array_equal(found, expected)


def test_200_photographs_are_bit_equal_with_every_interpolation(shared_data: Callable[[str], Path]) -> None:
    paths = sorted(shared_data("imagenet_dev.tar").rglob("*.JPEG"))[:400:2]
    assert len(paths) == 200
    specs = [replace(SPEC, interpolation=name) for name in INTERPOLATIONS]
    pairs = [(spec, timm_transform(spec)) for spec in specs]
    for path in paths:
        with Image.open(path) as image:
            photograph = image.convert("RGB")
        assert np.array_equal(np.asarray(decode(path)), np.asarray(photograph)), path
        for spec, transform in pairs:
            assert np.array_equal(Preprocessor(spec)([photograph])[0], transform(photograph).numpy()), (path, spec)


def test_all_kinds_of_images_have_the_same_pixels(tmp_path: Path) -> None:
    image = noise(50, 40)
    path = tmp_path / "a.png"
    image.save(path)
    kinds: list[ImageLike] = [image, path, str(path), path.read_bytes(), np.asarray(image)]
    batch = Preprocessor(SPEC)(kinds)
    assert all(np.array_equal(batch[0], other) for other in batch[1:])


def test_gray_palette_alpha_and_16_bit_images_become_rgb(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (20, 20), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(gray))[..., 2], gray)
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I;16"):
        image = Image.new(mode, (9, 7))
        assert decode(image).mode == "RGB"


def test_arrays_need_not_be_contiguous(tmp_path: Path) -> None:
    pixels = np.asarray(noise(30, 20))
    assert np.array_equal(np.asarray(decode(pixels[:, ::-1])), pixels[:, ::-1])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_of_other_shapes_and_types_are_refused(array: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"must be uint8 of shape \(height, width, 3\).*found"):
        decode(array)


def test_files_that_are_not_images_are_refused(tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise(64, 64).save(whole, "JPEG")
    (tmp_path / "half.jpg").write_bytes(whole.getvalue()[:500])
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(DataError, match=r"half\.jpg"):
        decode(tmp_path / "half.jpg")
    with pytest.raises(DataError, match=r"cannot decode .*text\.jpg: Pillow does not recognize its format"):
        decode(tmp_path / "text.jpg")
    with pytest.raises(DataError, match=r"no such image file: .*none\.jpg"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="cannot decode the image"):
        decode(b"hello")


def test_the_result_is_contiguous_and_owns_its_memory() -> None:
    found = fit_to_input(noise(200, 150), SPEC)
    assert found.flags.c_contiguous
    found[:] = 0


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1)])
def test_a_strip_that_would_fill_the_memory_is_refused(size: tuple[int, int]) -> None:
    for spec in (replace(SPEC, height=224, width=224), replace(SPEC, height=200, width=224)):
        with pytest.raises(DataError, match="too long and narrow"):
            Preprocessor(spec)([Image.new("RGB", size)])


def test_none_is_not_an_image() -> None:
    nothing: Any = None
    with pytest.raises(DataError, match="found NoneType"):
        decode(nothing)
