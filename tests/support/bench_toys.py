"""Contestants whose calls are counted, not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.bench.targets import Contestant, Work


def toy_contestant(
    name: str,
    calls: list[str],
    run: Callable[[], object] = lambda: None,
    **limits: Any,
) -> Contestant:
    """Writes its name into `calls` whenever it is run, with `.compute` behind it by its probe."""

    def prepare(pixels: np.ndarray, encoded: Sequence[bytes]) -> Work:
        assert len(pixels) == len(encoded)

        def work() -> None:
            calls.append(name)
            run()

        def compute() -> dict[str, float]:
            calls.append(f"{name}.compute")
            return {"compute": float(len(pixels))}

        return Work(run=work, probes={"compute": compute})

    facts = {"kind": "onnx", "sha256": name * 8, "backend": "toy", "device": "cpu", "clock": "calls"}
    return Contestant(name=name, facts=facts, prepare=prepare, image_size=(4, 4), **limits)
