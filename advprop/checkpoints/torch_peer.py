"""Time PyTorch networks, with which `advprop bench` compares model files.

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

from advprop.checkpoints import TorchPeers
from runtime.bench.targets import EVENTS, HOST
from runtime.errors import ConfigError
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file
from train.checkpoint import load_checkpoint
from train.models import create_model, resolve_device, restore_model

__all__ = ["TorchModel", "open_torch_peer"]


class TorchModel:
    """A network on a device. It implements `runtime.bench.targets.TorchPeer`."""

    def __init__(
        self, model: nn.Module, device: torch.device, image_size: tuple[int, int], facts: dict[str, Any]
    ) -> None:
        """
        Args:
            model: a network in evaluation mode.
            device: device of the network.
            image_size: height and width of its images.
            facts: facts that results record.
        """
        self._model = model
        self._device = device
        self._dtype = next(model.parameters()).dtype
        self.image_size = image_size
        self.facts = facts

    def run(self, images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits, (N, K). Images and logits are in host memory. Thread-safe."""
        with torch.inference_mode():
            logits_NK: NDArray[np.float32] = self._model(self._to_device(images_NCHW)).float().cpu().numpy()
        return logits_NK

    def probe(self, images_NCHW: NDArray[np.float32]) -> Callable[[], float]:
        """Copy images to the device and return a function that runs the network on them.

        The function returns the time of one run in milliseconds, on a GPU from CUDA events.
        """
        images = self._to_device(images_NCHW)

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

        return on_gpu if self._device.type == "cuda" else on_cpu

    def _to_device(self, images_NCHW: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(images_NCHW).to(self._device).to(self._dtype)


def open_torch_peer(
    spec: ModelSpec | None, *, checkpoint: Path | None, half: bool, device: str, threads: int
) -> TorchPeers:
    """Implement `advprop.checkpoints.open_torch_peer`."""
    place = resolve_device(device)
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
        facts |= {
            "kind": "peer",
            "peer": "the same architecture in PyTorch with random weights, which do not change the times",
        }
    else:
        raise ConfigError("a network to time in PyTorch needs a spec or a checkpoint")
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
    models = [("", TorchModel(model, place, size, {**facts, "mode": "eager"}))]
    if place.type == "cuda":
        compiled: Any = torch.compile(model)
        more = {"mode": "torch.compile", "peer": "the same, compiled"}
        models.append(("-compiled", TorchModel(compiled, place, size, {**facts, **more})))
    return TorchPeers(spec, models)
