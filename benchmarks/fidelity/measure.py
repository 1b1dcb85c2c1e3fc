"""Accuracy, calibration, and robustness to corruptions and attacks of a checkpoint and its ONNX files."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advprop.checkpoints import load_predictor
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime.evaluate.cells import SuiteConfig
from runtime.evaluate.models import load_model
from runtime.evaluate.results import Result
from runtime.evaluate.run import RunConfig, evaluate
from runtime.spec import ModelSpec
from train.attack import accuracy, evaluation_attack
from train.checkpoint import load_checkpoint
from train.config import DataConfig
from train.dual_bn import auxiliary_routes
from train.folders import image_folder
from train.loaders import close_all, eval_loader
from train.models import resolve_device, restore_model, to_channels_last
from train.recipes import MAIN

__all__ = ["PRECISIONS", "Measurements", "weights_hash"]

PRECISIONS = {"fp32": "fp16/model.onnx", "fp16": "fp16/model.fp16.onnx", "int8": "int8/model.int8.onnx"}
"""Measured files by precision."""
_STRENGTHS = (1.0, 4.0, 8.0)
_PGD_STEPS = 10
_BATCH = 125


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What is measured on which images."""

    test: Path
    """Folder of the test images, CLASS/IMAGE, next to a folder `train`."""
    cache: Path
    """Folder for corrupted images."""
    device: str = "cpu"
    """torch device for checkpoints."""
    attacked: int = 1_000
    """Test images that are attacked, evenly spaced."""
    corrupted: int = 5_000
    """Test images per corruption and severity for checkpoints, evenly spaced."""
    per_file: int = 1_000
    """Test images per corruption and severity for ONNX files, whose exact arithmetic is slow."""
    corruptions: tuple[str, ...] = ()
    """Corruptions to measure (default: all fifteen)."""

    def clean_accuracy(self, checkpoint: Path, folder: Path) -> float:
        """Return the accuracy of the main route on CLASS/IMAGE files, from 0 to 1."""
        model = load_model(checkpoint, device=self.device, checkpoint_loader=load_predictor)
        (result,) = evaluate([model], SuiteConfig(name="clean", data=folder), self._run(checkpoint, "held"))
        return float(result["metrics"]["cells"]["images"]["top1"])

    def measure_checkpoint(self, checkpoint: Path, *, auxiliary: bool) -> dict[str, Any]:
        """Measure BatchNorm routes on all corruptions and under PGD.

        Args:
            checkpoint: the checkpoint.
            auxiliary: measure the auxiliary routes, and not only the main one.

        Returns:
            Route → top-1, calibration error, mean corruption error, error per corruption,
            accuracy under PGD by ε, and the numbers of images.
        """
        content = load_checkpoint(checkpoint)
        routes = [MAIN, *(auxiliary_routes(content["state_dict"]) if auxiliary else ())]
        models = [
            load_model(checkpoint, device=self.device, route=route, checkpoint_loader=load_predictor)
            for route in routes
        ]
        whole = SuiteConfig(name="corruptions", data=self.test, only=("clean",), table="cifar")
        clean = evaluate(models, whole, self._run(checkpoint, "clean"))
        suite = dataclasses.replace(whole, only=self._cells(), limit=self.corrupted)
        corrupted = evaluate(models, suite, self._run(checkpoint, "cifar-c"))
        attacked = self._attacked(content, checkpoint, routes)
        return {
            route: _figures(corrupted[i]) | _clean_figures(clean[i]) | {"pgd": attacked[route]}
            for i, route in enumerate(routes)
        }

    def measure_files(self, checkpoint: Path, calibration: Path) -> dict[str, Any]:
        """Export FP32, FP16 and INT8 files, and measure each with all roundings of a GPU.

        Args:
            checkpoint: the checkpoint.
            calibration: folder of training images to calibrate INT8.

        Returns:
            Precision → the same as from `measure_checkpoint`, without PGD, on fewer images.
        """
        folder = checkpoint.parent / "models"
        export_checkpoint(checkpoint, ExportConfig(out=folder / "fp16", precision="fp16"))
        export_checkpoint(checkpoint, ExportConfig(out=folder / "int8", precision="int8", calib_data=calibration))
        suite = SuiteConfig(name="corruptions", data=self.test, only=self._cells(), table="cifar", limit=self.per_file)
        found = {}
        for precision, name in PRECISIONS.items():
            model = load_model(folder / name, device="cpu", threads=torch.get_num_threads())
            (result,) = evaluate([model], suite, self._run(checkpoint, f"cifar-c-{precision}"))
            found[precision] = _figures(result)
        return found

    def _cells(self) -> tuple[str, ...]:
        return ("clean", *self.corruptions) if self.corruptions else ()

    def _run(self, checkpoint: Path, name: str) -> RunConfig:
        return RunConfig(out=checkpoint.parent / name, batch_size=_BATCH, workers=0, cache=self.cache)

    def _attacked(self, content: dict[str, Any], checkpoint: Path, routes: list[str]) -> dict[str, dict[str, float]]:
        """Return route → ε in 1/255 → accuracy under PGD on the checkpoint's float32 weights."""
        spec = ModelSpec.from_json(content["spec"], where=str(checkpoint)).preprocessing
        device = resolve_device(self.device)
        model = to_channels_last(restore_model(content, checkpoint, routes=True).to(device))
        data = image_folder(self.test.parent)
        every = max(1, len(data.val) // self.attacked)
        settings = DataConfig(root=self.test.parent, workers=0)
        batches = eval_loader(data, settings, spec, every=every, batch_size=_BATCH, device=device)
        found: dict[str, dict[str, float]] = {route: {} for route in routes}
        for route in routes:
            for strength in _STRENGTHS:
                attack = evaluation_attack(strength, spec.mean, spec.std, _PGD_STEPS)
                found[route][f"{strength:g}"] = accuracy(model, batches, attack, bn=route)
        close_all(batches)
        return found


def _figures(result: Result) -> dict[str, Any]:
    metrics = result["metrics"]
    errors: dict[str, list[float]] = {}
    for cell, values in metrics["cells"].items():
        corruption, slash, _ = cell.partition("/")
        if slash:
            errors.setdefault(corruption, []).append(1 - values["top1"])
    means = {corruption: sum(values) / len(values) for corruption, values in errors.items()}
    return _clean_figures(result) | {
        "corruption_error": sum(means.values()) / len(means),
        "errors": means,
        "corrupted_images": result["cells"]["clean"]["images"],
    }


def _clean_figures(result: Result) -> dict[str, Any]:
    clean = result["metrics"]["cells"]["clean"]
    return {
        "top1": clean["top1"],
        "calibration_error": clean["calibration_error"],
        "images": result["cells"]["clean"]["images"],
    }


def weights_hash(checkpoint: Path) -> str:
    """Return the SHA-256 of all weights and statistics of a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in load_checkpoint(checkpoint)["state_dict"].items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
