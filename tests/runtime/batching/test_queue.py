"""The order of the queue, and statistics, without threads."""

from concurrent.futures import Future

import numpy as np

from runtime.batching.queue import FairQueue, Part, Request
from runtime.batching.statistics import Counts


def put(queue: FairQueue, count: int, size: int = 4) -> Request:
    request = Request(Future(), count, np.inf, lambda outputs: outputs, 0.0, np.zeros((count, 3, size, size)))
    queue.put(request)
    return request


def take(queue: FairQueue, max_images: int, names: dict[Request, str]) -> str:
    return " ".join(f"{names[part.request]}{part.start}+{len(part.images_NCHW)}" for part in taken(queue, max_images))


def taken(queue: FairQueue, max_images: int) -> list[Part]:
    parts: list[Part] = []
    queue.take(max_images, parts)
    return parts


def test_requests_fill_batches_first_in_first_out() -> None:
    queue = FairQueue(8)
    names = {put(queue, count): name for name, count in (("a", 3), ("b", 4), ("c", 5), ("d", 2))}
    assert queue.images == 14
    assert take(queue, 8, names) == "a0+3 b0+4 c0+1"
    assert take(queue, 8, names) == "c1+4 d0+2"
    assert not queue
    assert queue.images == 0
    assert taken(queue, 8) == []


def test_a_large_request_alternates_with_others() -> None:
    queue = FairQueue(4)
    names = {put(queue, 10): "L", put(queue, 1): "a", put(queue, 2): "b"}
    assert take(queue, 4, names) == "L0+4"
    names[put(queue, 4)] = "c"  # behind the rest of L
    assert take(queue, 4, names) == "a0+1 b0+2 L4+1"
    assert take(queue, 4, names) == "L5+3 c0+1"
    assert take(queue, 4, names) == "c1+3 L8+1"
    assert take(queue, 4, names) == "L9+1"
    assert not queue


def test_a_stream_of_small_requests_does_not_starve_a_large_one() -> None:
    queue = FairQueue(4)
    large = put(queue, 40)
    for _ in range(100):
        for _ in range(4):
            put(queue, 1)
        taken(queue, 4)
        if large.taken == 40:
            break
    assert large.taken == 40


def test_a_batch_has_one_image_size_and_keeps_the_order() -> None:
    queue = FairQueue(8)
    names = {put(queue, 2): "a", put(queue, 1, size=5): "b", put(queue, 2): "c"}
    assert [take(queue, 8, names) for _ in range(3)] == ["a0+2", "b0+1", "c0+2"]


def test_a_request_can_be_removed() -> None:
    queue = FairQueue(2)
    large, names = put(queue, 5), {put(queue, 1): "a"}
    taken(queue, 2)
    queue.remove(large)
    queue.remove(large)
    assert queue.images == 1
    assert take(queue, 2, names) == "a0+1"


def test_parts_are_joined_in_order_of_their_images() -> None:
    request = Request(Future(), 5, np.inf, lambda outputs: outputs, 0.0)
    for start, stop in ((3, 5), (0, 1), (1, 3)):
        request.parts[start] = (np.arange(start, stop), -np.arange(start, stop))
    assert [rows.tolist() for rows in request.joined()] == [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4]]


def test_waits_are_counted_in_powers_of_two() -> None:
    counts = Counts()
    for wait_s in (0.0, 1e-6, 2e-6, 3e-6, 1e-3):
        counts.add_wait(wait_s)
    stats = counts.snapshot(0, 0)
    assert stats.queue_wait_us == {1: 2, 2: 1, 4: 1, 1024: 1}
    assert [stats.wait_us_below(share) for share in (0.0, 0.4, 0.6, 0.99, 1.0)] == [1, 1, 2, 1024, 1024]
    assert stats.mean_batch == 0.0
