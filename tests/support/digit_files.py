"""The held-out digits of scikit-learn as files."""

from pathlib import Path

from runtime.system.decode import decode
from train.data import ImageSet, embedded_digits


def write_digits(folder: Path, count: int) -> list[Path]:
    """Write the first `count` held-out digits as PNG files, and return their paths."""
    digits = embedded_digits().val
    assert isinstance(digits, ImageSet)
    paths = [folder / f"{number:02}.png" for number in range(count)]
    for number, path in enumerate(paths):
        decode(digits.images[number]).save(path)
    return paths
