"""What model files are compared with: ONNX Runtime by itself, and the same network in PyTorch.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.backends.options import Threads
from runtime.bench.rounds import timed
from runtime.bench.targets import HOST, Contestant, Work, backend_input, of_torch
from runtime.engine.sidecar import read_sidecar
from runtime.errors import ModelFileError
from runtime.graph.read import sha256_onnx
from runtime.preprocessing import normalize
from runtime.spec import ModelSpec
from runtime.system.lazy import elsewhere

__all__ = ["TORCH_OPENER", "bare_onnxruntime", "onnx_beside", "torch_peers"]

TORCH_OPENER = "advprop.checkpoints.torch_peer:open_eager"
"""What makes PyTorch peers: imported when there is one, since the runtime depends on nothing else of ours."""


def bare_onnxruntime(
    name: str, path: Path, beside: OnnxRuntimeBackend, threads: Threads, image_size: tuple[int, int]
) -> Contestant:
    """Makes a contestant of `InferenceSession.run`: what the session's own work is measured against.

    Args:
        name: what it is called.
        path: the ONNX file.
        beside: the backend that runs the file. Its own `InferenceSession` is called, so that settings and arithmetic
            are the same and the difference is ours alone.
        threads: the backend's.
        image_size: height and width.
    """
    session, outputs = beside.session, [output.name for output in beside.outputs]

    def prepare(pixels_NHWC: NDArray[np.uint8], encoded: Sequence[bytes]) -> Work:
        feed = {beside.input.name: backend_input(beside, pixels_NHWC)}

        def run() -> Any:
            return session.run(outputs, feed)

        # Without a GPU there is nothing else to time: the call is the network.
        return Work(run=run, probes={} if beside.device == "cuda" else {"compute": timed("compute", run)})

    facts = {
        "kind": "onnx",
        "sha256": sha256_onnx(path),
        "peer": "a bare InferenceSession.run of the same file",
        "backend": "onnxruntime",
        "device": beside.device,
        "clock": HOST,
        "threads": threads.intra,
        "spin": threads.spin,
    }
    fewest, most = beside.batch_range
    return Contestant(
        name=name,
        facts=facts,
        most_images=most,
        fixed_batch=fewest if fewest == most else None,
        prepare=prepare,
        image_size=image_size,
    )


def onnx_beside(engine: Path) -> Path:
    """Returns the ONNX file that an engine was built from, in the engine's folder.

    Raises:
        ModelFileError: it is not there; the message has its hash.
    """
    wanted = read_sidecar(engine).onnx_sha256
    near = engine.with_suffix(".onnx")
    files = [near, *(path for path in sorted(engine.parent.glob("*.onnx")) if path != near)]
    for path in files:
        if path.is_file() and sha256_onnx(path) == wanted:
            return path
    other = f"; the {near.name} there is another" if near.is_file() else ""
    raise ModelFileError(
        f"--against ort wants the ONNX file that {engine} was built from, SHA-256 {wanted[:16]}…, in its folder: not "
        f"found{other}. Put it there, or leave --against ort out"
    )


def torch_peers(
    name: str, spec: ModelSpec | None, precision: str, device: str, threads: int, checkpoint: Path | None = None
) -> list[Contestant]:
    """Makes contestants of a network in PyTorch: as it is, and on a GPU also compiled.

    Args:
        name: what it is called.
        spec: architecture, classes and image size; weights are random, which changes no time. None: the checkpoint's.
        precision: of the file beside: on a GPU the peer of an `fp16` or `int8` file computes in FP16.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads; 0 leaves it to PyTorch.
        checkpoint: one of our checkpoints, for its weights.

    Raises:
        ArchError: timm does not have the architecture.
        BackendUnavailable: torch or timm is missing.
    """
    opener = elsewhere(TORCH_OPENER, "running a network in PyTorch", "leave it out")
    spec, peers = opener(
        spec, checkpoint=checkpoint, half=precision in ("fp16", "int8"), device=device, threads=threads
    )
    preprocessing = spec.preprocessing
    return [
        of_torch(name + suffix, peer, lambda pixels_NHWC: normalize(pixels_NHWC, preprocessing))
        for suffix, peer in peers
    ]
