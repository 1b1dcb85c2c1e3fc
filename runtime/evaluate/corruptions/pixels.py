"""From gray levels in floating point back to uint8."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["truncate"]


def truncate(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Clips gray levels to [0, 255], in place, and cuts their fractions off as the original does."""
    np.clip(values, 0, 255, out=values)
    return values.astype(np.uint8)
