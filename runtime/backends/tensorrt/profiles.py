"""`Profiles`: which shapes an engine takes, and as which of them a batch is run.

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
    """One optimization profile: from `least` to `most`, quickest at `usual`; (N, C, H, W) each."""

    least: Shape
    usual: Shape
    most: Shape

    def fits(self, shape: Shape) -> bool:
        """Whether a batch of that shape can be run as it is."""
        return len(shape) == len(self.least) and all(
            low <= size <= high for low, size, high in zip(self.least, shape, self.most, strict=True)
        )

    def __str__(self) -> str:
        sizes = (str(low) if low == high else f"{low}…{high}" for low, high in zip(self.least, self.most, strict=True))
        return f"({', '.join(sizes)})"


class Profiles:
    """The profiles of an engine, in its order."""

    def __init__(self, profiles: Sequence[Profile]) -> None:
        self.all = tuple(profiles)
        """At least one."""

    @property
    def most_images(self) -> int:
        """The largest batch."""
        return max(profile.most[0] for profile in self.all)

    def choose(self, shape: Shape) -> tuple[int, Shape]:
        """Returns the profile that runs a batch, and the shape it is run as.

        Of several that fit it is the one whose usual batch is nearest. Where none takes so few images, the batch is
        run as the next larger one that some profile takes, with rows to spare.

        Args:
            shape: (N, C, H, W), with at most `most_images` images.

        Raises:
            InputError: images of a size that no profile takes.
        """
        best: tuple[int, int, int, Shape] | None = None
        for index, profile in enumerate(self.all):
            run_as = (max(shape[0], profile.least[0]), *shape[1:])
            if profile.fits(run_as):
                spare = run_as[0] - shape[0]
                found = (spare, abs(profile.usual[0] - run_as[0]), index, run_as)
                best = min(best, found) if best else found
        if best is None:
            known = " or ".join(str(profile) for profile in self.all)
            raise InputError(
                f"the engine takes no batch of shape {shape}; its profiles take {known}. Resize the images, or build "
                "an engine for that size: advprop build --img-size MIN:OPT:MAX"
            )
        return best[2], best[3]
