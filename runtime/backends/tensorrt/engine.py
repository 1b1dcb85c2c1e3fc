"""`Engine`: a deserialized plan, and what it says of itself.

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

__all__ = ["Engine", "sizes_of"]

_DTYPES = {"FLOAT": "f4", "HALF": "f2", "INT8": "i1", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}
_OURS = {"input": ("FLOAT", "HALF", "UINT8"), "output": ("FLOAT", "HALF", "INT32", "INT64")}
_MEANINGS = (
    ("expecting compute", "it was built for another GPU"),
    ("ersion tag does not match", "it was built by another release"),
    ("engine_host_code_allowed", "it holds code for the CPU; load it by EngineOptions(allow_host_code=True)"),
    ("EngineHostCode", "it holds code for the CPU; load it by EngineOptions(allow_host_code=True)"),
    ("utOfMemory", "the GPU is out of memory"),
    ("out of memory", "the GPU is out of memory"),
)
"""What TensorRT's own words come to."""


class Engine:
    """A deserialized engine. Threads may share it for reading; its execution contexts they may not.

    Make, use and `close` it while the primary context is current.
    """

    def __init__(
        self, flavor: Flavor, plan: bytes, path: Path, *, outputs: int, cuda_graphs: bool, allow_host_code: bool
    ) -> None:
        """Deserializes a plan that `admit` let pass.

        Args:
            flavor: the library.
            plan: the engine's bytes.
            path: where they came from, for messages.
            outputs: how many outputs are expected.
            cuda_graphs: whether TensorRT-RTX is to capture graphs; of full TensorRT we capture them.
            allow_host_code: whether the plan may hold code for the CPU.

        Raises:
            ModelFileError: TensorRT refuses it, or it is not an image classifier.
        """
        trt = flavor.module
        self._trt = trt
        self._lock = threading.Lock()
        self._path = path
        self._logger = native_logger(flavor)
        self._logger.errors.clear()
        # The engine needs the runtime to live.
        self._runtime: tensorrt.Runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = allow_host_code
        self._engine: tensorrt.ICudaEngine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ModelFileError(
                f"{flavor.name} {flavor.version} cannot load {path}: {self.reason()}; build it again: "
                f"advprop build MODEL.onnx --out {path}"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        results = [name for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        if len(inputs) != 1 or len(results) != outputs:
            raise ModelFileError(
                f"{path} has {len(inputs)} inputs and {len(results)} outputs, expected 1 and {outputs}: not an image "
                "classifier as advprop builds it"
            )
        self.input = self._tensor(inputs[0], "input", 4)
        """The images, (N, C, H, W); -1 where the profiles leave a choice."""
        self.outputs = tuple(self._tensor(name, "output", 2) for name in results)
        """(N, K) each."""
        self.profiles = Profiles([self._profile(index) for index in range(self._engine.num_optimization_profiles)])
        """The shapes it takes."""
        self.is_rtx = flavor.name == "tensorrt_rtx"
        """Whether contexts take care of their memory and graphs themselves."""
        self.scratch_bytes = 0 if self.is_rtx else self._scratch_bytes()
        """Scratch memory that a context of full TensorRT is given."""
        self._config = self._runtime_config(cuda_graphs) if self.is_rtx else None

    def new_context(self, scratch: DeviceMemory | None) -> tensorrt.IExecutionContext:
        """Makes an execution context.

        Args:
            scratch: of full TensorRT `scratch_bytes`, which contexts that never run at the same time may share.

        Raises:
            RunFailed: there is not enough memory, or TensorRT's reason.
        """
        how = self._config or self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:  # an engine may be read by several threads, and not more
            self._logger.errors.clear()
            context: tensorrt.IExecutionContext = self._engine.create_execution_context(how)
        if context is None:
            raise RunFailed(f"{self._path}: no execution context could be made: {self.reason()}; use fewer contexts")
        if scratch is not None:
            context.set_device_memory(scratch.pointer, scratch.nbytes)
        return context

    def reason(self) -> str:
        """Returns what TensorRT said last, and what it means. Of several threads' errors it may be another's."""
        said = "; ".join(self._logger.errors[-3:]) or "it gave no reason"
        self._logger.errors.clear()
        meaning = next((meaning for words, meaning in _MEANINGS if words in said), "")
        return f"{meaning} ({said})" if meaning else said

    def close(self) -> None:
        """Frees it; its contexts must be gone."""
        del self._engine, self._config, self._runtime

    def _runtime_config(self, cuda_graphs: bool) -> Any:
        """TensorRT-RTX: contexts share the kernels that it compiles when they first run."""
        engine: Any = self._engine
        config = engine.create_runtime_config()
        strategies = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategies.DISABLED
        self._kernels = config.create_runtime_cache()  # must live as long as the contexts
        config.set_runtime_cache(self._kernels)
        return config

    def _scratch_bytes(self) -> int:
        if not hasattr(self._engine, "device_memory_size_v2"):
            raise ModelFileError(f"{self._path}: TensorRT {self._trt.__version__} is too old to run it; install 10.1")
        return int(self._engine.device_memory_size_v2)

    def _tensor(self, name: str, role: str, rank: int) -> TensorInfo:
        kind = str(self._engine.get_tensor_dtype(name).name)
        shape = sizes_of(self._engine.get_tensor_shape(name))
        on_device = self._engine.get_tensor_location(name) == self._trt.TensorLocation.DEVICE
        # An open output size other than the batch would need an allocator; no classifier has one.
        if kind not in _OURS[role] or len(shape) != rank or (role == "output" and shape[1] < 1) or not on_device:
            raise ModelFileError(
                f"the {role} {name!r} of {self._path} is {kind} of shape {shape}"
                f"{'' if on_device else ' on the CPU'}, expected {' or '.join(_OURS[role])} with {rank} dimensions"
            )
        return TensorInfo(name, np.dtype(_DTYPES[kind]), shape)

    def _profile(self, index: int) -> Profile:
        """The engine's own word on what a profile takes; sizes that are fixed are those of the tensor."""
        shapes = self._engine.get_tensor_profile_shape(self.input.name, index)
        fixed = self.input.shape
        least, usual, most = (
            tuple(size if size >= 0 else found for size, found in zip(fixed, sizes_of(shape), strict=True))
            for shape in shapes
        )
        return Profile(least, usual, most)


def sizes_of(dims: Any) -> tuple[int, ...]:
    """Returns the sizes in a `Dims`, which can be iterated over, though TensorRT's types do not say so."""
    return tuple(int(size) for size in dims)
