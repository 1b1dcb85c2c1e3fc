from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from calib.placement import points_of
from calib.precision import to_reduced
from calib.quantize import quantize
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.errors import ModelFileError
from runtime.graph.model import open_session
from runtime.graph.rounding import rounded_file, with_roundings
from runtime.graph.summary import CALIBRATION_KEY
from runtime.system.cpu import has_exact_int8, tells_exact_int8
from tests.support.networks import classifier


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
    backend = OnnxRuntimeBackend(tmp_path / "m.onnx", device="cpu", exact=True)
    (found,) = backend._run(images)
    np.testing.assert_array_equal(found, open_session(model).run(None, {"input": images})[0])
    backend.close()


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_on_a_cpu_every_rounding_of_a_gpu_is_done(tmp_path: Path, kind: str) -> None:
    """Left to itself ONNX Runtime computes FP16 in FP32, and BF16 not at all."""
    model = classifier()
    if kind == "int8":
        model = quantize(model, points_of(model), {"input": 3.0})
    model = to_reduced(model, "bf16" if kind == "bf16" else "fp16")
    onnx.save(model, tmp_path / "m.onnx")
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    backend = OnnxRuntimeBackend(tmp_path / "m.onnx", device="cpu", exact=True)
    (found,) = backend._run(images)
    assert "FP16: rounded where a GPU rounds" in backend.reasons
    narrow = 2.0**-8 if kind == "bf16" else 2.0**-11
    (expected,) = open_session(with_roundings(model)).run(None, {"input": images})
    np.testing.assert_array_equal(found, expected)
    assert np.array_equal(found.astype(np.float16) if kind != "bf16" else found, found)
    backend.close()
    (wide,) = open_session(classifier()).run(None, {"input": images})
    assert 0 < np.abs(found - wide).max() <= (64 * narrow if kind != "int8" else 0.5) * np.abs(wide).max()


def test_an_int8_file_of_ours_is_run_as_it_is_written_by_itself(tmp_path: Path) -> None:
    """ONNX Runtime would compute its weights anew in every run: 37 ms for a ResNet-18 at 32 pixels instead of 1.4."""
    model = to_reduced(quantize(classifier(), points_of(classifier()), {"input": 3.0}), "fp16")
    model.metadata_props.add(key=CALIBRATION_KEY, value="0" * 64)
    onnx.save(model, tmp_path / "m.onnx")
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    with runtime.load(tmp_path / "m.onnx", device="cpu") as session:
        (expected,) = open_session(with_roundings(model)).run(None, {"input": images})
        np.testing.assert_array_equal(session.run(images), expected)
        assert "INT8 files are for GPUs" in session.explain()


def test_files_without_narrow_tensors_are_run_as_they_are(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "m.onnx")
    assert rounded_file(tmp_path / "m.onnx") == str(tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="no such ONNX file"):
        rounded_file(tmp_path / "none.onnx")
