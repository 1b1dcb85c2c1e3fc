"""Run-time settings of the backends."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import ConfigError

__all__ = ["EngineOptions", "Threads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """CPU threads of ONNX Runtime. Backends that compute on a GPU ignore them."""

    intra: int = 0
    """Threads that share one operator, including the caller's. 0: one per physical core. Use fewer
    if several processes or sessions share the machine."""
    inter: int = 1
    """Operators of a batch that run at the same time. Above 1, branches of the network run in parallel, which
    speeds up few image classifiers."""
    contexts: int = 1
    """Batches that run at the same time for `submit` and its relatives. `Threads(intra=1, contexts=N)`
    keeps N cores busy under load, and answers a single request more slowly than `Threads(intra=N)`."""
    spin: bool = True
    """Let idle threads spin for a while before they sleep. It speeds up the next operator and keeps
    the cores at 100%. Turn it off if other work needs the cores."""

    def __post_init__(self) -> None:
        for name, smallest in (("intra", 0), ("inter", 1), ("contexts", 1)):
            if getattr(self, name) < smallest:
                raise ConfigError(f"threads: {name} must be at least {smallest}; found {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Settings of a TensorRT engine. ONNX files ignore them."""

    contexts: int = 2
    """Batches that run at the same time. Each context reserves scratch memory and staging buffers
    on the GPU for the engine's largest batch. A call waits if no context is free."""
    cuda_graphs: bool = True
    """Capture the kernels of a batch shape in its second run and replay them later, instead of
    launching them one by one. An engine that cannot be captured is launched normally. Input on the
    GPU is read in place, without a graph."""
    max_graphs: int = 16
    """Maximum number of batch shapes captured per context: the first ones that occur twice.
    TensorRT-RTX manages its own graphs."""
    allow_host_code: bool = False
    """Load version-compatible engines, which contain code for the CPU. Enable it only for engines
    that you trust."""

    def __post_init__(self) -> None:
        for name in ("contexts", "max_graphs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
