"""`EngineOptions`: how an engine is run."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import ConfigError

__all__ = ["EngineOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a TensorRT engine is run. ONNX files take no notice."""

    contexts: int = 2
    """Batches that run at the same time. Each context has scratch memory and staging buffers on the GPU for the
    engine's largest batch, from the beginning on; a call for which no context is free waits."""
    cuda_graphs: bool = True
    """Replay the kernels of a batch shape from its second run on, rather than launching them one by one. Where an
    engine cannot be captured they are launched as before. Input on the GPU is read where it lies, without a graph."""
    most_graphs: int = 16
    """Batch shapes that each context keeps a graph of: the first that come twice. TensorRT-RTX keeps its own."""
    allow_host_code: bool = False
    """Load version-compatible engines, which carry code for the CPU: only for engines whose source you trust."""

    def __post_init__(self) -> None:
        for name in ("contexts", "most_graphs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
