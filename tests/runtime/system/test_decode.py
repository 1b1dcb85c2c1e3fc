import functools
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from runtime.errors import DataError
from runtime.preprocessing import decode_and_fit
from runtime.spec import Preprocessing
from runtime.system.decode import FORMATS, decode, image_size

STRIPES_HW = np.repeat(np.linspace(0, 255, 12).astype(np.uint8), 4)[:, None] * np.ones((1, 64), np.uint8)
"""48 × 64 pixels, darker at the top."""
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation → how a camera stored an upright scene."""


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_listed_format_is_read(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    found = decode(encoded(Image.new("RGB", (40, 30), (200, 40, 10)), kind))
    assert found.size == (40, 30)
    assert np.abs(np.asarray(found).astype(int) - (200, 40, 10)).max() < 12


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "ICNS"])
def test_other_formats_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(path, kind)
    with pytest.raises(DataError, match=r"a\.png: Pillow does not recognize its format, one of JPEG"):
        decode(path)
    with pytest.raises(DataError, match="does not recognize"):
        image_size(path)


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(DataError, match="does not recognize"):
        decode(encoded(Image.new("RGB", (8, 8)), "EPS"), "request 7")
    assert not started.exists()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_gray_is_scaled_by_257(kind: str) -> None:
    image = Image.fromarray(STRIPES_HW.astype(np.uint16) * 257)
    found = decode(encoded(image, kind))
    assert np.array_equal(np.asarray(found), np.repeat(STRIPES_HW[..., None], 3, axis=2))
    assert np.array_equal(np.asarray(decode(image)), np.asarray(found))


def test_float_images_from_0_to_1_are_scaled() -> None:
    image = Image.fromarray(STRIPES_HW.astype(np.float32) / 255)
    assert np.array_equal(np.asarray(decode(encoded(image, "TIFF")))[..., 1], STRIPES_HW)


@pytest.mark.parametrize(
    "pixels_HW",
    [
        STRIPES_HW.astype(np.float32),
        STRIPES_HW.astype(np.float32) / 255 - 0.5,
        np.full((4, 4), np.nan, np.float32),
        STRIPES_HW.astype(np.int32) * 1000,
    ],
    ids=["float 0 to 255", "negative", "NaN", "32 bits"],
)
def test_gray_values_with_an_unknown_range_are_refused(pixels_HW: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"scan\.tif.*|values from 0 to (1|255); found .*Convert it"):
        decode(encoded(Image.fromarray(pixels_HW), "TIFF"), "scan.tif")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_upright_applies_the_exif_orientation_and_ignore_does_not(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene().transpose(ORIENTATIONS[orientation])
    content = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    plain = encoded(stored, kind, **({"lossless": True} if kind == "WEBP" else {}))
    upright, ignored = decode(content, exif="upright"), decode(content)
    assert np.array_equal(np.asarray(ignored), np.asarray(decode(plain)))
    assert upright.size == scene().size
    if kind != "JPEG":
        assert np.array_equal(np.asarray(upright), np.asarray(scene()))
    assert np.array_equal(np.asarray(decode(upright, exif="upright")), np.asarray(upright))  # only once
    assert np.array_equal(np.asarray(decode(Image.open(io.BytesIO(content)), exif="upright")), np.asarray(upright))


def test_tiff_files_are_always_upright_and_rotated_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(scene().transpose(ORIENTATIONS[6]), "TIFF", exif=exif)
    for rule in ("upright", "ignore"):
        assert np.array_equal(np.asarray(decode(content, exif=rule)), np.asarray(scene()))


def test_16_bit_photographs_are_rotated_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels_HW = STRIPES_HW.astype(np.uint16) * 257
    content = encoded(Image.fromarray(np.rot90(pixels_HW).copy()), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(content, exif="upright"))[..., 0], STRIPES_HW)


def test_damaged_exif_data_does_not_cost_the_image() -> None:
    content = encoded(scene(), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert np.array_equal(np.asarray(decode(content, exif="upright")), np.asarray(scene()))


def test_the_preprocessing_decides_about_the_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    content = encoded(scene().rotate(180), "PNG", exif=exif)
    fields: dict[str, Any] = {
        "height": 6,
        "width": 9,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
    }
    upright = Preprocessing(**fields, crop_pct=1.0, exif="upright")
    ignore = Preprocessing(**fields, crop_pct=1.0)
    assert np.array_equal(decode_and_fit(content, upright), np.asarray(scene()))
    assert np.array_equal(decode_and_fit(content, ignore), np.asarray(scene().rotate(180)))


@functools.cache
def bombs() -> dict[str, bytes]:
    """Return small files that declare 169 megapixels."""
    blank = Image.new("1", (13_000, 13_000))
    # Width, height, bits, compression, photometric, samples, tile width, height, offset and size.
    tags = {256: 16, 257: 16, 258: 1, 259: 4, 262: 1, 277: 1, 322: 65_520, 323: 65_520, 324: 8, 325: 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiled = struct.pack("<2sHIIH", b"II", 42, 12, 0, len(tags)) + entries + bytes(4)
    # VP8L holds width - 1 and height - 1 in 14 bits each.
    lossless = b"VP8L" + (6).to_bytes(4, "little") + b"\x2f" + (12_999 | 12_999 << 14).to_bytes(4, "little") + b"\0"
    webp = b"RIFF" + (4 + len(lossless)).to_bytes(4, "little") + b"WEBP" + lossless
    jpeg2000 = bytearray(encoded(Image.new("L", (8_000, 8_000)), "JPEG2000"))
    header = jpeg2000.index(b"ihdr") + 4
    jpeg2000[header : header + 8] = struct.pack(">II", 18, 24)
    return {
        "G4 TIFF": encoded(blank, "TIFF", compression="group4"),
        "PNG": encoded(blank, "PNG"),
        "tiles of a TIFF": tiled,
        "WebP": webp,
        "size inside JPEG 2000": bytes(jpeg2000),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["G4 TIFF", "PNG", "tiles of a TIFF", "WebP", "size inside JPEG 2000"])
def test_image_bombs_are_refused_before_they_are_decoded(kind: str) -> None:
    content = bombs()[kind]
    assert len(content) < 100_000
    with pytest.raises(DataError, match=r"upload 3 has .* pixels; the limit is (100|50|25),000,000 pixels"):
        decode(content, "upload 3")


def test_the_limit_counts_pixels_and_is_inclusive() -> None:
    for kind, needed in (("PNG", 200), ("WEBP", 400), ("JPEG2000", 800)):
        small = encoded(Image.new("RGB", (20, 10)), kind)
        assert decode(small, max_pixels=needed).size == (20, 10)
        with pytest.raises(DataError, match="the limit is 199 pixels"):
            decode(small, max_pixels=needed - 1)
    content = encoded(Image.new("RGB", (20, 10)), "PNG")
    with pytest.raises(DataError, match="has 20×10 pixels; the limit is 199 pixels"):
        decode(content, max_pixels=199)
