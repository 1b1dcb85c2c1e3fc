"""`Execution`: an execution context, and what it was last set to. For one thread at a time.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from runtime.backends.tensorrt.engine import Engine, sizes_of
from runtime.device.driver import DeviceMemory
from runtime.errors import RunFailed

__all__ = ["Execution"]


class Execution:
    """Sets what changes from one batch to the next, checks every answer, and enqueues."""

    def __init__(self, engine: Engine, stream: int, scratch: DeviceMemory | None) -> None:
        """Makes a context of `engine` whose work goes on `stream`. Raises RunFailed."""
        self._engine = engine
        self._stream = stream
        self._scratch = scratch  # kept alive
        self._context = engine.new_context(scratch)
        self._profile = -1  # later contexts of an engine begin with none
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def prepare(self, profile: int, shape_NCHW: tuple[int, ...], addresses: Mapping[str, int]) -> None:
        """Sets the profile, the shape of the images, and where each tensor is. Raises RunFailed where it is refused."""
        if profile != self._profile:
            self._shape = ()
            self._addresses.clear()  # whether they outlive a switch is not written anywhere
            self._expect(
                self._context.set_optimization_profile_async(profile, self._stream), f"select profile {profile}"
            )
            self._profile = profile
        if shape_NCHW != self._shape:
            self._shape = ()
            name = self._engine.input.name
            self._expect(self._context.set_input_shape(name, shape_NCHW), f"take images of shape {shape_NCHW}")
            unset = self._context.infer_shapes()
            self._expect(not unset, f"infer its shapes from {shape_NCHW}, for want of {', '.join(unset)}")
            self._check_outputs(shape_NCHW)
            self._shape = shape_NCHW
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                self._addresses.pop(name, None)
                self._expect(self._context.set_tensor_address(name, address), f"take an address for {name}")
                self._addresses[name] = address

    def enqueue(self) -> None:
        """Puts the network on the stream; returns at once. Raises RunFailed where TensorRT refuses."""
        self._expect(self._context.execute_async_v3(self._stream), "run")

    def _check_outputs(self, shape_NCHW: tuple[int, ...]) -> None:
        """What is allocated for an output is what the engine says of it; it must not come out larger."""
        for output in self._engine.outputs:
            found = sizes_of(self._context.get_tensor_shape(output.name))
            expected = (shape_NCHW[0], output.shape[1])
            if found != expected:
                raise RunFailed(
                    f"the engine gives {output.name} of shape {found} for images of shape {shape_NCHW}, expected "
                    f"{expected}: its answers cannot be told apart"
                )

    def _expect(self, good: bool, what: str) -> None:
        if not good:
            raise RunFailed(f"the engine refused to {what}: {self._engine.reason()}")
