"""Image sizes a network takes: one, or from one to another."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import ConfigError

__all__ = ["ImageSizes"]

_MOST = 8192


@dataclass(frozen=True, slots=True)
class ImageSizes:
    """Smallest, most usual and largest size, each (height, width) in pixels; all the same where it is fixed."""

    smallest: tuple[int, int]
    usual: tuple[int, int]
    largest: tuple[int, int]

    def __post_init__(self) -> None:
        for low, middle, high in zip(self.smallest, self.usual, self.largest, strict=True):
            if not 1 <= low <= middle <= high <= _MOST:
                raise ConfigError(f"image sizes need 1 ≤ min ≤ opt ≤ max ≤ {_MOST}; found {self}")

    @classmethod
    def parse(cls, text: str) -> ImageSizes:
        """Reads `SIZE` or `MIN:OPT:MAX`, each `N` for a square or `HEIGHTxWIDTH`.

        Raises:
            ConfigError: anything else.
        """
        try:
            sizes = [_size(part) for part in text.lower().split(":")]
            smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
        except ValueError as error:
            raise ConfigError(
                f"an image size is N or HEIGHTxWIDTH, or MIN:OPT:MAX of them, such as 160:224:320; found {text!r}"
            ) from error
        return cls(smallest, usual, largest)

    @property
    def fixed(self) -> bool:
        """Whether there is one size only."""
        return self.smallest == self.largest

    def __str__(self) -> str:
        sizes = (self.usual,) if self.fixed else (self.smallest, self.usual, self.largest)
        return ":".join(f"{height}x{width}" for height, width in sizes)


def _size(text: str) -> tuple[int, int]:
    height, by, width = text.partition("x")
    return int(height), int(width if by else height)
