"""A network in PyTorch, to be timed: what `advprop bench` compares model files with.

Shape suffixes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advprop.checkpoints.predictor import device_for
from runtime.bench.targets import EVENTS, HOST
from runtime.errors import ConfigError
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file
from train.checkpoint import load_checkpoint
from train.models import create_model
from train.restore import restore_model

__all__ = ["EagerModel", "open_eager"]


class EagerModel:
    """A network on a device; what `runtime.bench.targets.TorchPeer` describes."""

    def __init__(
        self, model: nn.Module, place: torch.device, image_size: tuple[int, int], facts: dict[str, Any]
    ) -> None:
        """Takes a network that is in evaluation mode and on `place`.

        Args:
            model: the network.
            place: its device.
            image_size: height and width.
            facts: what a result says of it.
        """
        self._model = model
        self._place = place
        self._dtype = next(model.parameters()).dtype
        self.image_size = image_size
        self.facts = facts

    def run(self, images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """From host memory to host memory; safe to call from several threads."""
        with torch.inference_mode():
            logits_NK: NDArray[np.float32] = self._model(self._put(images_NCHW)).float().cpu().numpy()
        return logits_NK

    def probe(self, images_NCHW: NDArray[np.float32]) -> Callable[[], float]:
        """Puts images where the network is; returns a call that gives its milliseconds, by CUDA events on a GPU."""
        images = self._put(images_NCHW)

        def on_cpu() -> float:
            with torch.inference_mode():
                began = time.perf_counter_ns()
                self._model(images)
                return (time.perf_counter_ns() - began) / 1e6

        def on_gpu() -> float:
            timer: Any = torch.cuda.Event
            start, end = timer(enable_timing=True), timer(enable_timing=True)
            with torch.inference_mode():
                start.record()
                self._model(images)
                end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        return on_gpu if self._place.type == "cuda" else on_cpu

    def _put(self, images_NCHW: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(images_NCHW).to(self._place).to(self._dtype)


def open_eager(
    spec: ModelSpec | None, *, checkpoint: Path | None, half: bool, device: str, threads: int
) -> tuple[ModelSpec, list[tuple[str, EagerModel]]]:
    """Makes a network as PyTorch runs it, and on a GPU also compiled.

    Args:
        spec: architecture, classes and image size, with random weights; None: the checkpoint's own.
        checkpoint: one of our checkpoints.
        half: on a GPU, compute in FP16; a CPU computes in FP32.
        device: `auto` (a GPU where torch has one), `cpu` or `cuda`.
        threads: CPU threads inside one operator, of the whole process; 0 leaves it to PyTorch.

    Returns:
        The spec, and (what comes behind the name, network) of each.

    Raises:
        CheckpointError: not a checkpoint of ours.
        ArchError: timm does not have the architecture.
        BackendUnavailable: there is no GPU for `cuda`.
    """
    place = device_for(device)
    if threads:
        torch.set_num_threads(threads)
    facts: dict[str, Any] = {}
    if checkpoint is not None:
        content = load_checkpoint(checkpoint)
        spec = ModelSpec.from_json(content["spec"], where=str(checkpoint))
        model = restore_model(content, checkpoint)
        facts |= {"kind": "checkpoint", "sha256": sha256_file(checkpoint)}
    elif spec is not None:
        model = create_model(spec.arch, num_classes=len(spec.classes))
        facts |= {"kind": "peer", "peer": "the same architecture in PyTorch, with random weights: times are the same"}
    else:
        raise ConfigError("a spec or a checkpoint is needed")
    half = half and place.type == "cuda"
    model = model.eval().to(place).to(torch.float16 if half else torch.float32)
    facts |= {
        "arch": spec.arch,
        "precision": "fp16" if half else "fp32",
        "backend": f"torch {torch.__version__}",
        "device": place.type,
        "clock": EVENTS if place.type == "cuda" else HOST,
    }
    if place.type == "cpu":
        facts["threads"] = torch.get_num_threads()
    size = (spec.preprocessing.height, spec.preprocessing.width)
    made = [("", EagerModel(model, place, size, {**facts, "mode": "eager"}))]
    if place.type == "cuda":
        compiled: Any = torch.compile(model)
        more = {"mode": "torch.compile", "peer": "the same, compiled"}
        made.append(("-compiled", EagerModel(compiled, place, size, {**facts, **more})))
    return spec, made
