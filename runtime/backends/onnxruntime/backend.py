"""ONNX Runtime: the default backend, on a CPU, or on a GPU by CUDA or TensorRT."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, TensorInfo
from runtime.backends.onnxruntime.binding import run_bound
from runtime.backends.onnxruntime.providers import Providers, choose_providers
from runtime.backends.threads import Threads
from runtime.device.arrays import DeviceArray
from runtime.device.driver import Cuda, load_bindings
from runtime.device.views import DeviceView
from runtime.errors import BackendUnavailable, InputError, ModelFileError, first_line
from runtime.graph.summary import CALIBRATION_KEY
from runtime.spec import METADATA_KEY, ModelSpec
from runtime.system.cpu import has_exact_int8

__all__ = ["OnnxRuntimeBackend"]

log = logging.getLogger(__name__)

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
}
_LOG_ERRORS_ONLY = 3
_AS_WRITTEN = ("session.disable_quant_qdq", "1")


class OnnxRuntimeBackend(Backend):
    """An ONNX file in ONNX Runtime."""

    name = "onnxruntime"

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        threads: Threads = Threads(),  # noqa: B008  # frozen
        exact: bool | None = None,
        *,
        tensorrt: bool = False,
    ) -> None:
        """Loads `path`.

        Args:
            path: an ONNX file.
            device: `cpu`, `cuda`, or `auto`: CUDA where a GPU and the provider are there.
            threads: CPU threads inside one run.
            exact: on a CPU, compute what a GPU gives: Q/DQ nodes as they are written, in floating point and not by INT8
                kernels, and every FP16 or BF16 tensor rounded, which ONNX Runtime leaves out there. Slower than
                without. Default: INT8 files of ours, for which it is the quickest way too, and where the CPU's own
                INT8 sums saturate.
            tensorrt: run it by TensorRT inside ONNX Runtime, on a GPU.

        Raises:
            ModelFileError: no such file, not ONNX, or not an image classifier.
            BackendUnavailable: ONNX Runtime, or for `cuda` or TensorRT the provider or a GPU, is missing.
            ConfigError: no such device, or TensorRT on the CPU.
        """
        ort = _import()
        providers = choose_providers(ort, device, tensorrt=tensorrt)
        self.device = providers.device
        by = "TensorRT inside ONNX Runtime" if tensorrt else "ONNX Runtime"
        reasons = [f"backend: {by} {ort.__version__}, which runs ONNX files", f"device: {providers.why}"]
        options = _options(ort, threads)
        saturates = exact is None and self.device == "cpu" and has_exact_int8() is False
        as_written = bool(exact) or saturates
        if as_written:
            options.add_session_config_entry(*_AS_WRITTEN)
        if self.device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds CUDA and cuDNN where pip has put them
        if not path.is_file():
            raise ModelFileError(f"no such model file: {path}")
        source = _rounded(path) if exact and self.device == "cpu" else str(path)
        session = _open(ort, path, source, options, providers)
        problem, otherwise = providers.missing(session), "onnxruntime" if tensorrt else "cpu"
        if problem:
            if tensorrt or device == "cuda":
                raise BackendUnavailable(f"{problem}, or use {'backend' if tensorrt else 'device'}='{otherwise}'")
            log.warning("%s. Running on the CPU", problem)
            self.device = "cpu"
            reasons[1] = f"device: cpu, since {problem}"
        metadata = session.get_modelmeta().custom_metadata_map
        if exact is None and self.device == "cpu" and CALIBRATION_KEY in metadata:
            # Its convolutions' outputs are not quantized, as TensorRT wants it: INT8 kernels could not take them, and
            # ONNX Runtime would compute every weight anew in every run.
            if not as_written:
                options.add_session_config_entry(*_AS_WRITTEN)
            as_written = True
            source = _rounded(path)
            session = _open(ort, path, source, options, providers)
            reasons.append("INT8 files are for GPUs: on a CPU the FP32 file is quicker")
        if as_written:
            reasons.append("INT8: in floating point, as Q/DQ nodes are written" + " (no VNNI here)" * saturates)
        if isinstance(source, bytes):
            reasons.append("FP16: rounded where a GPU rounds")
        text = metadata.get(METADATA_KEY)
        self.spec = ModelSpec.from_json(text, where=str(path)) if text else None
        expected = 2 if self.spec is not None and self.spec.output_form == "topk" else 1
        (self.input,) = _tensors(session.get_inputs(), "input", path, 1, rank=4)
        self.outputs = _tensors(session.get_outputs(), "output", path, expected, rank=2)
        self._session = session
        self._cuda: Cuda | None = None
        self._names = [output.name for output in self.outputs]
        if self.device == "cpu":
            reasons.append(
                f"threads: {threads.intra or 'one a core'} for an operator, {threads.inter} operators at a time"
            )
        self.reasons = tuple(reasons)

    @property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession` below, to be measured beside: without checks, and of this file only."""
        return self._session

    def _run(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        if isinstance(images_NCHW, DeviceView):
            return tuple(answer.numpy() for answer in self._run_on_device(images_NCHW))
        return tuple(self._session.run(self._names, {self.input.name: images_NCHW}))

    def _run_on_device(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[DeviceArray, ...]:
        fewest, most = self.batch_range
        if not fewest <= len(images_NCHW) <= most:
            raise InputError(
                f"the model takes batches of {fewest} images; found {len(images_NCHW)}: split or fill it up, or use run"
            )
        if isinstance(images_NCHW, DeviceView):
            self._wait_for(images_NCHW)
        return run_bound(self._session, self.input, self.outputs, images_NCHW, self.device)

    def _wait_for(self, view: DeviceView) -> None:
        """ONNX Runtime's own stream cannot be told to wait, so this thread does."""
        if self._cuda is None:
            self._cuda = Cuda(load_bindings())
        with self._cuda.current():
            self._cuda.check_pointer(view.pointer)
            stream, event = self._cuda.stream(), self._cuda.event()
            try:
                view.order(self._cuda, stream, event)
                self._cuda.synchronize(stream)
            finally:
                self._cuda.close_event(event)
                self._cuda.close_stream(stream)

    def close(self) -> None:
        self._session = None


def _rounded(path: Path) -> bytes | str:
    from runtime.graph.rounding import rounded_file

    return rounded_file(path)


def _open(ort: Any, path: Path, source: bytes | str, options: Any, providers: Providers) -> Any:
    """Returns a session of `source`, which is what is run of `path`."""
    try:
        return ort.InferenceSession(source, options, providers=list(providers.options))
    except Exception as error:  # ONNX Runtime's exceptions share no base but this
        if "NOT_IMPLEMENTED" in str(error):
            raise ModelFileError(
                f"ONNX Runtime cannot run {path} on the {providers.device}: {first_line(error)}. BF16 files are for "
                "TensorRT: advprop build makes an engine"
            ) from error
        raise ModelFileError(
            f"ONNX Runtime cannot load {path}: {first_line(error)}. Is the file whole? `advprop-export` writes it anew"
        ) from error


def _import() -> Any:
    try:
        import onnxruntime

        onnxruntime.set_default_logger_severity(_LOG_ERRORS_ONLY)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"ONNX Runtime cannot be imported ({error}); pip install onnxruntime-gpu, "
            "or onnxruntime where there is no NVIDIA GPU, never both"
        ) from error
    return onnxruntime


def _options(ort: Any, threads: Threads) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.intra_op_num_threads = threads.intra
    options.inter_op_num_threads = threads.inter
    if threads.inter > 1:  # ONNX Runtime takes notice of it in this mode only
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if not threads.spin:
        for pool in ("intra", "inter"):
            options.add_session_config_entry(f"session.{pool}_op.allow_spinning", "0")
    return options


def _tensors(nodes: Any, role: str, path: Path, expected: int, rank: int) -> tuple[TensorInfo, ...]:
    if len(nodes) != expected:
        raise ModelFileError(
            f"{path} has {len(nodes)} {role}s, expected {expected}: not an image classifier as advprop exports it"
        )
    for node in nodes:
        if node.type not in _DTYPES or len(node.shape) != rank:
            raise ModelFileError(
                f"the {role} {node.name!r} of {path} is {node.type} of shape {node.shape}, expected "
                f"{' or '.join(_DTYPES)} with {rank} dimensions"
            )
    return tuple(
        TensorInfo(
            node.name,
            np.dtype(_DTYPES[node.type]),
            tuple(size if isinstance(size, int) else -1 for size in node.shape),
        )
        for node in nodes
    )
