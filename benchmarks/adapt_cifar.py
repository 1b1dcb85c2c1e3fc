"""Adapt the networks of the fidelity study to corrupted images: does AdvProp's gain survive?

    python -m benchmarks.adapt_cifar runs/fidelity --data cifar10 --out runs/adapt-cifar
    python -m benchmarks.adapt_cifar runs/fidelity --data cifar10 --out runs/adapt-cifar --routes
    python -m benchmarks.adapt_cifar runs/fidelity --out runs/adapt-cifar --report docs/results/adapt_cifar.md

The first command adapts the exported files of vanilla and AdvProp, all seeds. The second one adapts
mixtures of AdvProp's main and auxiliary BatchNorms, in statistics and affine parameters. Of the
5,000 test images, 512 are field images and 1,024 others are test images, drawn with a fixed seed.
Each finished cell is a file of `--out`, so the same command resumes; several processes share the work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.adapt import run
from benchmarks.adapt_cifar_report import write_page
from benchmarks.fidelity import network  # noqa: F401  # registers the architectures
from benchmarks.fidelity.plan import TUNED
from benchmarks.fidelity.results import Results
from benchmarks.fidelity.study import Study, StudyConfig
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime.adapt.adapt import AdaptConfig, adapt
from runtime.evaluate.corruptions import CORRUPTIONS
from runtime.evaluate.image_workers import Corruption, corrupt_block, load_block, use_one_core
from runtime.graph.structure import spec_of
from runtime.preprocessing import normalize
from runtime.spec import Preprocessing
from runtime.system.files import write_text
from runtime.system.image_sources import FolderSource
from runtime.system.locks import file_lock
from train.checkpoint import load_checkpoint, save_checkpoint
from train.dual_bn import select_route, strip_auxiliary

FIELD, TEST = 512, 1_024
COUNTS = (32, 128, 512)
ROUTES_COUNTS = (128,)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the auxiliary BatchNorms in mixtures."""
AUXILIARY = "adv"
CLEAN = ("clean", 0)
_EXPORT_S = 600.0
"""How long to wait for another process's export."""
CELLS = (CLEAN, *((name, severity) for severity in (5, 3, 1) for name in CORRUPTIONS))


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images of CIFAR-10's test set in their roles."""

    source: FolderSource
    names: list[str]
    labels: NDArray[np.int64]
    """Class of each image."""
    field: NDArray[np.int64]
    """Places of the field images."""
    test: NDArray[np.int64]
    """Places of the test images."""

    @classmethod
    def read(cls, folder: Path) -> Images:
        source = FolderSource(folder)
        every = np.random.default_rng(0).permutation(len(source.names))[: FIELD + TEST]
        names = [source.names[place] for place in every]
        classes = sorted({name.split("/")[0] for name in source.names})
        return cls(
            source=source,
            names=names,
            labels=np.asarray([classes.index(name.split("/")[0]) for name in names]),
            field=np.arange(FIELD),
            test=np.arange(FIELD, FIELD + TEST),
        )

    def of(self, cell: tuple[str, int], preprocessing: Preprocessing, cache: Path) -> NDArray[np.uint8]:
        """Return all images with the corruption of a cell."""
        clean = load_block(self.source, self.names, preprocessing, "fit")
        if cell == CLEAN:
            return clean
        return corrupt_block(
            clean, self.names, Corruption(name=cell[0], severity=cell[1], seed=0, table="cifar"), cache
        )


def networks(study: Path, out: Path) -> dict[str, Path]:
    """Export vanilla and AdvProp with all seeds; return name → ONNX file."""
    return {
        f"{recipe}-{seed}": _exported(checkpoint, study, out / "models" / f"{recipe}-{seed}")
        for recipe, seed, checkpoint in _checkpoints(study)
    }


def mixtures(study: Path, out: Path) -> dict[str, Path]:
    """Export mixtures of AdvProp's routes with all seeds; return name → ONNX file."""
    found = {}
    for recipe, seed, checkpoint in _checkpoints(study):
        if recipe != "advprop":
            continue
        for share in SHARES:
            name = f"mixture-{seed}-{100 * share:.0f}"
            folder = out / "models" / name
            mixed = folder / "checkpoint.pt"
            if not mixed.exists():
                folder.mkdir(parents=True, exist_ok=True)
                content = load_checkpoint(checkpoint)
                content.pop("format")
                save_checkpoint(mixed, content | {"state_dict": mixture(content["state_dict"], share)})
            found[name] = _exported(mixed, study, folder)
    return found


def mixture(state_dict: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return weights of one route: (1 − share) · main + share · auxiliary, for all of a BatchNorm's tensors."""
    main, other = strip_auxiliary(state_dict), select_route(state_dict, AUXILIARY)
    return {key: value.lerp(other[key], share) if value.is_floating_point() else value for key, value in main.items()}


def _checkpoints(study: Path) -> Iterable[tuple[str, int, Path]]:
    results = Results.read(study)
    folders = Study(StudyConfig(data=study, out=study, plan=results.plan))
    for recipe in TUNED:
        for found in results.of(recipe):
            yield recipe, found.cell.seed, folders.folder(found.cell) / "last.pt"


def _exported(checkpoint: Path, study: Path, folder: Path) -> Path:
    path = folder / "model.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "lock", timeout_s=_EXPORT_S):
        if not path.exists():
            images = next((study / "data").glob("train-*/held"))  # their statistics are those of clean images
            export_checkpoint(checkpoint, ExportConfig(out=folder, data=images))
    return path


def measure(path: Path, images: Images, cell: tuple[str, int], counts: Iterable[int], cache: Path) -> dict[str, Any]:
    """Return the accuracy on a cell without adaptation, and with each number of field images."""
    model = onnx.load(path)
    spec = spec_of(model, str(path))
    assert spec is not None
    pixels = images.of(cell, spec.preprocessing, cache)
    inputs = normalize(pixels[images.test], spec.preprocessing)

    def accuracy(graph: onnx.ModelProto) -> float:
        return float((run(graph, inputs).argmax(1) == images.labels[images.test]).mean())

    before = accuracy(model)
    result: dict[str, Any] = {"before": before}
    for count in counts:
        found = adapt(model, pixels[images.field[:: FIELD // count]], AdaptConfig(threads=1))
        forced = accuracy(found.model)
        result[str(count)] = {
            "verdict": found.verdict.name,
            "forced": forced,
            "accuracy": forced if found.verdict.adapts else before,
            "shift": float(np.mean([layer.distance for layer in found.layers])),
            "entropy_before": found.before.entropy,
            "entropy_after": found.after.entropy,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="Folder of `python -m benchmarks.fidelity --out`.")
    parser.add_argument("--data", type=Path, help="Folder with val/CLASS, as for the study.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for models and the results of cells.")
    parser.add_argument("--routes", action="store_true", help="Adapt mixtures of AdvProp's BatchNorm routes.")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Page to write.")
    arguments = parser.parse_args()
    if arguments.report:
        write_page(arguments.out, arguments.report)
        return
    use_one_core()
    images = Images.read(arguments.data / "val")
    models = (mixtures if arguments.routes else networks)(arguments.study, arguments.out)
    locks = arguments.out / "locks"
    locks.mkdir(exist_ok=True)
    for cell in CELLS:
        for name, path in models.items():
            result = arguments.out / "cells" / name / f"{cell[0]}-{cell[1]}.json"
            with file_lock(locks / f"{name}-{cell[0]}-{cell[1]}", timeout_s=0) as free:
                if not free or result.exists():
                    continue
                found = measure(
                    path, images, cell, ROUTES_COUNTS if arguments.routes else COUNTS, arguments.out / "corrupted"
                )
                result.parent.mkdir(parents=True, exist_ok=True)
                write_text(result, json.dumps(found, indent=1))
                print(cell, name, f"{100 * found['before']:.1f}", flush=True)


if __name__ == "__main__":
    main()
