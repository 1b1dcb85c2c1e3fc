"""Parts of corruptions against plain implementations, SciPy or the standard library."""

import colorsys

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from runtime.evaluate.corruptions.blur import disk, enlarge, gaussian, glass_sources, smear
from runtime.evaluate.corruptions.digital import elastic_transform, pixelate, smooth
from runtime.evaluate.corruptions.pixelwise import (
    brightness,
    contrast,
    gaussian_noise,
    impulse_noise,
    saturate,
    shot_noise,
    speckle_noise,
)
from runtime.evaluate.corruptions.weather import plasma

NOISE = np.random.default_rng(0).integers(0, 256, (37, 52, 3), dtype=np.uint8)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("reach", [1, 2, 4])
@pytest.mark.parametrize("shape", [(11, 17), (9, 8), (3, 40), (2, 2)])
def test_chains_of_copies_end_at_the_same_pixels_as_a_walk(reach: int, shape: tuple[int, int]) -> None:
    height, width = shape
    walked = np.arange(height * width).reshape(shape)
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    steps = iter(generator().integers(-reach, reach, size=(len(rows) * len(columns), 2)))
    for y in rows:
        for x in columns:
            across, down = next(steps)
            walked[y, x] = walked[y + down, x + across]
    assert np.array_equal(glass_sources(height, width, reach, generator()).reshape(shape), walked)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.06, 1.3, 2.25, 4.5])
@pytest.mark.parametrize("shape", [(37, 52), (32, 32), (5, 9)])
def test_enlarge_returns_the_center_of_scipys_zoom(factor: float, shape: tuple[int, int]) -> None:
    image = generator().random(shape).astype(np.float32)
    parts = [int(np.ceil(side / factor)) for side in shape]
    first = [(side - part) // 2 for side, part in zip(shape, parts, strict=True)]
    cut = image[first[0] : first[0] + parts[0], first[1] : first[1] + parts[1]]
    large = scipy.ndimage.zoom(cut.astype(np.float64), factor, order=1)
    top, left = ((large.shape[axis] - shape[axis]) // 2 for axis in (0, 1))
    expected = large[top : top + shape[0], left : left + shape[1]]
    assert enlarge(image, factor) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("degrees", [0.0, 17.0, -45.0, 44.9, -90.0, -135.0])
def test_smear_is_the_weighted_sum_of_pixels_along_a_line(degrees: float) -> None:
    radius, sigma = 5, 3.0
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    y, x = np.mgrid[: NOISE.shape[0], : NOISE.shape[1]]
    expected = np.zeros(NOISE.shape)
    for i, weight in enumerate(weights):
        down, across = np.ceil(i * np.sin(np.deg2rad(degrees)) - 0.5), np.ceil(i * np.cos(np.deg2rad(degrees)) - 0.5)
        rows = np.clip(y + int(down), 0, NOISE.shape[0] - 1)
        expected += weight * NOISE[rows, np.clip(x + int(across), 0, NOISE.shape[1] - 1)]
    found = smear(NOISE, radius, sigma, degrees)
    rounded_off = expected - found
    assert -0.002 < rounded_off.min() < rounded_off.max() < 1
    assert np.array_equal(smear(NOISE[..., 1], radius, sigma, degrees), found[..., 1])


@pytest.mark.parametrize("sigma", [0.05, 0.7, 1.5, 6])
def test_gaussian_equals_scipys(sigma: float) -> None:
    expected = scipy.ndimage.gaussian_filter(NOISE.astype(float), sigma, axes=(0, 1), mode="nearest")
    assert gaussian(NOISE, sigma) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("sigma", [0.96, 2.44, 19.5, 170.8])
def test_smoothing_by_cosines_equals_scipys_gaussian_with_mirrored_borders(sigma: float) -> None:
    fields = generator().uniform(-1, 1, (2, 32, 47)).astype(np.float32)
    expected = scipy.ndimage.gaussian_filter(fields.astype(float), sigma, axes=(1, 2), mode="reflect", truncate=3)
    assert smooth(fields, sigma) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("radius", "softness"), [(0.3, 0.4), (1.5, 0.1), (3, 0.1), (8, 0.5), (10, 0.5)])
def test_disk_has_the_given_radius_and_the_sum_of_the_original(radius: float, softness: float) -> None:
    weights = disk(radius, softness)
    assert weights.sum() == pytest.approx(1 if radius < 8 else 1.012, abs=2e-3)
    middle = weights.shape[0] // 2
    assert weights[middle, middle] > 0
    assert weights[middle, middle + int(radius) + 3 :].sum() == 0


def test_brightness_and_saturation_change_hsv_components() -> None:
    for pixel in [*NOISE.reshape(-1, 3)[::97], *np.array([[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0]])]:
        image = pixel.astype(np.uint8).reshape(1, 1, 3)
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        brighter = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.3)))
        assert np.abs(brightness(image, 0.3)[0, 0] - np.floor(brighter)).max() <= 1
        stronger = 255 * np.array(colorsys.hsv_to_rgb(hue, min(1, 2 * saturation + 0.1), value))
        assert np.abs(saturate(image, 2, 0.1)[0, 0] - np.floor(stronger)).max() <= 1


def test_contrast_moves_values_toward_the_mean_of_their_channel() -> None:
    means = NOISE.mean(axis=(0, 1))
    assert np.abs(contrast(NOISE, 0.4) - np.floor((NOISE - means) * 0.4 + means)).max() <= 1


@pytest.mark.parametrize("scale", [0.95, 0.7, 0.5, 0.25])
@pytest.mark.parametrize("shape", [(1, 1), (6, 9), (32, 32), (81, 100), (121, 64)])
def test_pixelate_equals_two_box_filters(scale: float, shape: tuple[int, int]) -> None:
    image = generator().integers(0, 256, (*shape, 3), dtype=np.uint8)
    small = (max(1, int(shape[1] * scale)), max(1, int(shape[0] * scale)))
    boxes = Image.fromarray(image).resize(small, Image.Resampling.BOX).resize(shape[::-1], Image.Resampling.BOX)
    assert np.array_equal(pixelate(image, scale), np.asarray(boxes))


def test_noise_has_the_requested_spread() -> None:
    gray = np.full((200, 200, 3), 128, np.uint8)
    white = 128 / 255
    for noisy, spread in [
        (gaussian_noise(gray, 0.1, random=generator()), 0.1),
        (speckle_noise(gray, 0.2, random=generator()), 0.2 * white),
        (shot_noise(gray, 60, random=generator()), np.sqrt(white / 60)),
    ]:
        assert (noisy / 255).std() == pytest.approx(spread, rel=0.02)
        assert noisy.mean() == pytest.approx(128, abs=1)
    impulses = impulse_noise(gray, 0.2, random=generator())
    assert [(impulses == level).mean() for level in (0, 255, 128)] == pytest.approx([0.1, 0.1, 0.8], abs=0.005)


def test_elastic_transform_without_displacement_returns_the_image() -> None:
    assert np.array_equal(elastic_transform(NOISE, 0, 0, 0, random=generator()), NOISE)
    assert np.abs(elastic_transform(NOISE, 1e-6, 2, 0, random=generator()).astype(int) - NOISE).max() <= 1


@pytest.mark.parametrize("side", [1, 2, 33, 64])
def test_plasma_ranges_from_0_to_1_and_is_rougher_with_less_decay(side: int) -> None:
    smoothest, roughest = (plasma(side, decay, generator()) for decay in (3, 1.4))
    assert smoothest.shape == (max(2, 1 << (side - 1).bit_length()),) * 2
    assert (smoothest.min(), smoothest.max()) == (0, 1)
    if side > 2:
        assert np.abs(np.diff(smoothest)).mean() < np.abs(np.diff(roughest)).mean()
