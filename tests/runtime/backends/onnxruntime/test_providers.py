"""Which execution providers ONNX Runtime is asked for; the library is real, the GPU is said to be there or not."""

from pathlib import Path

import onnx
import onnxruntime
import pytest

import runtime
from runtime.backends.onnxruntime import providers
from runtime.backends.onnxruntime.providers import choose_providers
from runtime.errors import BackendUnavailable, ConfigError
from runtime.system.gpu import Gpu, find_gpu
from tests.support.serving_models import serving_model

ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9))
HAS_TENSORRT = "TensorrtExecutionProvider" in onnxruntime.get_available_providers()
needs_gpu_build = pytest.mark.skipif(not HAS_TENSORRT, reason="this ONNX Runtime was built without TensorRT")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
def test_tensorrt_inside_onnx_runtime_needs_a_gpu(model: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"backend='onnxruntime-tensorrt': .* use backend='onnxruntime'"):
        runtime.load(model, backend="onnxruntime-tensorrt")
    with pytest.raises(ConfigError, match="runs on a GPU only; use backend='onnxruntime' on the CPU"):
        runtime.load(model, backend="onnxruntime-tensorrt", device="cpu")


@needs_gpu_build
def test_on_a_gpu_tensorrt_comes_first_with_its_cache_and_no_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(providers, "find_gpu", lambda: ADA)
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path))
    chosen = choose_providers(onnxruntime, "auto", tensorrt=True)
    names = [name for name, _ in chosen.options]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    options = chosen.options[0][1]
    assert options["trt_engine_cache_path"] == str(tmp_path / "onnxruntime")
    assert (tmp_path / "onnxruntime").stat().st_mode & 0o077 == 0
    assert not any("fp16" in name or "int8" in name for name in options)
    plain = choose_providers(onnxruntime, "cuda", tensorrt=False)
    assert [name for name, _ in plain.options] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert chosen.device == plain.device == "cuda"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path / "file"))
    assert choose_providers(onnxruntime, "auto", tensorrt=True).options[0][1] == {}


@needs_gpu_build
@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU here")
def test_a_provider_that_cannot_start_is_told(
    monkeypatch: pytest.MonkeyPatch, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime itself goes on without it, and says so in its log only."""
    monkeypatch.setattr(providers, "find_gpu", lambda: ADA)
    with pytest.raises(BackendUnavailable, match=r"could not start its TensorRT provider.* use backend='onnxruntime'"):
        runtime.load(model, backend="onnxruntime-tensorrt")
    with pytest.raises(BackendUnavailable, match=r"could not start its CUDA provider.* use device='cpu'"):
        runtime.load(model, device="cuda")
    assert not caplog.records
    with runtime.load(model) as session:
        assert session.backend.device == "cpu"
        assert "could not start its CUDA provider" in session.explain()
    assert "Running on the CPU" in caplog.text
