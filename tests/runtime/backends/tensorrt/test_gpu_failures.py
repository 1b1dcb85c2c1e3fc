"""Failures of the GPU or TensorRT, on stand-ins: see tests/support/stand_in_*.py."""

import gc
import os
from typing import Any

import numpy as np
import pytest

from runtime.device.driver import Cuda
from runtime.errors import BackendUnavailable, InputError, ModelFileError, RunFailed
from tests.support.stand_in_driver import StandInDriver
from tests.support.stand_in_machine import Machine, images, means


def test_out_of_memory_reports_requested_and_free_bytes() -> None:
    with pytest.raises(
        RunFailed, match=r"out of memory: requested a context for batches of up to 8 images, 1,536 bytes"
    ):
        Machine(total=1000)
    with pytest.raises(RunFailed, match=r"of 4,000 bytes are free; use smaller batches .* fewer contexts"):
        Machine(total=4000, contexts=2)  # one fits, two do not
    machine = Machine(total=4000, contexts=1)
    with pytest.raises(RunFailed, match=r"out of memory: requested logits of 1000 images, 12,000 bytes, "):
        machine.backend.run_on_device(images(1000))
    np.testing.assert_array_equal(machine.backend.run(images(1000))[0], means(images(1000)))
    machine.backend.close()
    gc.collect()
    assert machine.driver.used == 0


@pytest.mark.parametrize("call", ["cuMemAlloc", "cuMemHostAlloc", "cuEventCreate", "cuStreamSynchronize"])
def test_resources_are_freed_after_a_failure(call: str) -> None:
    driver = StandInDriver()
    driver.fails = {call: 2}
    with pytest.raises(RunFailed, match="memory: requested"):
        Machine(driver=driver)
    gc.collect()
    assert (driver.used, driver.memory, driver.events) == (0, {}, {})
    assert list(driver.streams) == [1]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_rejected_before_it_uses_the_gpu() -> None:
    machine = Machine()
    child = os.fork()
    if child == 0:
        try:
            machine.backend.run(images(1))
        except InputError as error:
            os._exit(7 if "is a fork" in str(error) and not machine.driver.counts else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    machine.backend.close()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"plan": b"refused"}, r"cannot load m\.engine: it was built for another GPU \(Target GPU SM mismatch"),
        ({"changes": {"outputs": ("a", "b")}}, "1 inputs and 2 outputs, expected 1 and 1"),
        ({"changes": {"dtype": "BF16"}}, "the input 'input' of m.engine is BF16"),
    ],
)
def test_engines_that_are_not_classifiers_are_rejected(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelFileError, match=expected):
        Machine(**given)


def test_an_unexpected_output_shape_is_rejected() -> None:
    with pytest.raises(RunFailed, match=r"returns logits of shape \(1, 3\) for images of shape \(4, 3, 4, 4\)"):
        Machine(changes={"output_shape": (1, 3)})


def test_the_slot_is_returned_after_a_gpu_failure() -> None:
    machine = Machine(contexts=1)
    machine.driver.fails = {"cuStreamSynchronize": 700}
    with pytest.raises(
        RunFailed, match=r"cuStreamSynchronize failed: .*illegal memory .*can no longer use the GPU; restart it"
    ):
        machine.backend.run(images(1))
    machine.driver.fails = {}
    np.testing.assert_array_equal(machine.backend.run(images(1))[0], means(images(1)))
    machine.backend.close()


@pytest.mark.parametrize(
    ("name", "code", "error", "expected"),
    [
        ("cuInit", 100, BackendUnavailable, "CUDA cannot be used: some error"),
        ("cuInit", 3, InputError, "start processes with the spawn method"),
        ("cuDevicePrimaryCtxRetain", 2, RunFailed, "out of memory"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_reported(name: str, code: int, error: type[Exception], expected: str) -> None:
    driver = StandInDriver()
    driver.fails = {name: code}
    with pytest.raises(error, match=expected):
        Cuda(driver)
