import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.errors import SessionClosed
from runtime.system.calls import CallTracker, in_worker_thread, mark_worker_thread


def test_calls_are_counted_by_how_they_end() -> None:
    tracker = CallTracker("the model")
    with tracker.track() as call:
        assert tracker.in_flight == 1
        call.images = 7
    with pytest.raises(LookupError), tracker.track() as call:
        call.images = 5
        raise LookupError
    assert (tracker.in_flight, tracker.completed, tracker.images, tracker.failed) == (0, 1, 7, 1)


def test_close_waits_for_calls_in_flight_and_refuses_new_ones() -> None:
    tracker = CallTracker("the model")
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with tracker.track():
            entered.set()
            leave.wait(5)

    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(call)
        entered.wait(5)
        closing = threads.submit(tracker.close)
        while not tracker.closed:
            pass
        with pytest.raises(SessionClosed, match="the model is closed; load it again"), tracker.track():
            pass
        assert not closing.done()
        leave.set()
        assert closing.result(5) is True
        running.result(5)
    assert tracker.close() is False
    assert (tracker.completed, tracker.failed) == (1, 0)


def test_only_marked_threads_are_workers() -> None:
    with ThreadPoolExecutor(1, initializer=mark_worker_thread) as workers:
        assert workers.submit(in_worker_thread).result(5)
    assert not in_worker_thread()
