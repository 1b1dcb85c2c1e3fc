"""Which execution providers ONNX Runtime runs a file with, and what is wrong where one cannot be started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import BackendUnavailable, ConfigError
from runtime.system.files import cache_folder
from runtime.system.gpu import find_gpu

__all__ = ["Providers", "choose_providers"]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_INSTALL = {
    _CUDA: "ONNX Runtime could not start its CUDA provider, most often because its CUDA or cuDNN libraries were not "
    "found; pip install 'onnxruntime-gpu[cuda,cudnn]'",
    _TENSORRT: "ONNX Runtime could not start its TensorRT provider, most often because libnvinfer of the release that "
    "it was built with was not found; pip install 'advprop[tensorrt]', or see ONNX Runtime's table of releases",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Providers:
    """What is asked of ONNX Runtime."""

    device: str
    """`cpu` or `cuda`."""
    why: str
    """In words."""
    wanted: str
    """The provider that is to do the work; the others take what it leaves."""
    options: tuple[tuple[str, dict[str, str]], ...]
    """Names and options, first choice first."""

    def missing(self, session: Any) -> str:
        """Returns what is wrong, and how it is mended, where `session` has done without the wanted one; else ""."""
        return "" if self.wanted in session.get_providers() else _INSTALL[self.wanted]


def choose_providers(ort: Any, device: str, *, tensorrt: bool) -> Providers:
    """Chooses the providers.

    Args:
        ort: the module.
        device: `auto`, `cpu` or `cuda`.
        tensorrt: run by TensorRT inside ONNX Runtime. It builds an engine at the first run, of the precision that is
            in the file, and anew for a batch larger or smaller than those before; it is kept in the folder
            `onnxruntime` of the cache.

    Raises:
        BackendUnavailable: the provider or a GPU is missing, where they are asked for.
        ConfigError: no such device, or TensorRT on the CPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda; found {device!r}")
    if tensorrt and device == "cpu":
        raise ConfigError("backend='onnxruntime-tensorrt' runs on a GPU only; use backend='onnxruntime' on the CPU")
    cpu: tuple[str, dict[str, str]] = (_CPU, {})
    if device == "cpu":
        return Providers(device="cpu", why="cpu, as asked", wanted=_CPU, options=(cpu,))
    wanted = _TENSORRT if tensorrt else _CUDA
    has_provider, gpu = wanted in ort.get_available_providers(), find_gpu()
    if has_provider and gpu:
        why = f"cuda, on {gpu.name}" + ("" if device == "cuda" else ", since it is there")
        cuda: tuple[str, dict[str, str]] = (_CUDA, {})
        options = ((_TENSORRT, _tensorrt_options()), cuda, cpu) if tensorrt else (cuda, cpu)
        return Providers(device="cuda", why=why, wanted=wanted, options=options)
    name = "TensorRT" if tensorrt else "CUDA"
    missing = "no NVIDIA GPU or driver was found" if has_provider else f"this ONNX Runtime has no {name}"
    if tensorrt:
        raise BackendUnavailable(f"backend='onnxruntime-tensorrt': {missing}; use backend='onnxruntime'")
    if device == "cuda":
        raise BackendUnavailable(f"device='cuda': {missing}; use device='cpu' or 'auto'")
    return Providers(device="cpu", why=f"cpu, since {missing}", wanted=_CPU, options=(cpu,))


def _tensorrt_options() -> dict[str, str]:
    """No precision is set: the provider then takes that of the graph (microsoft/onnxruntime#18707)."""
    folder = cache_folder("onnxruntime")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # native code, which ONNX Runtime loads unchecked
    except OSError:  # it costs a build at each start
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
