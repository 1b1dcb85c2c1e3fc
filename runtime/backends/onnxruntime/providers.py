"""Choose ONNX Runtime's execution providers, and explain why one cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import BackendUnavailable, ConfigError
from runtime.system.cache import private_folder
from runtime.system.gpu import Gpu

__all__ = ["Providers", "choose_providers", "cpu_providers"]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_START_FAILURES = {
    _CUDA: (
        "ONNX Runtime could not start its CUDA provider, probably because it did not find CUDA or cuDNN",
        "pip install 'onnxruntime-gpu[cuda,cudnn]'",
    ),
    _TENSORRT: (
        "ONNX Runtime could not start its TensorRT provider, probably because it did not find libnvinfer of the "
        "release that it was built with",
        "pip install tensorrt cuda-bindings, or see ONNX Runtime's table of releases",
    ),
}
"""Provider → what is wrong if it does not start, and how to fix it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Providers:
    """The execution providers of one session."""

    device: str
    """`cpu` or `cuda`."""
    reason: str
    """The device, and why it was chosen."""
    main: str
    """The provider that runs the model; the others run the operators that it does not support."""
    options: tuple[tuple[str, dict[str, str]], ...]
    """Names and options of all providers, first choice first."""

    def start_failure(self, session: Any) -> tuple[str, str]:
        """Return what is wrong and the fix if `session` lacks the main provider, or ("", "").

        ONNX Runtime itself only logs such a failure, and continues with the other providers.
        """
        return ("", "") if self.main in session.get_providers() else _START_FAILURES[self.main]


def cpu_providers(reason: str) -> Providers:
    """Return the providers for the CPU; `reason` is why it was chosen."""
    return Providers(device="cpu", reason=f"cpu, {reason}", main=_CPU, options=((_CPU, {}),))


def choose_providers(ort: Any, device: str, gpu: Gpu | None, *, tensorrt: bool) -> Providers:
    """Choose the providers for a device.

    Args:
        ort: the module `onnxruntime`.
        device: `auto`, `cpu` or `cuda`.
        gpu: the GPU of this machine; None without a GPU.
        tensorrt: use TensorRT inside ONNX Runtime. It builds an engine in the first run, with the
            precision of the file, and rebuilds it for a batch larger or smaller than before. The
            engines are stored in the folder `onnxruntime` of the cache.

    Raises:
        BackendUnavailable: the requested provider or a GPU is missing.
        ConfigError: `device` is unknown, or TensorRT was requested on the CPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu or cuda; found {device!r}")
    if tensorrt and device == "cpu":
        raise ConfigError("backend='onnxruntime-tensorrt' runs on a GPU only", fix="use backend='onnxruntime'")
    if device == "cpu":
        return cpu_providers("as requested")
    main = _TENSORRT if tensorrt else _CUDA
    has_provider = main in ort.get_available_providers()
    if has_provider and gpu is not None:
        reason = f"cuda, on {gpu.name}" + ("" if device == "cuda" else ", because it is available")
        cuda: tuple[str, dict[str, str]] = (_CUDA, {})
        options = ((_TENSORRT, _tensorrt_options()), cuda, (_CPU, {})) if tensorrt else (cuda, (_CPU, {}))
        return Providers(device="cuda", reason=reason, main=main, options=options)
    name = "TensorRT" if tensorrt else "CUDA"
    missing = "no NVIDIA GPU or driver was found" if has_provider else f"this ONNX Runtime was built without {name}"
    if tensorrt:
        raise BackendUnavailable(f"backend='onnxruntime-tensorrt': {missing}", fix="use backend='onnxruntime'")
    if device == "cuda":
        raise BackendUnavailable(f"device='cuda': {missing}", fix="use device='cpu' or 'auto'")
    return cpu_providers(f"because {missing}")


def _tensorrt_options() -> dict[str, str]:
    """Return the provider's cache settings.

    No precision is set: it then uses the graph's (microsoft/onnxruntime#18707).
    """
    # The folder must be private: ONNX Runtime loads the native code in it without checks.
    folder = private_folder("onnxruntime")
    if folder is None:  # every start builds the engine
        return {}
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
