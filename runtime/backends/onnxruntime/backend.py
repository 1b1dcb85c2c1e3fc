"""The ONNX Runtime backend: the default, on a CPU, or on a GPU with CUDA or TensorRT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, TensorInfo
from runtime.backends.onnxruntime.binding import run_bound
from runtime.backends.onnxruntime.providers import Providers, choose_providers, cpu_providers
from runtime.backends.options import Threads
from runtime.device.arrays import DeviceArray
from runtime.device.driver import Cuda, load_bindings
from runtime.device.views import DeviceView
from runtime.errors import BackendUnavailable, InputError, ModelFileError, first_line
from runtime.graph.foreign import convert_command
from runtime.graph.summary import CALIBRATION_KEY
from runtime.graph.validation import check_file
from runtime.spec import METADATA_KEY, ModelSpec
from runtime.system.cpu import has_exact_int8
from runtime.system.files import no_such
from runtime.system.gpu import Gpu, find_gpu
from runtime.system.slices import missing_package

__all__ = ["OnnxRuntimeBackend"]

log = logging.getLogger(__name__)

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
}
_LOG_ERRORS_ONLY = 3


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
        detect_gpu: Callable[[], Gpu | None] = find_gpu,
    ) -> None:
        """Load `path`.

        Args:
            path: an ONNX file.
            device: `cpu`, `cuda`, or `auto`: CUDA if a GPU and the provider are available.
            threads: CPU threads.
            exact: on a CPU, compute the results of a GPU: Q/DQ nodes run in floating point, and
                every FP16 or BF16 tensor is rounded. Default: for INT8 files that advprop
                calibrated; for others, Q/DQ nodes do so if this CPU's INT8 sums saturate.
            tensorrt: use TensorRT inside ONNX Runtime, on a GPU.
            detect_gpu: returns the GPU of this machine.

        Raises:
            ModelFileError: the file is missing, is not an ONNX file, or is not an image classifier.
            BackendUnavailable: ONNX Runtime, or the requested provider or GPU, is missing.
            ConfigError: `device` is unknown, or TensorRT was requested on the CPU.
        """
        ort = _import_onnxruntime()
        providers = choose_providers(ort, device, None if device == "cpu" else detect_gpu(), tensorrt=tensorrt)
        if not path.is_file():
            raise ModelFileError(no_such("model file", path))
        check_file(path)
        loading = _Loading.plan(path, providers, threads, exact)
        session = loading.open(ort)
        failure, fix = providers.start_failure(session)
        if failure:
            if tensorrt or device == "cuda":
                fix += ", or use " + ("backend='onnxruntime'" if tensorrt else "device='cpu'")
                raise BackendUnavailable(failure, fix=fix)
            log.warning("%s; %s. Running on the CPU", failure, fix)
            loading = _Loading.plan(path, cpu_providers(f"because {failure}; {fix}"), threads, exact)
            session = loading.open(ort)
        with _valid_text(path):
            metadata = session.get_modelmeta().custom_metadata_map
        if CALIBRATION_KEY in metadata and exact is None and loading.providers.device == "cpu":
            # The outputs of its convolutions are not quantized, as TensorRT requires. ONNX Runtime
            # has no INT8 kernels for that, and would dequantize every weight again in every run.
            loading = replace(loading, as_written=True, for_gpus=True, source=_rounded_if_possible(path))
            session = loading.open(ort)
        self.device = loading.providers.device
        self.contexts = threads.contexts if self.device == "cpu" else 1
        self.reasons = (_backend_reason(ort, tensorrt), *loading.reasons())
        spec = metadata.get(METADATA_KEY)
        self.spec = ModelSpec.from_json(spec, where=str(path)) if spec else None
        expected = 2 if self.spec is not None and self.spec.output_form == "topk" else 1
        with _valid_text(path):
            (self.input,) = _tensors(session.get_inputs(), "input", path, 1, rank=4)
            self.outputs = _tensors(session.get_outputs(), "output", path, expected, rank=2)
        self._session = session
        self._cuda: Cuda | None = None
        self._names = [output.name for output in self.outputs]

    @property
    def session(self) -> Any:
        """The underlying `onnxruntime.InferenceSession`, without the checks of this class."""
        return self._session

    def _run(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[NDArray[Any], ...]:
        if isinstance(images_NCHW, DeviceView):
            return tuple(output.numpy() for output in self._run_on_device(images_NCHW))
        return tuple(self._session.run(self._names, {self.input.name: images_NCHW}))

    def _run_on_device(self, images_NCHW: NDArray[Any] | DeviceView) -> tuple[DeviceArray, ...]:
        smallest, largest = self.batch_range
        if not smallest <= len(images_NCHW) <= largest:
            raise InputError(
                f"the model accepts batches of {smallest} images; found {len(images_NCHW)}",
                fix="split or pad the batch, or use run",
            )
        if isinstance(images_NCHW, DeviceView):
            self._wait_for_writes(images_NCHW)
        return run_bound(self._session, self.input, self.outputs, images_NCHW, self.device)

    def _wait_for_writes(self, view: DeviceView) -> None:
        """Block until the work that writes `view` is done: ONNX Runtime's stream cannot wait."""
        if self._cuda is None:
            self._cuda = Cuda(load_bindings())
        with self._cuda.current():
            self._cuda.check_pointer(view.pointer)
            stream, event = self._cuda.stream(), self._cuda.event()
            try:
                view.order_after_writes(self._cuda, stream, event)
                self._cuda.synchronize(stream)
            finally:
                self._cuda.close_event(event)
                self._cuda.close_stream(stream)

    def close(self) -> None:
        self._session = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    """The settings with which a file is loaded."""

    path: Path
    providers: Providers
    threads: Threads
    as_written: bool
    """Whether Q/DQ nodes run as written, in floating point, instead of as INT8 kernels."""
    saturates: bool
    """Whether that is because this CPU's INT8 sums saturate."""
    source: str | bytes
    """The file, or its bytes with every rounding of a GPU added."""
    for_gpus: bool = False
    """Whether the file runs faster on a GPU only."""

    @classmethod
    def plan(cls, path: Path, providers: Providers, threads: Threads, exact: bool | None) -> _Loading:
        on_cpu = providers.device == "cpu"
        saturates = exact is None and on_cpu and has_exact_int8() is False
        return cls(
            path=path,
            providers=providers,
            threads=threads,
            as_written=bool(exact) or saturates,
            saturates=saturates,
            source=_rounded(path) if exact and on_cpu else str(path),
        )

    def open(self, ort: Any) -> Any:
        """Return an `onnxruntime.InferenceSession`."""
        options = _session_options(ort, self.threads)
        if self.as_written:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if self.providers.device == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds CUDA and cuDNN where pip installed them
        from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotSupported

        try:
            # The fallback would print to stdout, and try the same provider again.
            fallback = int(self.providers.device != "cpu")
            providers = list(self.providers.options)
            return ort.InferenceSession(self.source, options, providers=providers, enable_fallback=fallback)
        except NotSupported as error:
            raise ModelFileError(
                f"ONNX Runtime cannot run {self.path} on the {self.providers.device}: {first_line(error)}",
                fix=f"BF16 files are for TensorRT: build an engine with advprop build {self.path}",
            ) from error
        except Exception as error:  # ONNX Runtime's exceptions have no other common base class
            raise ModelFileError(
                f"ONNX Runtime cannot load {self.path}: {first_line(error)}",
                fix="the file may be incomplete: write it again with advprop-export",
            ) from error

    def reasons(self) -> list[str]:
        """Return one line per decision."""
        threads = self.threads
        reasons = [f"device: {self.providers.reason}"]
        if self.for_gpus:
            reasons.append("INT8 files are for GPUs: on a CPU the FP32 file is faster")
        if self.as_written:
            reasons.append("INT8: computed in floating point" + " (this CPU has no VNNI)" * self.saturates)
        if isinstance(self.source, bytes):
            reasons.append("FP16: rounded as on a GPU")
        if self.providers.device == "cpu":
            reasons.append(
                f"threads: {threads.intra or 'one per core'} per operator, {threads.inter} parallel operators"
            )
        return reasons


def _backend_reason(ort: Any, tensorrt: bool) -> str:
    name = "TensorRT inside ONNX Runtime" if tensorrt else "ONNX Runtime"
    return f"backend: {name} {ort.__version__}, which runs ONNX files"


def _rounded(path: Path) -> bytes | str:
    from runtime.graph.rounding import rounded_file

    return rounded_file(path)


def _rounded_if_possible(path: Path) -> bytes | str:
    """Return the file with the roundings of a GPU, or the file itself if `onnx` is not installed."""
    try:
        return _rounded(path)
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        log.warning(
            "%s is for GPUs. On this CPU it runs slowly, and without the FP16 roundings of a GPU because %s",
            *(path, missing),
        )
        return str(path)


@contextmanager
def _valid_text(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is not a valid ONNX graph: a name or entry is not valid text") from error


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime

        onnxruntime.set_default_logger_severity(_LOG_ERRORS_ONLY)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"ONNX Runtime cannot be imported ({error})",
            fix="pip install onnxruntime-gpu, or onnxruntime on a machine without an NVIDIA GPU, but not both",
        ) from error
    return onnxruntime


def _session_options(ort: Any, threads: Threads) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.intra_op_num_threads = threads.intra
    options.inter_op_num_threads = threads.inter
    if threads.inter > 1:  # ONNX Runtime uses the setting in this mode only
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if not threads.spin:
        for pool in ("intra", "inter"):
            options.add_session_config_entry(f"session.{pool}_op.allow_spinning", "0")
    return options


def _tensors(nodes: Any, role: str, path: Path, expected: int, rank: int) -> tuple[TensorInfo, ...]:
    if len(nodes) != expected:
        raise ModelFileError(
            f"{path} has {len(nodes)} {role}s ({', '.join(node.name for node in nodes)}), expected {expected}",
            fix=f"if it is a classifier of another tool, convert it: {convert_command(path)}",
        )
    for node in nodes:
        if node.type not in _DTYPES or len(node.shape) != rank:
            raise ModelFileError(
                f"the {role} {node.name!r} of {path} is {node.type} of shape {node.shape}, expected "
                f"{' or '.join(_DTYPES)} with {rank} dimensions",
                fix=f"if it is a classifier of another tool, convert it: {convert_command(path)}",
            )
    return tuple(
        TensorInfo(
            node.name,
            np.dtype(_DTYPES[node.type]),
            tuple(size if isinstance(size, int) else -1 for size in node.shape),
        )
        for node in nodes
    )
