"""The choice of execution providers, with the real ONNX Runtime and a pretended GPU."""

from pathlib import Path

import onnx
import onnxruntime
import pytest

import runtime
from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
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


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_tensorrt_inside_onnx_runtime_needs_a_gpu(model: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"backend='onnxruntime-tensorrt': .*; use backend='onnxruntime'"):
        runtime.load(model, backend="onnxruntime-tensorrt")
    with pytest.raises(ConfigError, match="runs on a GPU only; use backend='onnxruntime'"):
        runtime.load(model, backend="onnxruntime-tensorrt", device="cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_without_a_gpu_the_cpu_is_used_unless_cuda_is_required(device: str) -> None:
    if device == "cuda":
        with pytest.raises(BackendUnavailable, match=r"device='cuda': .*; use device='cpu' or 'auto'"):
            choose_providers(onnxruntime, device, None, tensorrt=False)
    else:
        chosen = choose_providers(onnxruntime, device, None, tensorrt=False)
        assert chosen.device == "cpu"
        assert [name for name, _ in chosen.options] == ["CPUExecutionProvider"]


@needs_gpu_build
def test_tensorrt_is_the_first_provider_with_a_private_cache_and_no_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path))
    chosen = choose_providers(onnxruntime, "auto", ADA, tensorrt=True)
    names = [name for name, _ in chosen.options]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    options = chosen.options[0][1]
    assert options["trt_engine_cache_path"] == str(tmp_path / "onnxruntime")
    assert (tmp_path / "onnxruntime").stat().st_mode & 0o077 == 0
    assert not any("fp16" in name or "int8" in name for name in options)
    plain = choose_providers(onnxruntime, "cuda", ADA, tensorrt=False)
    assert [name for name, _ in plain.options] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert chosen.device == plain.device == "cuda"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path / "file"))
    assert choose_providers(onnxruntime, "auto", ADA, tensorrt=True).options[0][1] == {}


@needs_gpu_build
@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_a_provider_that_does_not_start_is_an_error_or_falls_back_to_the_cpu(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime itself continues without the provider, and reports it in its log only."""

    def load(device: str = "auto", *, tensorrt: bool = False) -> OnnxRuntimeBackend:
        return OnnxRuntimeBackend(model, device, tensorrt=tensorrt, detect_gpu=lambda: ADA)

    with pytest.raises(BackendUnavailable, match=r"could not start its TensorRT provider.* use backend='onnxruntime'"):
        load(tensorrt=True)
    with pytest.raises(BackendUnavailable, match=r"could not start its CUDA provider.* use device='cpu'"):
        load("cuda")
    assert not caplog.records
    with runtime.Session(load(), model) as session:
        assert session.backend.device == "cpu"
        assert "device: cpu, because ONNX Runtime could not start its CUDA provider" in session.explain()
    assert "Running on the CPU" in caplog.text
