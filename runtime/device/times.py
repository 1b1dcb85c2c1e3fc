"""`DeviceTimes`: how long the GPU took for one batch, by its own clock."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DeviceTimes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """One call, by CUDA events on its stream. What trtexec calls each is in `runtime.bench.results`."""

    h2d_ms: float
    """Images from pinned memory to the GPU."""
    compute_ms: float
    """The network's kernels."""
    d2h_ms: float
    """Answers back to the CPU."""
    enqueue_ms: float
    """The host putting all of that on the stream; by the host's clock."""

    @property
    def latency_ms(self) -> float:
        """Both copies and the kernels."""
        return self.h2d_ms + self.compute_ms + self.d2h_ms
