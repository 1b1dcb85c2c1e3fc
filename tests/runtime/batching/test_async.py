"""Sessions under asyncio."""

import asyncio
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import runtime
from runtime.errors import DataError, DeadlineExceeded, InputError, QueueFull, SessionClosed, SpecError
from runtime.system.decode import ImageLike
from tests.support.serving_models import LONG, SLOW, images_of, open_session, serving_model

COLORS = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 90)}


def png(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 5), COLORS[name]).save(file, "PNG")
    return file.getvalue()


def test_many_tasks_share_a_few_threads(tmp_path: Path) -> None:
    async def main() -> None:
        before = threading.active_count()
        waiting = [asyncio.create_task(session.arun(images_of(*range(number % 5 + 1)))) for number in range(1000)]
        await asyncio.sleep(0)
        assert threading.active_count() <= before + 2
        for number, output in enumerate(await asyncio.gather(*waiting)):
            assert output[:, 0].tolist() == list(range(number % 5 + 1))

    with open_session(tmp_path, max_queued_images=3000) as session:
        asyncio.run(main())
        assert session.stats.batcher.answered == 1000
        assert session.stats.batcher.mean_batch > 2


def test_predictions_belong_to_their_images(tmp_path: Path) -> None:
    async def main() -> None:
        names = list(COLORS) * 50
        results = await asyncio.gather(*(session.apredict([png(name), png("red")]) for name in names))
        assert [[prediction.label for prediction in pair] for pair in results] == [[name, "red"] for name in names]
        (expected,), ((found, _), *_) = session.predict([png("red")]), results
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)

    with open_session(tmp_path, max_queued_images=300) as session:
        asyncio.run(main())


def test_an_undecodable_image_fails_only_its_request(tmp_path: Path) -> None:
    async def main() -> None:
        requests: list[list[ImageLike]] = [
            [png("red")],
            [png("green"), b"no image"],
            [png("blue")],
            [tmp_path / "none.png"],
        ]
        red, broken, blue, missing = await asyncio.gather(
            *(session.apredict(request) for request in requests), return_exceptions=True
        )
        assert not isinstance(red, BaseException) and not isinstance(blue, BaseException)
        assert [red[0].label, blue[0].label] == ["red", "blue"]
        assert isinstance(broken, DataError)
        assert "cannot decode the image" in str(broken)
        assert isinstance(missing, DataError)

    with open_session(tmp_path) as session:
        asyncio.run(main())
        assert (session.stats.batcher.answered, session.stats.batcher.failed) == (2, 2)


def test_invalid_requests_are_rejected_at_once(tmp_path: Path) -> None:
    single: Any = b"bytes"
    with open_session(tmp_path) as session:
        with pytest.raises(InputError, match=r"put a single image in a list: \[image\]"):
            session.submit_predict(single)
        with pytest.raises(InputError, match="no images; expected at least one"):
            session.submit_predict([])
    with pytest.raises(SessionClosed, match="load it again"):
        session.submit_predict([png("red")])
    plain = serving_model()
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    with runtime.load(tmp_path / "plain.onnx") as session, pytest.raises(SpecError, match=r"has no advprop\.spec"):
        session.submit_predict([png("red")])


def test_cancelling_a_task_cancels_its_request(tmp_path: Path) -> None:
    async def main() -> None:
        long = asyncio.create_task(session.arun(images_of(LONG)))
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(session.arun(images_of(1))) for _ in range(20)]
        tasks += [asyncio.create_task(session.apredict([png("red")])) for _ in range(20)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False] * 20
        await long

    with open_session(tmp_path, SLOW, max_batch=1) as session:
        asyncio.run(main())
        stats = session.stats.batcher
        assert (stats.answered, stats.cancelled, stats.pending) == (21, 20, 0)
        assert stats.batch_sizes == {1: 21}, "cancelled requests must not run"


def test_expired_deadlines_are_errors(tmp_path: Path) -> None:
    async def main() -> None:
        long = asyncio.create_task(session.arun(images_of(LONG)))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded):
            await session.arun(images_of(1), timeout_s=0.01)
        with pytest.raises(DeadlineExceeded):
            await session.apredict([png("red")], timeout_s=0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.arun(images_of(1)), 0.01)  # asyncio's own: it cancels
        assert not long.done()
        await long

    with open_session(tmp_path, SLOW, max_batch=1) as session:
        asyncio.run(main())
        stats = session.stats.batcher
        assert (stats.answered, stats.cancelled, stats.late) == (1, 1, 2)


def test_a_request_takes_its_place_before_its_images_are_decoded(tmp_path: Path) -> None:
    async def main() -> None:
        results = await asyncio.gather(*(session.apredict([png("green")]) for _ in range(50)), return_exceptions=True)
        assert sum(isinstance(result, QueueFull) for result in results) == 46
        assert sum(not isinstance(result, Exception) for result in results) == 4

    with open_session(tmp_path, max_queued_images=4, max_batch=8, max_delay_us=300_000) as session:
        asyncio.run(main())


def test_close_with_pending_predictions(tmp_path: Path) -> None:
    session = open_session(tmp_path, SLOW, max_batch=1)
    session.submit(images_of(LONG))
    futures = [session.submit_predict([png("blue")]) for _ in range(30)]
    session.close()
    assert [future.result(0)[0].label for future in futures] == ["blue"] * 30

    session = open_session(tmp_path, SLOW, max_batch=1)
    futures = [session.submit_predict([png("blue")] * 8) for _ in range(30)]
    session.close(drain=False)
    assert all(future.done() for future in futures)
    stats = session.stats.batcher
    assert stats.answered + stats.failed == 30


def test_close_in_the_callback_of_a_failed_image(tmp_path: Path) -> None:
    """The callback runs in a decoding thread, which must not wait for itself."""
    session = open_session(tmp_path, decode_threads=1, max_delay_us=10_000_000)
    waits = session.submit_predict([png("red")])
    bad = session.submit_predict([b"no image"] * 3)
    bad.add_done_callback(lambda done: session.close())
    assert isinstance(bad.exception(5), DataError)
    assert waits.result(5)[0].label == "red"
    with pytest.raises(SessionClosed):
        session.submit_predict([png("red")])
