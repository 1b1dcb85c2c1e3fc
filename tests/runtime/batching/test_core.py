"""Room in the queue, errors, closing and threads of the batcher."""

import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import runtime
from runtime.batching.batcher import Batcher, Batching
from runtime.errors import DataError, DeadlineExceeded, RunFailed, SessionClosed
from tests.support.serving_models import FRAGILE, LONG, SLOW, busy, images_of, open_session, serving_model


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[runtime.Session]:
    """A session that runs one image at a time: a long one keeps the model busy."""
    with open_session(tmp_path, SLOW, max_batch=1, max_queued_images=4) as session:
        yield session


def rows(outputs: tuple[np.ndarray, ...]) -> list[float]:
    """Return the first output of each image."""
    return outputs[0][:, 0].tolist()


def test_a_request_may_fill_the_whole_queue(slow: runtime.Session) -> None:
    assert slow.submit(images_of(1, 2, 3, 4)).result(5)[:, 0].tolist() == [1, 2, 3, 4]


def test_a_closed_batcher_refuses_requests_and_says_what_to_do(slow: runtime.Session) -> None:
    batcher = Batcher(slow.backend, Batching())
    batcher.close()
    batcher.close()
    with pytest.raises(SessionClosed, match=r"^the batcher is closed; load the model again$"):
        batcher.submit(images_of(1), finish=rows)
    assert batcher.stats.submitted == batcher.stats.refused == batcher.stats.pending == 0


def test_errors_of_finish_are_delivered_as_copies_with_their_cause(slow: runtime.Session) -> None:
    own, other = DataError("no such class", fix="add it"), ValueError("first line\nsecond line")
    own.__cause__ = KeyError("cat")

    def fail(error: Exception) -> Callable[[tuple[np.ndarray, ...]], None]:
        def finish(outputs: tuple[np.ndarray, ...]) -> None:
            raise error

        return finish

    batcher = Batcher(slow.backend, Batching())
    delivered = batcher.submit(images_of(1), finish=fail(own)).exception(5)
    assert isinstance(delivered, DataError)
    assert delivered is not own
    assert (str(delivered), delivered.__cause__) == (str(own), own.__cause__)
    delivered = batcher.submit(images_of(1), finish=fail(other)).exception(5)
    assert isinstance(delivered, RunFailed)
    assert "ValueError: first line" in str(delivered)
    assert "second line" not in str(delivered)
    assert delivered.__cause__ is other
    batcher.close()


def test_a_late_request_reports_its_deadline_and_age(slow: runtime.Session) -> None:
    running, start = busy(slow), time.monotonic()
    error = slow.submit(images_of(1), timeout_s=0.02).exception(5)
    elapsed = time.monotonic() - start
    deadline, age = map(float, re.findall(r"([\d.e-]+) s", str(error)))
    assert deadline == 0.02
    assert 0.02 <= age <= 1.01 * elapsed  # printed with three digits
    running.result(30)


def test_garbage_collection_does_not_wait_for_a_running_batch(slow: runtime.Session) -> None:
    batcher = Batcher(slow.backend, Batching(max_batch=1))
    future = batcher.submit(images_of(4 * LONG), finish=rows)
    del batcher
    gc.collect()
    assert not future.done()
    assert len(future.result(30)) == 1


def test_close_in_a_callback_raises_no_error(slow: runtime.Session) -> None:
    batcher = Batcher(slow.backend, Batching(max_batch=1))
    future = batcher.submit(images_of(1000), finish=rows)
    outcome: Future[None] = Future()

    def close(done: Future[Any]) -> None:
        try:
            batcher.close()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    future.add_done_callback(close)
    assert outcome.result(5) is None


def test_the_last_requests_of_a_closed_batcher_do_not_wait_for_others(tmp_path: Path) -> None:
    with open_session(tmp_path) as session:
        batcher = Batcher(session.backend, Batching(max_batch=8, max_delay_us=60_000_000))
        future = batcher.submit(images_of(1, 2), finish=rows)
        assert batcher.stats.pending == 1
        assert batcher.stats.waiting_images == 2
        batcher.close()
        assert future.result(0) == [1, 2]
        assert batcher.stats.pending == batcher.stats.waiting_images == 0


def test_a_failed_batch_frees_its_room(tmp_path: Path) -> None:
    with open_session(tmp_path, FRAGILE, device="cpu", max_batch=2, max_queued_images=2) as session:
        for _ in range(3):
            assert isinstance(session.submit(images_of(9, 9)).exception(5), RunFailed)
        assert session.submit(images_of(0.5, 0.25)).result(5)[:, 0].tolist() == [0.5, 0.25]
        assert session.stats.batcher.waiting_images == session.stats.batcher.pending == 0


def test_a_late_request_frees_its_room_while_a_batch_runs(slow: runtime.Session) -> None:
    running = busy(slow)
    late = slow.submit(images_of(1, 2, 3, 4), timeout_s=0.02)
    assert isinstance(late.exception(5), DeadlineExceeded)
    waiting = slow.submit(images_of(5, 6, 7, 8))
    assert not running.done()
    assert waiting.result(30)[:, 0].tolist() == [5, 6, 7, 8]
    assert slow.stats.batcher.batch_sizes == {1: 5}, "late images must not run"


def test_batches_of_different_image_sizes_may_follow_each_other(tmp_path: Path) -> None:
    onnx.save(serving_model(size="h, w"), tmp_path / "open.onnx")
    batching = Batching(max_batch=2, max_delay_us=10_000_000)
    with runtime.load(tmp_path / "open.onnx", threads=1, batching=batching) as session:
        sizes = [(4, 4), (4, 4), (5, 7), (5, 7), (4, 4), (4, 4)]
        images = [np.full((1, 3, *size), number, np.float32) for number, size in enumerate(sizes)]
        futures = [session.submit(image) for image in images]
        assert [future.result(5)[0, 0] for future in futures] == list(range(6))
        assert session.stats.batcher.batch_sizes == {2: 3}


def test_threads_have_telling_names_and_do_not_keep_the_process_alive(slow: runtime.Session) -> None:
    before = set(threading.enumerate())
    slow.submit(images_of(1)).result(5)
    threads = set(threading.enumerate()) - before
    assert {thread.name for thread in threads} == {"advprop-batcher-0", "advprop-deadlines"}
    assert all(thread.daemon for thread in threads)
