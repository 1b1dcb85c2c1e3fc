"""Engines on the stand-in for a GPU: their times, and unchanged outputs."""

from pathlib import Path

import numpy as np
import pytest

from runtime.bench.run import Bench, BenchConfig
from runtime.bench.targets import EVENTS, on_gpu, session_target
from runtime.session import Session
from tests.support.stand_in_machine import Machine, images, means


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("flavor", ["tensorrt", "tensorrt_rtx"])
def test_times_are_measured_by_events(flavor: str, graphs: bool) -> None:
    machine = Machine(flavor=flavor, cuda_graphs=graphs)
    for count in (1, 3, 8, 8, 8):
        batch = images(count)
        times = machine.backend.device_times(batch)
        assert times is not None
        # The stand-in counts steps: one copy, one network, one copy.
        assert (times.h2d_ms, times.compute_ms, times.d2h_ms, times.latency_ms) == (1, 1, 1, 3)
        assert times.enqueue_ms > 0
        np.testing.assert_array_equal(machine.backend.run(batch)[0], means(batch))
    recorded = machine.count("cuEventRecord")
    machine.backend.run(images(2))
    assert machine.count("cuEventRecord") == recorded  # a run without measurement records nothing
    machine.backend.close()
    assert (
        machine.count("cuEventDestroy") == machine.count("cuEventCreate") + 2
    )  # including those of the two slots, which existed before


def test_a_batch_on_the_gpu() -> None:
    """It is the input for ONNX Runtime's CUDA provider, which does not report its own times."""
    machine = Machine()
    batch = images(5)
    resident = on_gpu(batch, machine.cuda)
    for _ in range(2):
        (left,) = machine.backend.run_on_device(resident)
        np.testing.assert_array_equal(left.numpy(), means(batch))
    assert machine.count("cuMemcpyHtoDAsync") == 1
    machine.backend.close()


def test_an_engine_is_a_target() -> None:
    machine = Machine()
    session = Session(machine.backend, Path("m.engine"))
    target = session_target("m", session, {"kind": "engine", "sha256": "ab"}, (4, 4))
    assert (target.most_images, target.fixed_batch, target.facts["clock"]) == (8, None, EVENTS)
    bench = Bench([target], BenchConfig(concurrency=(1, 2), warm_up_ms=0, duration_s=0, iterations=2, rounds=2))
    assert bench.batch_sizes == (1, 8)
    bench.measure()
    found = bench.points[0].content["quantities"]
    assert list(found) == [
        *("end_to_end", "compute", "h2d", "d2h", "enqueue", "latency"),
        *("predict", "decode", "transform", "run"),
    ]
    assert {name for name in found if found[name]["clock"] == EVENTS} == {"compute", "h2d", "d2h", "latency"}
    target.close()
