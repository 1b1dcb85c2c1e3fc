"""What a batcher has done so far, in counts that can be added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["BatcherStats", "Counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatcherStats:
    """Counts since the batcher was made. submitted = answered + cancelled + late + failed + pending."""

    submitted: int
    """Requests that were let in."""
    answered: int
    """Requests whose answer was delivered."""
    cancelled: int
    """Requests that their owner cancelled before the answer was there."""
    late: int
    """Requests whose deadline passed."""
    failed: int
    """Requests that ended in an error: of the model, of an image, or because of `close`."""
    refused: int
    """Requests that were not let in, since the queue was full."""
    pending: int
    """Requests let in and not ended."""
    waiting_images: int
    """Images of those that no batch has taken."""
    batch_sizes: Mapping[int, int]
    """Images in a batch → batches that ran."""
    queue_wait_us: Mapping[int, int]
    """Microseconds, a power of two → requests whose first image waited at most that and more than half of it."""

    @property
    def mean_batch(self) -> float:
        """Images in a batch on average; 0 before the first."""
        batches = sum(self.batch_sizes.values())
        return sum(size * count for size, count in self.batch_sizes.items()) / batches if batches else 0.0

    def wait_us_below(self, share: float) -> int:
        """Returns a bound in microseconds that a `share` in [0, 1] of the requests waited at most; 0 without any."""
        left = share * sum(self.queue_wait_us.values())
        for bound, count in sorted(self.queue_wait_us.items()):
            left -= count
            if left <= 0:
                return bound
        return max(self.queue_wait_us, default=0)


@dataclass(slots=True)
class Counts:
    """The same while it is counted; whoever counts holds the batcher's lock."""

    submitted: int = 0
    refused: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """`answered`, `cancelled`, `late` or `failed` → requests."""
    batch_sizes: Counter[int] = field(default_factory=Counter)
    queue_wait_us: Counter[int] = field(default_factory=Counter)

    def waited(self, wait_s: float) -> None:
        """Counts a request's wait in the queue."""
        self.queue_wait_us[1 << (max(int(wait_s * 1e6), 1) - 1).bit_length()] += 1

    def read(self, pending: int, waiting_images: int) -> BatcherStats:
        """Returns a copy that does not change any more."""
        return BatcherStats(
            submitted=self.submitted,
            answered=self.ends["answered"],
            cancelled=self.ends["cancelled"],
            late=self.ends["late"],
            failed=self.ends["failed"],
            refused=self.refused,
            pending=pending,
            waiting_images=waiting_images,
            batch_sizes=dict(sorted(self.batch_sizes.items())),
            queue_wait_us=dict(sorted(self.queue_wait_us.items())),
        )
