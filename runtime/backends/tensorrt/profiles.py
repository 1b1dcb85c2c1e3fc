"""`Profiles`: the shapes that an engine accepts, and the shape in which it runs a batch.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import InputError

__all__ = ["Profile", "Profiles"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimization profile: its smallest, optimal and largest shape, (N, C, H, W) each."""

    smallest: Shape
    optimal: Shape
    largest: Shape

    def fits(self, shape: Shape) -> bool:
        """Return whether a batch of that shape can run without padding."""
        return len(shape) == len(self.smallest) and all(
            low <= size <= high for low, size, high in zip(self.smallest, shape, self.largest, strict=True)
        )

    def __str__(self) -> str:
        pairs = zip(self.smallest, self.largest, strict=True)
        sizes = (str(low) if low == high else f"{low}…{high}" for low, high in pairs)
        return f"({', '.join(sizes)})"


class Profiles:
    """All profiles of an engine, in its order."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self.all = tuple(profiles)
        """At least one."""

    @property
    def max_images(self) -> int:
        """Images in the largest batch."""
        return max(profile.largest[0] for profile in self.all)

    def choose(self, shape: Shape) -> tuple[int, Shape]:
        """Return the index of the profile that runs a batch, and the shape in which it runs.

        Among several matching profiles it is the one with the nearest optimal batch. If no profile
        accepts so few images, the batch is padded to the smallest batch that a profile accepts.

        Args:
            shape: (N, C, H, W), with at most `max_images` images.

        Raises:
            InputError: no profile accepts images of this size.
        """
        best: tuple[int, int, int, Shape] | None = None
        for index, profile in enumerate(self.all):
            run_as = (max(shape[0], profile.smallest[0]), *shape[1:])
            if profile.fits(run_as):
                padding = run_as[0] - shape[0]
                candidate = (padding, abs(profile.optimal[0] - run_as[0]), index, run_as)
                best = min(best, candidate) if best else candidate
        if best is None:
            accepted = " or ".join(str(profile) for profile in self.all)
            raise InputError(
                f"the engine does not accept a batch of shape {shape}; its profiles accept {accepted}",
                fix="resize the images, or build an engine for this size: advprop build --img-size MIN:OPT:MAX",
            )
        return best[2], best[3]
