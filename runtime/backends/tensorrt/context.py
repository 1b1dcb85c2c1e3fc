"""`ExecutionContext`: a TensorRT execution context and its current settings. Not thread-safe.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from runtime.backends.tensorrt.engine import LoadedEngine, sizes_of
from runtime.device.driver import DeviceMemory
from runtime.errors import RunFailed

__all__ = ["ExecutionContext"]


class ExecutionContext:
    """Sets only what changes between batches, checks every status, and enqueues the network."""

    def __init__(self, engine: LoadedEngine, stream: int, scratch: DeviceMemory | None) -> None:
        """Create a context of `engine` that enqueues its work on `stream`.

        Raises:
            RunFailed: TensorRT cannot create the context.
        """
        self._engine = engine
        self._stream = stream
        self._scratch = scratch  # kept alive
        self._context = engine.new_context(scratch)
        self._profile = -1  # only an engine's first context starts with a profile
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def prepare(self, profile: int, shape_NCHW: tuple[int, ...], addresses: Mapping[str, int]) -> None:
        """Set the profile, the shape of the images, and the addresses of the tensors.

        Raises:
            RunFailed: TensorRT rejects a setting.
        """
        if profile != self._profile:
            self._shape = ()
            self._addresses.clear()  # TensorRT does not document whether they survive the switch
            self._require(
                self._context.set_optimization_profile_async(profile, self._stream), f"select profile {profile}"
            )
            self._profile = profile
        if shape_NCHW != self._shape:
            self._shape = ()
            name = self._engine.input.name
            self._require(self._context.set_input_shape(name, shape_NCHW), f"accept images of shape {shape_NCHW}")
            missing = self._context.infer_shapes()
            self._require(not missing, f"infer its shapes from {shape_NCHW}: {', '.join(missing)} are not set")
            self._check_outputs(shape_NCHW)
            self._shape = shape_NCHW
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._addresses.pop(name, None)
                self._require(self._context.set_tensor_address(name, address), f"set the address of {name}")
                self._addresses[name] = address

    def enqueue(self) -> None:
        """Enqueue the network on the stream without waiting for it.

        Raises:
            RunFailed: TensorRT cannot enqueue it.
        """
        self._require(self._context.execute_async_v3(self._stream), "run")

    def _check_outputs(self, shape_NCHW: tuple[int, ...]) -> None:
        """Check that the outputs have the shapes that memory was allocated for."""
        for output in self._engine.outputs:
            found = sizes_of(self._context.get_tensor_shape(output.name))
            expected = (shape_NCHW[0], output.shape[1])
            if found != expected:
                raise RunFailed(
                    f"the engine returns {output.name} of shape {found} for images of shape {shape_NCHW}, expected "
                    f"{expected}: its rows cannot be assigned to images"
                )

    def _require(self, success: bool, action: str) -> None:
        if not success:
            raise RunFailed(f"the engine cannot {action}: {self._engine.last_errors()}")
