"""Damaged images, arrays and tar files, and what reads them."""

from __future__ import annotations

import dataclasses
import functools
import io
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, features

from runtime.errors import AdvPropError
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.labels import CIFAR10
from runtime.evaluate.suites import open_suite
from runtime.system.decode import decode, image_size
from runtime.system.image_sources import open_source
from tests.support.fuzz_models import SPEC
from tests.support.mutations import damaged

CIFAR = dataclasses.replace(SPEC, classes=CIFAR10)


@functools.cache
def images() -> tuple[bytes, ...]:
    """Return small images in all formats and many modes."""
    random = np.random.default_rng(0)
    color = Image.fromarray(random.integers(0, 256, (18, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [color.rotate(90), color]}
    jpeg: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "JPEG", {"exif": exif}), ("L", "JPEG", {}), ("CMYK", "JPEG", {"progressive": True}),
        ("RGB", "PNG", {"exif": exif}), ("P", "PNG", {"transparency": b"\0\x80"}), ("LA", "PNG", {}), ("1", "PNG", {}),
        ("RGBA", "PNG", frames), ("RGB", "WEBP", {"exif": exif}), ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", frames), ("RGB", "BMP", {}), ("P", "BMP", {}), ("RGB", "GIF", frames), ("RGB", "PPM", {}),
        ("1", "PPM", {}), ("RGB", "TIFF", {"exif": exif}), ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"compression": "jpeg"}), ("1", "TIFF", {"compression": "group4"}), ("F", "TIFF", {}),
        ("RGBA", "TIFF", {"compression": "tiff_adobe_deflate"}), ("RGB", "JPEG2000", {}), ("RGB", "EPS", {}),
    ]  # fmt: skip
    if features.check("avif"):
        jpeg += [("RGB", "AVIF", {"exif": exif}), ("RGBA", "AVIF", {})]
    found = []
    for mode, kind, options in jpeg:
        file = io.BytesIO()
        color.convert(mode).save(file, kind, **options)
        found.append(file.getvalue())
    for kind in ("PNG", "TIFF", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 65536, (18, 24), dtype=np.uint16)).save(file, kind)
        found.append(file.getvalue())
    return tuple(found)


def make_image(random: Random) -> bytes:
    return damaged(random, random.choice(images()))


def read_image(content: bytes, folder: Path) -> None:
    image_size(content)
    assert decode(content, exif="upright").mode == "RGB"


@functools.cache
def arrays() -> tuple[bytes, ...]:
    """Return `.npy` and `.npz` files of images and labels."""
    found = []
    for array in (np.zeros((10, 4, 4, 3), np.uint8), np.arange(10), np.zeros(10, np.uint8)):
        for save in (np.save, np.savez, np.savez_compressed):
            file = io.BytesIO()
            save(file, array)
            found.append(file.getvalue())
    return tuple(found)


def make_array(random: Random) -> bytes:
    content = random.choice(arrays())
    if content.startswith(b"\x93NUMPY") and random.random() < 0.5:
        shape = random.choice([b"(10,)", b"(10, 4, 4, 3)"])
        other = random.choice([b"(" + b"9" * 30 + b", 3)", b"(-1, 4, 4, 3)", b"(" * 300, b"(1<<70,)", b"(0,)", b"()"])
        return content.replace(shape, other)
    return damaged(random, content)


def read_array(content: bytes, folder: Path) -> None:
    for name in ("a.npy", "a.npz", "fog.npy", "labels.npy"):
        (folder / name).write_bytes(content)
    failed = None
    for path in (folder / "a.npy", folder / "a.npz"):
        try:
            source = open_source(path)
            [source.read(name) for name in source.names[:1]]
        except AdvPropError as error:
            failed = error
    for name in ("fog.npy", "labels.npy"):
        (folder / name).write_bytes(arrays()[0 if name == "fog.npy" else 3])
        try:
            open_suite(SuiteConfig(name="cifar10-c", data=folder), CIFAR)
        except AdvPropError as error:
            failed = error
        (folder / name).write_bytes(content)
    if failed:
        raise failed


@functools.cache
def archives() -> tuple[bytes, ...]:
    """Return tar files by class and with WebDataset labels, compressed or not."""
    picture = images()[0]
    layouts = [
        {"a/1.png": picture, "a/2.jpg": picture, "b/1.png": picture},
        {"1.png": picture, "1.cls": b"0", "2.png": picture, "2.cls": b"1"},
    ]
    found = []
    for files in layouts:
        for mode in ("w", "w:gz"):
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode=mode) as tar:
                for name, content in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
            found.append(file.getvalue())
    return tuple(found)


def make_archive(random: Random) -> bytes:
    content = random.choice(archives())
    if random.random() < 0.3:  # the headers have a checksum; names and labels do not need one
        return content.replace(b"0", random.choice([b"-", b"\xb2", b"9", b"", b"1_0"]), random.randint(1, 3))
    return damaged(random, content)


def read_archive(content: bytes, folder: Path) -> None:
    from train.archives import image_archives

    failed = None
    (folder / "train.tar").write_bytes(content)
    (folder / "val.tar").write_bytes(archives()[0])
    try:
        with open_source(folder / "train.tar") as source:
            for name in source.names:
                decode(source.read(name), source.describe(name))
    except AdvPropError as error:
        failed = error
    data = image_archives(folder)
    list(data.train.probe(4))
    if failed:
        raise failed
