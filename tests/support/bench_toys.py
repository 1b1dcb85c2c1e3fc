"""Targets that record their calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.bench.targets import BenchTarget, Work


def toy_target(
    name: str,
    calls: list[str],
    run: Callable[[], object] = lambda: None,
    **limits: Any,
) -> BenchTarget:
    """Return a target that appends its name, or NAME.compute for its probe, to `calls`."""

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
    return BenchTarget(name=name, facts=facts, prepare=prepare, image_size=(4, 4), **limits)
