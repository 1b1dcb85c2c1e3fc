"""`Threads`: how many threads a model runs on, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import ConfigError

__all__ = ["Threads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """Threads of ONNX Runtime. Other backends compute on a GPU and take no notice."""

    intra: int = 0
    """Threads that share one operator, the caller's included. 0: one a physical core. Fewer where several
    processes or sessions share the machine."""
    inter: int = 1
    """Operators that run at the same time. Above 1 branches of the network run side by side; most image
    classifiers have none worth it."""
    spin: bool = True
    """Idle threads spin for a while before they sleep: quicker from one operator to the next, and a core at 100 %
    each. Turn it off where other work needs the cores."""

    def __post_init__(self) -> None:
        if self.intra < 0 or self.inter < 1:
            raise ConfigError(
                f"threads: intra must be at least 0 and inter at least 1; found intra={self.intra}, inter={self.inter}"
            )
