from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.graphs import open_session
from calib.placement import points_of
from calib.quantize import quantize
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.cpu import has_exact_int8, tells_exact_int8
from tests.networks import classifier


@pytest.mark.parametrize(
    ("cpuinfo", "exact"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx_vnni\n", True),
        ("processor : 0\nflags\t\t: fpu avx2 avx512f\nbugs : avx_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", True),
        ("Features\t: fp asimd\n", False),
        ("", None),
    ],
)
def test_cpus_that_sum_int8_exactly(cpuinfo: str, exact: bool | None) -> None:
    assert tells_exact_int8(cpuinfo) is exact


def test_int8_as_it_is_written(tmp_path: Path) -> None:
    assert has_exact_int8() in (True, False, None)
    model = classifier()
    model = quantize(model, points_of(model), {"input": 3.0})
    onnx.save(model, tmp_path / "m.onnx")
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    backend = OnnxRuntimeBackend(tmp_path / "m.onnx", device="cpu", exact_int8=True)
    (found,) = backend._run(images)
    np.testing.assert_array_equal(found, open_session(model).run(None, {"input": images})[0])
    backend.close()
