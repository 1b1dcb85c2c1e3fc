"""Statistics of a batcher, as counts that can be added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BatcherStats", "Counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherStats:
    """Counts since the batcher was created.

    submitted = answered + cancelled + late + failed + pending
    """

    submitted: int
    """Accepted requests."""
    answered: int
    """Requests whose result was delivered."""
    answered_images: int
    """Images of these requests."""
    cancelled: int
    """Requests that their owner canceled before the result was ready."""
    late: int
    """Requests whose deadline passed."""
    failed: int
    """Requests that ended with an error of the model or of an image, or because of `close`."""
    refused: int
    """Requests that were rejected because the queue was full."""
    pending: int
    """Accepted requests that have not ended."""
    waiting_images: int
    """Images of pending requests that are not in a batch yet."""
    batch_sizes: Mapping[int, int]
    """Images per batch → number of batches."""
    queue_wait_us: Mapping[int, int]
    """Power of two, in microseconds → requests that waited in the queue for at most that long and
    more than half of it."""

    queue_wait_s: float = 0.0
    """Sum of these waits, in seconds."""
    compute_us: Mapping[int, int] = field(default_factory=dict)
    """Power of two, in microseconds → batches whose run took at most that long and more than half
    of it."""
    compute_s: float = 0.0
    """Sum of these run times, in seconds."""

    @property
    def mean_batch(self) -> float:
        """Mean number of images per batch; 0 before the first batch."""
        batches = sum(self.batch_sizes.values())
        return sum(size * count for size, count in self.batch_sizes.items()) / batches if batches else 0.0

    def wait_us_below(self, share: float) -> int:
        """Return an upper bound, in microseconds, on the wait of a `share` of the requests."""
        left = share * sum(self.queue_wait_us.values())
        for bound, count in sorted(self.queue_wait_us.items()):
            left -= count
            if left <= 0:
                return bound
        return max(self.queue_wait_us, default=0)


@dataclass(slots=True)
class Counts:
    """The counters behind `BatcherStats`. Hold the batcher's lock to use them."""

    submitted: int = 0
    refused: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """`answered`, `cancelled`, `late` or `failed` → requests."""
    answered_images: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)
    queue_wait_us: Counter[int] = field(default_factory=Counter)

    queue_wait_s: float = 0.0
    compute_us: Counter[int] = field(default_factory=Counter)
    compute_s: float = 0.0

    def add_wait(self, wait_s: float) -> None:
        """Count the time that a request waited in the queue."""
        self.queue_wait_us[_power_of_two_us(wait_s)] += 1
        self.queue_wait_s += wait_s

    def add_compute(self, compute_s: float) -> None:
        """Count the time that the model needed for a batch."""
        self.compute_us[_power_of_two_us(compute_s)] += 1
        self.compute_s += compute_s

    def snapshot(self, pending: int, waiting_images: int) -> BatcherStats:
        """Return the current counts, which no longer change."""
        return BatcherStats(
            submitted=self.submitted,
            answered=self.ends["answered"],
            answered_images=self.answered_images,
            cancelled=self.ends["cancelled"],
            late=self.ends["late"],
            failed=self.ends["failed"],
            refused=self.refused,
            pending=pending,
            waiting_images=waiting_images,
            batch_sizes=dict(sorted(self.batch_sizes.items())),
            queue_wait_us=dict(sorted(self.queue_wait_us.items())),
            queue_wait_s=self.queue_wait_s,
            compute_us=dict(sorted(self.compute_us.items())),
            compute_s=self.compute_s,
        )


def _power_of_two_us(seconds: float) -> int:
    """Return the smallest power of two that is at least `seconds`, in microseconds."""
    return 1 << (max(int(seconds * 1e6), 1) - 1).bit_length()
