"""`TensorRTBackend` on stand-ins for the GPU and TensorRT: see tests/support/stand_in_*.py.

Only a GPU shows whether the real ones behave like the stand-ins: benchmarks/gpu/runtime.py.
"""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.backends.tensorrt.profiles import Profile, Profiles
from runtime.errors import InputError
from tests.support.gpu_arrays import Exporter, Interface
from tests.support.serving_models import images_of
from tests.support.stand_in_machine import Machine, images, means


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"max_graphs": 1}])
@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_every_batch_gets_its_own_outputs(flavor: str, options: dict[str, Any]) -> None:
    machine = Machine(flavor=flavor, **options)
    for number in range(4):
        for count in (1, 3, 8, 9, 20):
            batch = images(count, seed=number)
            np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
    machine.backend.close()
    gc.collect()
    assert (machine.driver.used, machine.driver.graphs, list(machine.driver.streams)) == (0, {}, [1])


def test_a_batch_is_padded_to_a_matching_profile() -> None:
    sizes = [((1, 3, 4, 4),) * 3, ((4, 3, 4, 4), (8, 3, 4, 4), (8, 3, 4, 4)), ((2, 3, 6, 6),) * 3]
    machine = Machine(sizes)
    assert machine.backend.batch_range == (1, 8)
    assert machine.backend.input.shape == (-1, 3, -1, -1)
    for count in (1, 2, 3, 4, 8, 9, 17):
        batch = images(count)
        np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
    choose = Profiles([Profile(*shapes) for shapes in sizes]).choose
    assert choose((1, 3, 4, 4)) == (0, (1, 3, 4, 4))
    assert choose((2, 3, 4, 4)) == (1, (4, 3, 4, 4))
    assert choose((1, 3, 6, 6)) == (2, (2, 3, 6, 6))
    message = r"does not accept a batch of shape \(1, 3, 5, 5\); its profiles accept \(1, 3, 4, 4\) or"
    with pytest.raises(InputError, match=message):
        machine.backend.run(np.zeros((1, 3, 5, 5), np.float32))
    machine.backend.close()


def test_gpu_input_is_read_in_place() -> None:
    machine = Machine()
    batch = images(11)
    view, _memory = machine.on_gpu(batch)
    machine.driver.counts.clear()
    owner = Interface(shape=view.shape, data=(view.pointer, True))
    np.testing.assert_array_equal(machine.backend.run(owner)[0], means(batch))
    assert (machine.count("cuMemcpyHtoDAsync"), machine.count("cuMemcpyDtoDAsync")) == (0, 0)
    # Version 3 without a stream: there is nothing to wait for.
    assert machine.count("cuEventRecord") == 0
    machine.backend.close()


@pytest.mark.parametrize("count", [2, 4, 7])
def test_padded_gpu_input_is_copied_on_the_gpu(count: int) -> None:
    machine = Machine([((4, 3, 4, 4),) * 3])
    batch = images(count)
    view, _memory = machine.on_gpu(batch)
    owner = Exporter(view.shape, view.pointer)
    np.testing.assert_array_equal(machine.backend.run(owner)[0], means(batch))
    assert len(owner.streams) == 1 + -(-count // 4)  # read once, then synchronized for each part
    assert machine.count("cuMemcpyDtoDAsync") == (count % 4 > 0)
    (output,) = machine.backend.run_on_device(owner)
    np.testing.assert_array_equal(output.numpy(), means(batch))
    machine.backend.close()


def test_unaligned_slices_are_copied_on_the_gpu() -> None:
    machine = Machine()
    batch = images(8)
    view, _memory = machine.on_gpu(batch)
    for start in (0, 1, 4):  # an image has 192 bytes
        machine.driver.counts.clear()
        owner = Exporter((4, 3, 4, 4), view.pointer + start * 192)
        np.testing.assert_array_equal(machine.backend.run(owner)[0], means(batch[start : start + 4]))
        assert machine.count("cuMemcpyDtoDAsync") == (start == 1)
    machine.backend.close()


def test_pending_work_on_the_callers_stream_completes_first() -> None:
    machine = Machine()
    batch = images(2)
    view, _memory = machine.on_gpu(np.zeros_like(batch))
    with machine.cuda.current():
        own = machine.cuda.stream()
    for how in ({"stream": own}, {"stream": None}, {"version": 2}):
        with machine.cuda.current():
            # The copy is still pending when the batch runs.
            machine.cuda.copy_to_device(view.pointer, batch, 1 if "version" in how else own)
        owner = Interface(shape=view.shape, data=(view.pointer, False), **how)
        (found,) = machine.backend.run(owner, stream=own if how == {"stream": None} else None)
        np.testing.assert_array_equal(found, means(batch))
        batch = batch + 1
    machine.backend.close()


def test_gpu_outputs_outlive_the_session() -> None:
    machine = Machine()
    session = runtime.Session(machine.backend, Path("m.engine"))
    batch = images(19)
    view, memory = machine.on_gpu(batch)
    machine.driver.counts.clear()
    for source in (batch, Interface(shape=view.shape, data=(view.pointer, False))):
        output = session.run_on_device(source)["logits"]
        assert (output.shape, output.dtype) == ((19, 3), np.dtype(np.float32))
        assert machine.count("cuMemcpyDtoHAsync") == 0
    assert session.stats.images == 38
    assert session.stats.device_bytes == machine.driver.used > 0
    session.close()
    del session, machine.backend
    gc.collect()
    np.testing.assert_array_equal(output.numpy(), means(batch))
    again = Interface(**output.__cuda_array_interface__)
    assert again.__cuda_array_interface__["data"][0] == output.pointer
    del output, view, memory
    gc.collect()
    assert machine.driver.used == 0


def test_addresses_outside_gpu_memory_are_rejected() -> None:
    machine = Machine()
    batch = images(2)
    for call in (machine.backend.run, machine.backend.run_on_device):
        with pytest.raises(InputError, match="address is in memory unknown to CUDA; expected memory of GPU 0"):
            call(Interface(shape=batch.shape, data=(batch.ctypes.data, False)))
    machine.backend.close()


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_share_the_contexts(contexts: int) -> None:
    machine = Machine(contexts=contexts, cuda_graphs=False)
    start = threading.Barrier(8)

    def run(thread: int) -> None:
        start.wait()
        for number in range(40):
            batch = images(1 + (thread + number) % 9, seed=thread * 100 + number)
            np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(run, thread) for thread in range(8)]:
            done.result()
    assert machine.trt.contexts == contexts
    machine.backend.close()


def test_a_session_predicts_and_joins_requests() -> None:
    machine = Machine()
    with runtime.Session(machine.backend, Path("m.engine")) as session:
        predictions = session.predict([np.full((4, 4, 3), (0, 200, 0), np.uint8)] * 3)
        assert [prediction.label for prediction in predictions] == ["green"] * 3
        futures = [session.submit(images_of(float(number))) for number in range(40)]
        assert [future.result()[0, 0] for future in futures] == list(range(40))
        view, _memory = machine.on_gpu(images(1))
        with pytest.raises(InputError, match="requests are joined in CPU memory; use run"):
            session.submit(Interface(shape=view.shape, data=(view.pointer, False)))
        explained = session.explain()
    assert "batches: (1…8, 3, 4, 4); larger ones are split" in explained
    assert "contexts: 2, with about" in explained
