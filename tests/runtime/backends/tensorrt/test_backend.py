"""What `TensorRTBackend` does with a GPU, on a stand-in for the GPU and for TensorRT: see stand_in_driver.py and
stand_in_tensorrt.py.

Whether the real ones do what the stand-in does can only be seen on a GPU: benchmarks/gpu/runtime.py.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.errors import InputError
from tests.runtime.device.test_arrays import Exporter, Interface
from tests.support.serving_models import images_of
from tests.support.stand_in_machine import Machine, images, means


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"most_graphs": 1}])
@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_every_batch_gets_its_own_answers(flavor: str, options: dict[str, Any]) -> None:
    machine = Machine(flavor=flavor, **options)
    for number in range(4):
        for count in (1, 3, 8, 9, 20):
            batch = images(count, seed=number)
            np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
    machine.backend.close()
    gc.collect()
    assert (machine.driver.used, machine.driver.graphs, list(machine.driver.streams)) == (0, {}, [1])


def test_profiles_are_chosen_and_padded_by_the_batch() -> None:
    sizes = [((1, 3, 4, 4),) * 3, ((4, 3, 4, 4), (8, 3, 4, 4), (8, 3, 4, 4)), ((2, 3, 6, 6),) * 3]
    machine = Machine(sizes)
    assert machine.backend.batch_range == (1, 8)
    assert machine.backend.input.shape == (-1, 3, -1, -1)
    for count in (1, 2, 3, 4, 8, 9, 17):
        batch = images(count)
        np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
    choose = machine.backend._engine.profiles.choose
    assert choose((1, 3, 4, 4)) == (0, (1, 3, 4, 4))
    assert choose((2, 3, 4, 4)) == (1, (4, 3, 4, 4))
    assert choose((1, 3, 6, 6)) == (2, (2, 3, 6, 6))
    with pytest.raises(
        InputError, match=r"takes no batch of shape \(1, 3, 5, 5\); its profiles take \(1, 3, 4, 4\) or"
    ):
        machine.backend.run(np.zeros((1, 3, 5, 5), np.float32))
    machine.backend.close()


def test_input_on_the_gpu_is_read_where_it_lies() -> None:
    machine = Machine()
    batch = images(11)
    view, _memory = machine.on_gpu(batch)
    machine.driver.counts.clear()
    owner = Interface(shape=view.shape, data=(view.pointer, True))
    np.testing.assert_array_equal(machine.backend.run(owner)[0], means(batch))
    assert (machine.count("cuMemcpyHtoDAsync"), machine.count("cuMemcpyDtoDAsync")) == (0, 0)
    assert machine.count("cuEventRecord") == 0  # version 3, no stream: nothing to wait for
    machine.backend.close()


@pytest.mark.parametrize("count", [2, 4, 7])
def test_input_on_the_gpu_that_is_padded_is_copied_there(count: int) -> None:
    machine = Machine([((4, 3, 4, 4),) * 3])
    batch = images(count)
    view, _memory = machine.on_gpu(batch)
    owner = Exporter(view.shape, view.pointer)
    np.testing.assert_array_equal(machine.backend.run(owner)[0], means(batch))
    assert len(owner.streams) == 1 + -(-count // 4)  # looked at, then ordered for each part
    assert machine.count("cuMemcpyDtoDAsync") == (count % 4 > 0)
    (answers,) = machine.backend.run_on_device(owner)
    np.testing.assert_array_equal(answers.numpy(), means(batch))
    machine.backend.close()


def test_slices_that_tensorrt_does_not_take_are_copied_on_the_gpu() -> None:
    machine = Machine()
    batch = images(8)
    view, _memory = machine.on_gpu(batch)
    for start in (0, 1, 4):  # an image has 192 bytes
        machine.driver.counts.clear()
        owner = Exporter((4, 3, 4, 4), view.pointer + start * 192)
        np.testing.assert_array_equal(machine.backend.run(owner)[0], means(batch[start : start + 4]))
        assert machine.count("cuMemcpyDtoDAsync") == (start == 1)
    machine.backend.close()


def test_work_on_the_callers_stream_is_waited_for() -> None:
    machine = Machine()
    batch = images(2)
    view, _memory = machine.on_gpu(np.zeros_like(batch))
    with machine.cuda.current():
        own = machine.cuda.stream()
    for how in ({"stream": own}, {"stream": None}, {"version": 2}):
        with machine.cuda.current():
            machine.cuda.copy_to_device(view.pointer, batch, 1 if "version" in how else own)  # not done yet
        owner = Interface(shape=view.shape, data=(view.pointer, False), **how)
        (found,) = machine.backend.run(owner, stream=own if how == {"stream": None} else None)
        np.testing.assert_array_equal(found, means(batch))
        batch = batch + 1
    machine.backend.close()


def test_outputs_stay_on_the_gpu_and_outlive_the_session() -> None:
    machine = Machine()
    session = runtime.Session(machine.backend, Path("m.engine"))
    batch = images(19)
    view, memory = machine.on_gpu(batch)
    machine.driver.counts.clear()
    for source in (batch, Interface(shape=view.shape, data=(view.pointer, False))):
        answers = session.run_on_device(source)["logits"]
        assert (answers.shape, answers.dtype) == ((19, 3), np.float32)
        assert machine.count("cuMemcpyDtoHAsync") == 0
    assert session.stats.images == 38
    assert session.stats.device_bytes == machine.driver.used > 0
    session.close()
    del session
    machine.backend = None
    gc.collect()
    np.testing.assert_array_equal(answers.numpy(), means(batch))
    again = Interface(**answers.__cuda_array_interface__)
    assert again.__cuda_array_interface__["data"][0] == answers.pointer
    del answers, view, memory
    gc.collect()
    assert machine.driver.used == 0


def test_addresses_that_are_not_the_gpus_are_refused() -> None:
    machine = Machine()
    batch = images(2)
    for ask in (machine.backend.run, machine.backend.run_on_device):
        with pytest.raises(InputError, match="address is no memory that CUDA knows; expected memory of GPU 0"):
            ask(Interface(shape=batch.shape, data=(batch.ctypes.data, False)))
    machine.backend.close()


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_share_a_bounded_number_of_contexts(contexts: int) -> None:
    machine = Machine(contexts=contexts, cuda_graphs=False)
    began = threading.Barrier(8)

    def ask(thread: int) -> None:
        began.wait()
        for number in range(40):
            batch = images(1 + (thread + number) % 9, seed=thread * 100 + number)
            np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(ask, thread) for thread in range(8)]:
            done.result()
    assert machine.trt.contexts == contexts
    machine.backend.close()


def test_a_session_on_an_engine_predicts_and_joins_requests() -> None:
    machine = Machine()
    with runtime.Session(machine.backend, Path("m.engine")) as session:
        answers = session.predict([np.full((4, 4, 3), (0, 200, 0), np.uint8)] * 3)
        assert [answer.label for answer in answers] == ["green"] * 3
        futures = [session.submit(images_of(float(number))) for number in range(40)]
        assert [future.result()[0, 0] for future in futures] == list(range(40))
        view, _memory = machine.on_gpu(images(1))
        with pytest.raises(InputError, match="requests are joined in the CPU's memory"):
            session.submit(Interface(shape=view.shape, data=(view.pointer, False)))
        explained = session.explain()
    assert "batches: (1…8, 3, 4, 4); larger ones are split" in explained
    assert "contexts: 2, with about" in explained
