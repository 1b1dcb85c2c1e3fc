"""The batcher with real models: every request gets its own results, and its end is counted."""

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.batching.batcher import Batcher, BatcherStats, Batching
from runtime.errors import ConfigError, DeadlineExceeded, InputError, QueueFull, RunFailed, SessionClosed
from tests.support.serving_models import FRAGILE, LONG, SLOW, busy, images_of, open_session, serving_model


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[runtime.Session]:
    """A session that runs one image at a time: a long one keeps the model busy."""
    with open_session(tmp_path, SLOW, max_batch=1, max_queued_images=4) as session:
        yield session


def ends(stats: BatcherStats) -> dict[str, int]:
    return {name: getattr(stats, name) for name in ("answered", "cancelled", "late", "failed") if getattr(stats, name)}


def test_batches_run_at_the_same_time_if_requested(tmp_path: Path) -> None:
    onnx.save(serving_model(SLOW), tmp_path / "m.onnx")
    threads = runtime.Threads(intra=1, contexts=2)
    with runtime.load(tmp_path / "m.onnx", threads=threads, device="cpu", warm_up=(1,)) as session:
        assert session.batching.max_batch == 1
        long = busy(session)
        assert session.submit(images_of(1)).result(60)[0, 0] == 1
        assert not long.done()


def test_an_idle_model_on_a_cpu_runs_at_once(tmp_path: Path) -> None:
    with open_session(tmp_path) as session:
        assert session.batching.max_delay_us == (1000 if session.backend.device == "cuda" else 0)


def test_requests_are_joined_into_batches(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=8, max_delay_us=10_000_000) as session:
        futures = [session.submit(images_of(*values)) for values in ([1, 2, 3], [4], [5, 6, 7, 8])]
        results = [
            future.result(5)[:, 0].tolist() for future in futures
        ]  # the batch is full, and does not wait for 10 s
        assert results == [[1, 2, 3], [4], [5, 6, 7, 8]]
        assert session.stats.batcher.batch_sizes == {8: 1}
        assert sum(session.stats.batcher.queue_wait_us.values()) == 3


def test_a_single_request_waits_for_the_delay(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=8, max_delay_us=50_000) as session:
        start = time.monotonic()
        session.submit(images_of(1)).result(5)
        assert time.monotonic() - start >= 0.05
        assert session.stats.batcher.batch_sizes == {1: 1}


def test_a_request_larger_than_a_batch_is_split(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=4, max_delay_us=0) as session:
        large, small = session.submit(images_of(*range(11))), session.submit(images_of(20, 21))
        assert large.result(5)[:, 0].tolist() == list(range(11))
        assert small.result(5)[:, 0].tolist() == [20, 21]
        assert max(session.stats.batcher.batch_sizes) <= 4


def test_results_do_not_share_memory(tmp_path: Path) -> None:
    with open_session(tmp_path, max_batch=2, max_delay_us=10_000_000) as session:
        first, second = session.submit(images_of(1)), session.submit(images_of(2))
        first.result(5)[:] = 7
        assert second.result(5).tolist() == [[2.0] * 3]
        assert second.result().base is None


def test_a_full_queue_refuses_requests(slow: runtime.Session) -> None:
    running = busy(slow)
    waiting = [slow.submit(images_of(value)) for value in (1, 2, 3)]
    with pytest.raises(QueueFull, match="3 of at most 4 images wait: there is no room for 2 more; retry later"):
        slow.submit(images_of(4, 5))
    waiting.append(slow.submit(images_of(4)))
    with pytest.raises(QueueFull, match="4 of at most 4 images wait"):
        slow.submit(images_of(5))
    with pytest.raises(InputError, match=r"the request has 5 images, and the queue can hold 4; split it"):
        slow.submit(images_of(1, 2, 3, 4, 5))
    assert [future.result(5)[0, 0] for future in waiting] == [1, 2, 3, 4]
    running.result(5)
    assert slow.stats.batcher.refused == 2
    assert ends(slow.stats.batcher) == {"answered": 5}


def test_a_deadline_ends_waiting_and_running_requests(slow: runtime.Session) -> None:
    runs = slow.submit(images_of(LONG), timeout_s=0.05)
    waits = slow.submit(images_of(1), timeout_s=0.02)
    patient = slow.submit(images_of(2), timeout_s=60)
    for future in (runs, waits):
        with pytest.raises(DeadlineExceeded, match=r"the deadline of 0\.0\d* s passed"):
            future.result(5)
    assert not patient.done(), "they must end at the deadline, not with the batch"
    assert patient.result(5)[0, 0] == 2
    assert ends(slow.stats.batcher) == {"answered": 1, "late": 2}
    with pytest.raises(TimeoutError):
        slow.submit(images_of(1), timeout_s=0).result(5)
    with pytest.raises(ConfigError, match="timeout_s must be a number"):
        slow.submit(images_of(1), timeout_s=float("nan"))


def test_waiting_and_running_requests_can_be_cancelled(slow: runtime.Session) -> None:
    runs = busy(slow)
    waits, other = slow.submit(images_of(1, 2, 3)), slow.submit(images_of(4))
    assert waits.cancel()
    assert waits.cancel()
    assert slow.submit(images_of(5, 6, 7)).cancel(), "a cancelled request must free its room at once"
    assert runs.cancel()
    assert other.result(5)[0, 0] == 4
    assert not other.cancel()
    assert wait([runs, waits], timeout=5).done == {runs, waits}
    with pytest.raises(CancelledError):
        runs.result()
    assert ends(slow.stats.batcher) == {"answered": 1, "cancelled": 3}
    assert slow.stats.batcher.waiting_images == slow.stats.batcher.pending == 0


def test_an_error_of_the_model_fails_the_requests_in_its_batch(tmp_path: Path) -> None:
    with open_session(tmp_path, FRAGILE, device="cpu", max_batch=2, max_delay_us=10_000_000) as session:
        values = ([0.5], [9.0], [0.1], [0.2], [0.3, 0.4, 9.0, 0.5], [0.6, 0.7])
        futures = [session.submit(images_of(*value)) for value in values]
        errors = [future.exception(5) for future in futures]
        assert [isinstance(error, RunFailed) for error in errors] == [True, True, False, False, True, False]
        assert errors[0] is not errors[1], "each thread must raise its own error"
        assert futures[5].result()[:, 0].tolist() == pytest.approx([0.6, 0.7])
        assert ends(session.stats.batcher) == {"answered": 3, "failed": 3}


def test_an_error_in_finish_fails_only_its_request(tmp_path: Path) -> None:
    with open_session(tmp_path) as session:
        batcher = Batcher(session.backend, Batching(max_batch=2, max_delay_us=10_000_000))
        fine = batcher.submit(images_of(1), finish=lambda outputs: outputs[0])
        wrong = batcher.submit(images_of(2), finish=lambda outputs: outputs[5])
        with pytest.raises(RunFailed, match="IndexError"):
            wrong.result(5)
        assert fine.result(5)[0, 0] == 1
        batcher.close()


def test_close_completes_waiting_requests(slow: runtime.Session) -> None:
    futures = [busy(slow), *(slow.submit(images_of(value)) for value in (1, 2, 3))]
    slow.close()
    assert [future.done() for future in futures] == [True] * 4
    assert [future.result()[0, 0] for future in futures[1:]] == [1, 2, 3]
    with pytest.raises(SessionClosed, match="is closed; load it again"):
        slow.submit(images_of(1))


def test_close_without_draining_fails_waiting_requests(slow: runtime.Session) -> None:
    runs, waits = busy(slow), slow.submit(images_of(1))
    slow.close(drain=False)
    assert runs.result(0).shape == (1, 3)
    with pytest.raises(SessionClosed, match="closed before this request ran"):
        waits.result(0)
    assert ends(slow.stats.batcher) == {"answered": 1, "failed": 1}


def test_close_in_a_callback(slow: runtime.Session) -> None:
    first, second = slow.submit(images_of(1000)), slow.submit(images_of(2))
    first.add_done_callback(lambda done: slow.close())
    assert second.result(5)[0, 0] == 2
    with pytest.raises(InputError, match="closed"):
        slow.run(images_of(1))


def test_a_garbage_collected_session_completes_its_requests_and_ends_its_threads(tmp_path: Path) -> None:
    session = open_session(tmp_path, SLOW)
    future = session.submit(images_of(LONG), timeout_s=60)
    del session
    gc.collect()
    assert future.result(5).shape == (1, 3)
    for _ in range(500):
        if not any(thread.name.startswith("advprop-") for thread in threading.enumerate()):
            return
        time.sleep(0.01)
    pytest.fail("threads of a garbage-collected session are still alive")


def test_requests_may_have_different_image_sizes(tmp_path: Path) -> None:
    onnx.save(serving_model(size="h, w"), tmp_path / "open.onnx")
    with runtime.load(tmp_path / "open.onnx", threads=1) as session:
        sizes = [(4, 4), (4, 4), (5, 7), (4, 4)] * 5
        images = [np.full((1, 3, *size), number, np.float32) for number, size in enumerate(sizes)]
        futures = [session.submit(image) for image in images]
        assert [future.result(5)[0, 0] for future in futures] == list(range(20))


@pytest.mark.parametrize("field", ["max_batch", "max_delay_us", "max_queued_images", "decode_threads"])
def test_invalid_settings_are_rejected(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be at least"):
        Batching(**{field: -1})


Call = Callable[[np.ndarray, np.random.Generator], np.ndarray | None]


class Traffic:
    """64 threads that request a few images at a time from a table with known outputs."""

    def __init__(self, session: runtime.Session, requests: int = 500) -> None:
        self.images = np.random.default_rng(0).normal(size=(2000, 3, 8, 8)).astype(np.float32)
        self.expected = np.concatenate([session.run(image[None]) for image in self.images])
        self.requests = requests
        self.wrong: list[object] = []

    def run(self, call: Call) -> None:
        """Call `call(images, random) → output or None` from all threads, and record what is wrong."""
        threads = [threading.Thread(target=self._run_thread, args=(number, call)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_thread(self, number: int, call: Call) -> None:
        random = np.random.default_rng(number)
        try:
            for _ in range(self.requests):
                chosen = random.integers(len(self.images), size=random.choice([1, 1, 1, 2, 3, 8, 20]))
                output = call(self.images[chosen], random)
                if output is not None and not np.array_equal(output, self.expected[chosen]):
                    self.wrong.append(chosen)
        except BaseException as error:
            self.wrong.append(error)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution whose outputs are bit-equal for every batch size."""
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
        assert stats.mean_batch > 2, "requests must be joined"


def test_two_batches_run_at_the_same_time(network: Path) -> None:
    backend = OnnxRuntimeBackend(network, device="cpu", threads=runtime.Threads(intra=1, contexts=2))
    batching = Batching(max_batch=4, max_delay_us=100, max_queued_images=64 * 20)
    with runtime.Session(backend, network, batching) as session:
        traffic = Traffic(session, requests=50)
        traffic.run(lambda images, random: session.submit(images).result(30))
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("advprop-batcher")]
        assert len(workers) == 2
        assert traffic.wrong == []
        assert ends(session.stats.batcher) == {"answered": 3200}


def test_64_threads_with_cancellation_deadlines_and_overload(network: Path) -> None:
    """All other requests get correct results, and the counts agree with the threads."""
    observed = {"answered": itertools.count(), "cancelled": itertools.count(), "late": itertools.count()}
    refused = itertools.count()

    def call(images: np.ndarray, random: np.random.Generator) -> np.ndarray | None:
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
            output = future.result(30)
        except DeadlineExceeded:
            next(observed["late"])
        except CancelledError:
            next(observed["cancelled"])
        else:
            next(observed["answered"])
            return output
        return None

    batching = Batching(max_batch=16, max_delay_us=200, max_queued_images=256)
    with runtime.load(network, threads=1, batching=batching) as session:
        traffic = Traffic(session, requests=100)
        traffic.run(call)
        session.close()
        stats = session.stats.batcher
    assert traffic.wrong == []
    counts = {name: next(count) for name, count in observed.items()}
    assert ends(stats) == counts
    assert min(counts.values()) > 0
    assert stats.refused == next(refused)
    assert stats.submitted == sum(counts.values())
    assert stats.waiting_images == stats.pending == 0
