"""`OnnxRuntimeBackend` with reduced-precision files on a CPU."""

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
from tests.support.networks import classifier

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)


def test_exact_runs_quantized_nodes_in_floating_point(tmp_path: Path) -> None:
    model = classifier()
    model = quantize(model, points_of(model), {"input": 3.0})
    onnx.save(model, tmp_path / "m.onnx")
    backend = OnnxRuntimeBackend(tmp_path / "m.onnx", device="cpu", exact=True)
    (found,) = backend.run(IMAGES)
    np.testing.assert_array_equal(found, open_session(model).run(None, {"input": IMAGES})[0])
    assert "INT8: computed in floating point" in backend.reasons
    backend.close()


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_exact_rounds_every_tensor_like_a_gpu(tmp_path: Path, kind: str) -> None:
    """By itself, ONNX Runtime computes FP16 in FP32, and does not support BF16."""
    model = classifier()
    if kind == "int8":
        model = quantize(model, points_of(model), {"input": 3.0})
    model = to_reduced(model, "bf16" if kind == "bf16" else "fp16")
    onnx.save(model, tmp_path / "m.onnx")
    backend = OnnxRuntimeBackend(tmp_path / "m.onnx", device="cpu", exact=True)
    (found,) = backend.run(IMAGES)
    assert "FP16: rounded as on a GPU" in backend.reasons
    narrow = 2.0**-8 if kind == "bf16" else 2.0**-11
    (expected,) = open_session(with_roundings(model)).run(None, {"input": IMAGES})
    np.testing.assert_array_equal(found, expected)
    assert np.array_equal(found.astype(np.float16) if kind != "bf16" else found, found)
    backend.close()
    (wide,) = open_session(classifier()).run(None, {"input": IMAGES})
    assert 0 < np.abs(found - wide).max() <= (64 * narrow if kind != "int8" else 0.5) * np.abs(wide).max()


def test_calibrated_int8_files_run_in_floating_point_by_default(tmp_path: Path) -> None:
    """Otherwise ONNX Runtime would dequantize the weights in every run, which is far slower."""
    model = to_reduced(quantize(classifier(), points_of(classifier()), {"input": 3.0}), "fp16")
    model.metadata_props.add(key=CALIBRATION_KEY, value="0" * 64)
    onnx.save(model, tmp_path / "m.onnx")
    with runtime.load(tmp_path / "m.onnx", device="cpu") as session:
        (expected,) = open_session(with_roundings(model)).run(None, {"input": IMAGES})
        np.testing.assert_array_equal(session.run(IMAGES), expected)
        assert "INT8 files are for GPUs" in session.explain()


def test_files_without_reduced_precision_are_not_rewritten(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "m.onnx")
    assert rounded_file(tmp_path / "m.onnx") == str(tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="no such ONNX file"):
        rounded_file(tmp_path / "none.onnx")


def test_bf16_files_are_rejected_with_advice(tmp_path: Path) -> None:
    onnx.save(to_reduced(classifier(), "bf16"), tmp_path / "m.onnx")
    with pytest.raises(
        ModelFileError, match=r"cannot run .*m\.onnx on the cpu: .*BF16 files are for TensorRT"
    ) as error:
        runtime.load(tmp_path / "m.onnx", device="cpu")
    assert f"advprop build {tmp_path / 'm.onnx'}" in error.value.fix
