"""`LoadedEngine`: a deserialized plan, and the tensors and profiles that it reports.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.backends.base import TensorInfo
from runtime.backends.tensorrt.profiles import Profile, Profiles
from runtime.device.driver import DeviceMemory
from runtime.engine.flavors import Flavor, native_logger
from runtime.errors import ModelFileError, RunFailed

if TYPE_CHECKING:
    import tensorrt

__all__ = ["LoadedEngine", "sizes_of"]

_DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}
_SUPPORTED = {"input": ("FLOAT", "HALF", "UINT8"), "output": ("FLOAT", "HALF", "INT32", "INT64")}
# TensorRT reports these errors through its logger only, without a code. The texts add an
# explanation; no decision depends on them.
_EXPLANATIONS = (
    ("expecting compute", "it was built for another GPU"),
    ("ersion tag does not match", "it was built by another release"),
    ("engine_host_code_allowed", "it contains code for the CPU: load it with EngineOptions(allow_host_code=True)"),
    ("EngineHostCode", "it contains code for the CPU: load it with EngineOptions(allow_host_code=True)"),
    ("utOfMemory", "the GPU is out of memory"),
    ("out of memory", "the GPU is out of memory"),
)
"""Part of a TensorRT message → explanation."""


class LoadedEngine:
    """A deserialized engine. Threads may share it for reading, but not its execution contexts.

    Create, use and `close` it while the primary context is current.
    """

    def __init__(
        self, flavor: Flavor, plan: bytes, path: Path, *, outputs: int, cuda_graphs: bool, allow_host_code: bool
    ) -> None:
        """Deserialize a validated plan.

        Args:
            flavor: the TensorRT library.
            plan: the engine's bytes.
            path: the engine's file, for messages.
            outputs: expected number of outputs.
            cuda_graphs: whether TensorRT-RTX captures graphs. For full TensorRT, `Slot` captures
                them.
            allow_host_code: whether the plan may contain code for the CPU.

        Raises:
            ModelFileError: TensorRT rejects the plan, or it is not an image classifier.
        """
        trt = flavor.module
        self._trt = trt
        self._lock = threading.Lock()
        self._path = path
        self._logger = native_logger(flavor)
        self._logger.errors.clear()
        # The engine needs the runtime object to stay alive.
        self._runtime: tensorrt.Runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = allow_host_code
        self._engine: tensorrt.ICudaEngine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ModelFileError(
                f"{flavor.name} {flavor.version} cannot load {path}: {self.last_errors()}",
                fix=f"build it again: advprop build MODEL.onnx --out {path}",
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        input_names = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        output_names = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        if len(input_names) != 1 or len(output_names) != outputs:
            raise ModelFileError(
                f"{path} has {len(input_names)} inputs and {len(output_names)} outputs, expected 1 and {outputs}: "
                "it is not an image classifier from advprop build"
            )
        self.input = self._read_tensor(input_names[0], "input", 4)
        """The images, (N, C, H, W); -1 for dimensions that differ between profiles."""
        self.outputs = tuple(self._read_tensor(name, "output", 2) for name in output_names)
        """(N, K) each."""
        self.profiles = Profiles([self._read_profile(index) for index in range(self._engine.num_optimization_profiles)])
        """The shapes that it accepts."""
        self.is_rtx = flavor.name == "tensorrt_rtx"
        """Whether contexts manage their own memory and graphs."""
        self.scratch_bytes = 0 if self.is_rtx else self._scratch_bytes()
        """Scratch memory to allocate for a context of full TensorRT."""
        self._config = self._runtime_config(cuda_graphs) if self.is_rtx else None

    def new_context(self, scratch: DeviceMemory | None) -> tensorrt.IExecutionContext:
        """Create an execution context.

        Args:
            scratch: memory of `scratch_bytes` for full TensorRT. Contexts that never run at the
                same time may share it.

        Raises:
            RunFailed: there is not enough memory, or TensorRT cannot create the context.
        """
        how = self._config or self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:  # an engine is thread-safe for reading only
            self._logger.errors.clear()
            context: tensorrt.IExecutionContext = self._engine.create_execution_context(how)
        if context is None:
            raise RunFailed(
                f"{self._path}: no execution context could be created: {self.last_errors()}", fix="use fewer contexts"
            )
        if scratch is not None:
            context.set_device_memory(scratch.pointer, scratch.nbytes)
        return context

    def last_errors(self) -> str:
        """Return and explain TensorRT's last messages, which may come from another thread."""
        messages = "; ".join(self._logger.errors[-3:]) or "TensorRT gave no reason"
        self._logger.errors.clear()
        explanation = next((explanation for text, explanation in _EXPLANATIONS if text in messages), "")
        return f"{explanation} ({messages})" if explanation else messages

    def close(self) -> None:
        """Free the engine. Its contexts must be gone."""
        del self._engine, self._config, self._runtime

    def _runtime_config(self, cuda_graphs: bool) -> Any:
        """Return the configuration of TensorRT-RTX contexts, which share their compiled kernels."""
        engine: Any = self._engine
        config = engine.create_runtime_config()
        strategies = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategies.DISABLED
        self._kernels = config.create_runtime_cache()  # must live as long as the contexts
        config.set_runtime_cache(self._kernels)
        return config

    def _scratch_bytes(self) -> int:
        if not hasattr(self._engine, "device_memory_size_v2"):
            raise ModelFileError(
                f"{self._path}: TensorRT {self._trt.__version__} is too old to run it", fix="install 10.1 or later"
            )
        return int(self._engine.device_memory_size_v2)

    def _read_tensor(self, name: str, role: str, rank: int) -> TensorInfo:
        kind = str(self._engine.get_tensor_dtype(name).name)
        shape = sizes_of(self._engine.get_tensor_shape(name))
        on_device = self._engine.get_tensor_location(name) == self._trt.TensorLocation.DEVICE
        # A dynamic output dimension other than the batch would need an allocator; classifiers have
        # none.
        if kind not in _SUPPORTED[role] or len(shape) != rank or (role == "output" and shape[1] < 1) or not on_device:
            raise ModelFileError(
                f"the {role} {name!r} of {self._path} is {kind} of shape {shape}"
                f"{'' if on_device else ' on the CPU'}, expected {' or '.join(_SUPPORTED[role])} with {rank} dimensions"
            )
        return TensorInfo(name, np.dtype(_DTYPES[kind]), shape)

    def _read_profile(self, index: int) -> Profile:
        """Return a profile as the engine reports it; fixed dimensions are the input tensor's."""
        shapes = self._engine.get_tensor_profile_shape(self.input.name, index)
        fixed = self.input.shape
        smallest, optimal, largest = (
            tuple(size if size >= 0 else found for size, found in zip(fixed, sizes_of(shape), strict=True))
            for shape in shapes
        )
        return Profile(smallest, optimal, largest)


def sizes_of(dims: Any) -> tuple[int, ...]:
    """Return the sizes in a `Dims`, which is iterable, although its type stub does not allow it."""
    return tuple(int(size) for size in dims)
