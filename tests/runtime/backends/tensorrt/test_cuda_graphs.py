"""Capture and replay of CUDA graphs, on a stand-in for the GPU: see stand_in_driver.py."""

from typing import Any

import numpy as np
import pytest

from tests.support.stand_in_machine import Machine, images, means


def test_a_shape_is_launched_then_captured_then_replayed() -> None:
    machine = Machine(contexts=1)
    # The optimal and the largest batch are captured in their own contexts.
    assert machine.trt.contexts == 3
    found = []
    for number in range(4):
        batch = images(2, seed=number)
        np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
        found.append((machine.trt.contexts, machine.count("cuStreamBeginCapture"), machine.count("cuGraphLaunch")))
    assert found == [(3, 0, 0), (4, 1, 0), (4, 1, 1), (4, 1, 2)]
    machine.backend.run(images(8))
    assert machine.count("cuGraphLaunch") == 3
    machine.backend.close()


def test_the_number_of_graphs_is_limited_and_tensorrt_rtx_manages_its_own() -> None:
    machine = Machine(max_graphs=4, contexts=1)
    for count in (1, 2, 3, 5, 6) * 3:
        machine.backend.run(images(count))
    assert (machine.count("cuGraphInstantiate"), machine.trt.contexts) == (2, 5)
    machine.backend.close()
    for graphs in (True, False):
        machine = Machine(flavor="tensorrt_rtx", cuda_graphs=graphs, contexts=1)
        (config,) = machine.trt.runtime_configs
        assert config.cuda_graph_strategy.name == ("WHOLE_GRAPH_CAPTURE" if graphs else "DISABLED")
        for _ in range(3):
            machine.backend.run(images(2))
        assert (machine.count("cuStreamBeginCapture"), machine.trt.contexts) == (0, 1)
        machine.backend.close()


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"no_capture": True}, {}),
        ({"most_contexts": 3}, {}),
        ({}, {"cuStreamBeginCapture": 900}),
        ({}, {"cuStreamEndCapture": 901}),
        ({}, {"cuGraphInstantiate": 901}),
    ],
)
def test_shapes_that_cannot_be_captured_run_without_a_graph(
    changes: dict[str, Any], fails: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(changes=changes, contexts=1)
    machine.driver.fails = fails
    caplog.clear()
    for number in range(4):
        batch = images(2, seed=number)
        np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
    assert machine.count("cuGraphLaunch") == 0
    machine.driver.fails = {}
    machine.backend.close()
    assert len(caplog.records) == 1  # one warning per shape
    assert "CUDA graph" in caplog.text


def test_memory_is_not_freed_during_a_capture() -> None:
    """Garbage collection may run at any time, and freeing would invalidate the capture."""
    machine = Machine()
    kept = list(machine.on_gpu(images(1)))
    held = machine.cuda.allocated_bytes
    with machine.cuda.current():
        stream = machine.cuda.stream()
        graph = machine.cuda.capture(stream, kept.clear)
        assert machine.cuda.allocated_bytes == held - images(1).nbytes
        assert machine.count("cuMemFree") == 1
        machine.cuda.close_graph(graph)
        machine.cuda.close_stream(stream)
    machine.backend.close()
