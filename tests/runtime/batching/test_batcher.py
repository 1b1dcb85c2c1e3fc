"""The batcher on real models: nothing lost, nothing crossed, and every end is counted."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.batching.batcher import Batcher, BatcherStats, Batching
from runtime.errors import ConfigError, DeadlineExceeded, InputError, QueueFull, RunFailed, SessionClosed
from tests.support.serving_models import FRAGILE, MEAN, SLOW, images_of, serving_model

LONG = 400_000.0
"""Makes the slow model run for half a second or so."""


def open_session(folder: Path, body: str = MEAN, **batching: int) -> runtime.Session:
    onnx.save(serving_model(body), folder / "m.onnx")
    return runtime.load(folder / "m.onnx", threads=1, warm_up=(1,), batching=Batching(**batching))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[runtime.Session]:
    """Takes one image at a time, so that a long one keeps the model busy."""
    with open_session(tmp_path, SLOW, max_batch=1, max_queued_images=4) as session:
        yield session


def busy(session: runtime.Session) -> Future:
    """Starts a long run and returns once it runs."""
    future = session.submit(images_of(LONG))
    while session.stats.batcher.waiting_images:
        time.sleep(0.001)
    return future


def ends(stats: BatcherStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in ("answered", "cancelled", "late", "failed") if getattr(stats, name)}


def test_requests_are_joined(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=8, max_delay_us=10_000_000) as session:
        futures = [session.submit(images_of(*values)) for values in ([1, 2, 3], [4], [5, 6, 7, 8])]
        answers = [future.result(5)[:, 0].tolist() for future in futures]  # full, so nobody waits for 10 s
        assert answers == [[1, 2, 3], [4], [5, 6, 7, 8]]
        assert session.stats.batcher.batch_sizes == {8: 1}
        assert sum(session.stats.batcher.queue_wait_us.values()) == 3


def test_a_lone_request_waits_for_the_delay_and_no_longer(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=8, max_delay_us=50_000) as session:
        began = time.monotonic()
        session.submit(images_of(1)).result(5)
        assert time.monotonic() - began >= 0.05
        assert session.stats.batcher.batch_sizes == {1: 1}


def test_a_request_larger_than_a_batch_is_split(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=4, max_delay_us=0) as session:
        large, small = session.submit(images_of(*range(11))), session.submit(images_of(20, 21))
        assert large.result(5)[:, 0].tolist() == list(range(11))
        assert small.result(5)[:, 0].tolist() == [20, 21]
        assert max(session.stats.batcher.batch_sizes) <= 4


def test_answers_are_owned_by_their_requests(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=2, max_delay_us=10_000_000) as session:
        first, second = session.submit(images_of(1)), session.submit(images_of(2))
        first.result(5)[:] = 7
        assert second.result(5).tolist() == [[2.0] * 3]
        assert second.result().base is None


def test_a_full_queue_refuses(slow: runtime.Session) -> None:
    running = busy(slow)
    waiting = [slow.submit(images_of(value)) for value in (1, 2, 3)]
    with pytest.raises(QueueFull, match="3 images wait and at most 4 may: no room for 2 more"):
        slow.submit(images_of(4, 5))
    waiting.append(slow.submit(images_of(4)))
    with pytest.raises(QueueFull, match="4 images wait"):
        slow.submit(images_of(5))
    with pytest.raises(InputError, match=r"5 images is more than may wait at all \(4\); split it"):
        slow.submit(images_of(1, 2, 3, 4, 5))
    assert [future.result(5)[0, 0] for future in waiting] == [1, 2, 3, 4]
    running.result(5)
    assert slow.stats.batcher.refused == 2
    assert ends(slow.stats.batcher) == {"answered": 5}


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(slow: runtime.Session) -> None:
    runs = slow.submit(images_of(LONG), timeout_s=0.05)
    waits = slow.submit(images_of(1), timeout_s=0.02)
    patient = slow.submit(images_of(2), timeout_s=60)
    for future in (runs, waits):
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.0"):
            future.result(5)
    assert not patient.done(), "they are told at the deadline, not when the batch is done"
    assert patient.result(5)[0, 0] == 2
    assert ends(slow.stats.batcher) == {"answered": 1, "late": 2}
    with pytest.raises(TimeoutError):
        slow.submit(images_of(1), timeout_s=0).result(5)
    with pytest.raises(ConfigError, match="timeout_s must be a number"):
        slow.submit(images_of(1), timeout_s=float("nan"))


def test_cancelling_what_waits_and_what_runs(slow: runtime.Session) -> None:
    runs = busy(slow)
    waits, other = slow.submit(images_of(1, 2, 3)), slow.submit(images_of(4))
    assert waits.cancel()
    assert waits.cancel()
    assert slow.submit(images_of(5, 6, 7)).cancel(), "a cancelled request frees its room at once"
    assert runs.cancel()
    assert other.result(5)[0, 0] == 4
    assert not other.cancel()
    assert wait([runs, waits], timeout=5).done == {runs, waits}
    with pytest.raises(CancelledError):
        runs.result()
    assert ends(slow.stats.batcher) == {"answered": 1, "cancelled": 3}
    assert slow.stats.batcher.waiting_images == slow.stats.batcher.pending == 0


def test_an_error_of_the_model_goes_to_the_requests_of_that_batch(tmp_path: Path) -> None:
    with open_session(tmp_path, FRAGILE, max_batch=2, max_delay_us=10_000_000) as session:
        values = ([0.5], [9.0], [0.1], [0.2], [0.3, 0.4, 9.0, 0.5], [0.6, 0.7])
        futures = [session.submit(images_of(*value)) for value in values]
        errors = [future.exception(5) for future in futures]
        assert [isinstance(error, RunFailed) for error in errors] == [True, True, False, False, True, False]
        assert errors[0] is not errors[1], "each thread raises its own"
        assert futures[5].result()[:, 0].tolist() == pytest.approx([0.6, 0.7])
        assert ends(session.stats.batcher) == {"answered": 3, "failed": 3}


def test_an_error_of_the_last_step_goes_to_its_request_alone(tmp_path: Path) -> None:
    with open_session(tmp_path) as session:
        batcher = Batcher(session.backend, Batching(max_batch=2, max_delay_us=10_000_000))
        fine = batcher.submit(images_of(1), finish=lambda answers: answers[0])
        wrong = batcher.submit(images_of(2), finish=lambda answers: answers[5])
        with pytest.raises(RunFailed, match="IndexError"):
            wrong.result(5)
        assert fine.result(5)[0, 0] == 1
        batcher.close()


def test_close_answers_what_waits(slow: runtime.Session) -> None:
    futures = [busy(slow), *(slow.submit(images_of(value)) for value in (1, 2, 3))]
    slow.close()
    assert [future.done() for future in futures] == [True] * 4
    assert [future.result()[0, 0] for future in futures[1:]] == [1, 2, 3]
    with pytest.raises(SessionClosed, match="is closed; load it again"):
        slow.submit(images_of(1))


def test_close_without_draining_fails_what_waits(slow: runtime.Session) -> None:
    runs, waits = busy(slow), slow.submit(images_of(1))
    slow.close(drain=False)
    assert runs.result(0).shape == (1, 3)
    with pytest.raises(SessionClosed, match="closed before this request had its turn"):
        waits.result(0)
    assert ends(slow.stats.batcher) == {"answered": 1, "failed": 1}


def test_close_from_a_callback(slow: runtime.Session) -> None:
    first, second = slow.submit(images_of(1000)), slow.submit(images_of(2))
    first.add_done_callback(lambda done: slow.close())
    assert second.result(5)[0, 0] == 2
    with pytest.raises(InputError, match="closed"):
        slow.run(images_of(1))


def test_a_dropped_session_answers_and_ends_its_threads(tmp_path: Path) -> None:
    session = open_session(tmp_path, SLOW)
    future = session.submit(images_of(LONG), timeout_s=60)
    del session
    gc.collect()
    assert future.result(5).shape == (1, 3)
    for _ in range(500):
        if not any(thread.name.startswith("advprop-") for thread in threading.enumerate()):
            return
        time.sleep(0.01)
    pytest.fail("threads of a dropped session are still there")


def test_sizes_of_images_may_be_mixed(tmp_path: Path) -> None:
    onnx.save(serving_model(size="h, w"), tmp_path / "open.onnx")
    with runtime.load(tmp_path / "open.onnx", threads=1) as session:
        sizes = [(4, 4), (4, 4), (5, 7), (4, 4)] * 5
        images = [np.full((1, 3, *size), number, np.float32) for number, size in enumerate(sizes)]
        futures = [session.submit(image) for image in images]
        assert [future.result(5)[0, 0] for future in futures] == list(range(20))


@pytest.mark.parametrize("field", ["max_batch", "max_delay_us", "max_queued_images", "decode_threads"])
def test_impossible_settings(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least"):
        Batching(**{field: -1})


Ask = Callable[[np.ndarray, np.random.Generator], np.ndarray | None]


class Traffic:
    """64 threads that ask for images of a table, whose answers are known, a few at a time."""

    def __init__(self, session: runtime.Session, requests: int = 500) -> None:
        self.images = np.random.default_rng(0).normal(size=(2000, 3, 8, 8)).astype(np.float32)
        self.expected = np.concatenate([session.run(image[None]) for image in self.images])
        self.requests = requests
        self.wrong: list[object] = []

    def run(self, ask: Ask) -> None:
        """Calls `ask(images, random) → answer or None` from all threads; keeps what is wrong."""
        threads = [threading.Thread(target=self._one, args=(number, ask)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, number: int, ask: Ask) -> None:
        random = np.random.default_rng(number)
        try:
            for _ in range(self.requests):
                chosen = random.integers(len(self.images), size=random.choice([1, 1, 1, 2, 3, 8, 20]))
                answer = ask(self.images[chosen], random)
                if answer is not None and not np.array_equal(answer, self.expected[chosen]):
                    self.wrong.append(chosen)
        except BaseException as error:
            self.wrong.append(error)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution, whose answers are the same bits in batches of every size."""
    from tests.support.networks import classifier

    path = tmp_path_factory.mktemp("network") / "m.onnx"
    onnx.save(classifier(), path)
    return path


def test_64_threads_on_one_session(network: Path) -> None:
    with runtime.load(network, threads=1) as session:
        traffic = Traffic(session)
        traffic.run(lambda images, random: session.run(images))
        assert traffic.wrong == []
        assert session.stats.calls == 2000 + 32_000
        assert session.stats.running == session.stats.failed == 0


def test_64_threads_through_the_batcher(network: Path) -> None:
    batching = Batching(max_batch=16, max_delay_us=200, max_queued_images=64 * 20)
    with runtime.load(network, threads=1, batching=batching) as session:
        traffic = Traffic(session)
        traffic.run(lambda images, random: session.submit(images).result(30))
        stats = session.stats.batcher
        assert traffic.wrong == []
        assert ends(stats) == {"answered": 32_000}
        assert stats.submitted == 32_000
        assert stats.mean_batch > 2, "requests were joined"


class TwoContexts(OnnxRuntimeBackend):
    """As a backend with a pool of contexts would be; ONNX Runtime takes any number of calls at once."""

    contexts = 2


def test_two_batches_at_a_time(network: Path) -> None:
    backend = TwoContexts(network, device="cpu", threads=runtime.Threads(intra=1))
    batching = Batching(max_batch=4, max_delay_us=100, max_queued_images=64 * 20)
    with runtime.Session(backend, network, batching) as session:
        traffic = Traffic(session, requests=50)
        traffic.run(lambda images, random: session.submit(images).result(30))
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("advprop-batcher")]
        assert len(workers) == 2
        assert traffic.wrong == []
        assert ends(session.stats.batcher) == {"answered": 3200}


def test_64_threads_that_cancel_come_late_and_overload(network: Path) -> None:
    """Whatever ends a request, the answers of the others are right, and the counts agree with what the threads saw."""
    seen = {"answered": itertools.count(), "cancelled": itertools.count(), "late": itertools.count()}
    refused = itertools.count()

    def ask(images: np.ndarray, random: np.random.Generator) -> np.ndarray | None:
        draw = random.random()
        try:
            future = session.submit(images, timeout_s=1e-4 * 10 ** (4 * random.random()) if draw < 0.3 else 60)
        except QueueFull:
            next(refused)
            return None
        if draw > 0.7:
            time.sleep(1e-3 * random.random())
            future.cancel()
        try:
            answer = future.result(30)
        except DeadlineExceeded:
            next(seen["late"])
        except CancelledError:
            next(seen["cancelled"])
        else:
            next(seen["answered"])
            return answer
        return None

    batching = Batching(max_batch=16, max_delay_us=200, max_queued_images=256)
    with runtime.load(network, threads=1, batching=batching) as session:
        traffic = Traffic(session, requests=100)
        traffic.run(ask)
        session.close()
        stats = session.stats.batcher
    assert traffic.wrong == []
    counts = {name: next(count) for name, count in seen.items()}
    assert ends(stats) == counts
    assert min(counts.values()) > 0
    assert stats.refused == next(refused)
    assert stats.submitted == sum(counts.values())
    assert stats.waiting_images == stats.pending == 0
