"""`Staging`: where the images of several requests come together.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Staging"]


class Staging:
    """A worker's own memory for batches, kept from one to the next: fresh pages would cost more than the copy."""

    def __init__(self) -> None:
        self._memory_NCHW = np.empty((0,))

    def gather(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Returns the images of all parts as one array, which the next call overwrites; of one part, that part."""
        if len(parts) == 1:
            return parts[0]
        count = sum(len(part_NCHW) for part_NCHW in parts)
        memory_NCHW = self._memory_NCHW
        if memory_NCHW.shape[1:] != parts[0].shape[1:] or len(memory_NCHW) < count:
            memory_NCHW = self._memory_NCHW = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(parts, out=memory_NCHW[:count])
