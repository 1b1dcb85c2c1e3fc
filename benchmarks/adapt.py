"""Adapt EfficientNet-Lite0 to each corruption and severity of ImageNet-C, and measure what it gains.

    python -m benchmarks.adapt imagenet_dev --out runs/adapt             76 cells: about an hour
    python -m benchmarks.adapt imagenet_dev --out runs/adapt --extras    the corruptions for choosing settings
    python -m benchmarks.adapt imagenet_dev --out runs/adapt --time      cost of an adaptation, in runs
    python -m benchmarks.adapt imagenet_dev --out runs/adapt --int8      INT8 thresholds after an adaptation
    python -m benchmarks.adapt imagenet_dev --out runs/adapt --report docs/results/adapt.md

`imagenet_dev` contains `WNID/*.JPEG`. The images are divided, with a fixed seed, into 64 that the
export is verified on (their statistics are those of clean images), 128 field images, and test
images. Each finished cell is a file of `--out`, so the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.adapt_report import write_page
from calib.config import CalibrationConfig
from calib.ptq import Calibrated, calibrate
from calib.quantize import quantize
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime.adapt.adapt import AdaptConfig, adapt
from runtime.evaluate.corruptions import CORRUPTIONS, EXTRAS
from runtime.evaluate.image_workers import Corruption, corrupt_block, load_block, use_one_core
from runtime.graph.model import first_output, session_of
from runtime.graph.structure import spec_of
from runtime.preprocessing import Preprocessor, normalize
from runtime.spec import ModelSpec
from runtime.system.image_sources import FolderSource
from tests.support.real_weights import SOURCE, labeled_images, save_lite0

REFERENCE, FIELD = 64, 128
COUNTS = (32, 128)
FIXED_PRIOR = 16
CLEAN = ("clean", 0)


class Bench:
    """The model, and the images in their roles."""

    def __init__(self, data: Path, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        paths, labels = labeled_images(data)
        self.names = [str(path.relative_to(data)) for path in paths]
        self.labels = np.asarray(labels)
        order = np.random.default_rng(0).permutation(len(paths))
        self.reference = np.sort(order[:REFERENCE])
        self.field = np.sort(order[REFERENCE : REFERENCE + FIELD])
        self.test = np.sort(order[REFERENCE + FIELD :])
        self.path = out / "model" / "model.onnx"
        if not self.path.exists():
            _export(data, [paths[place] for place in self.reference], self.path.parent)
        self.model = onnx.load(self.path)
        found = spec_of(self.model, str(self.path))
        assert found is not None
        self.spec: ModelSpec = found
        self.clean = load_block(FolderSource(data), self.names, self.spec.preprocessing, "fit")

    def images(self, cell: tuple[str, int]) -> NDArray[np.uint8]:
        if cell == CLEAN:
            return self.clean
        corruption = Corruption(name=cell[0], severity=cell[1], seed=0, table="imagenet")
        return corrupt_block(self.clean, self.names, corruption, self.out / "corrupted")

    def right(self, model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which test images are classified correctly."""
        logits = run(model, normalize(images[self.test], self.spec.preprocessing))
        return logits.argmax(1) == self.labels[self.test]


def run(model: onnx.ModelProto, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # INT8 exactly as written
    session = session_of(model, options)
    return np.concatenate([first_output(session, inputs[start : start + 4]) for start in range(0, len(inputs), 4)])


def _export(data: Path, reference: list[Path], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        for path in reference:
            (images / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, images / path.parent.name)
        weights = save_lite0(Path(temporary) / "lite0.pth")
        export_checkpoint(SOURCE, ExportConfig(weights=weights, data=images, out=folder))


def measure(bench: Bench, cell: tuple[str, int]) -> dict[str, Any]:
    """Return the accuracy without adaptation and with each kind of it, and each verdict."""
    images = bench.images(cell)
    before = bench.right(bench.model, images)
    result: dict[str, Any] = {"cell": cell, "images": len(before), "before": float(before.mean())}
    kinds = {f"auto-{count}": AdaptConfig(prior=None, threads=1) for count in COUNTS}
    if cell[1] in (0, 3):
        kinds[f"fixed-{FIELD}"] = AdaptConfig(prior=FIXED_PRIOR, threads=1)
    for kind, config in kinds.items():
        field = bench.field[:: FIELD // int(kind.split("-")[1])]
        found = adapt(bench.model, images[field], config)
        after = bench.right(found.model, images)
        result[kind] = {
            "verdict": found.verdict.name,
            "adapts": found.verdict.adapts,
            "forced": float(after.mean()),
            "accuracy": float((after if found.verdict.adapts else before).mean()),
            "gained": int((after & ~before).sum()),
            "lost": int((before & ~after).sum()),
            "evidence": found.evidence,
            "weight": found.weight,
            "agreement": found.agreement,
            "before": asdict(found.before),
            "after": asdict(found.after),
        }
    return result


INT8_CELLS = (("defocus_blur", 3), ("gaussian_noise", 3), ("fog", 3), ("contrast", 3))


def int8(bench: Bench, cell: tuple[str, int]) -> dict[str, float]:
    """Return the accuracy of an adapted model in FP32, and in INT8 with old and new thresholds.

    Old thresholds are those of the original model on clean images, new ones those of the adapted
    model on its field images.
    """
    images = bench.images(cell)
    field = images[bench.field]
    adapted = adapt(bench.model, field, AdaptConfig(threads=1)).model

    def calibrated(model: onnx.ModelProto, pixels: NDArray[np.uint8], correct_bias: bool = False) -> Calibrated:
        inputs = normalize(pixels, bench.spec.preprocessing)

        def batches(count: int = 0, **_: Any) -> Iterator[NDArray[np.float32]]:
            chosen = inputs[: count or len(inputs)]
            return (chosen[start : start + 4] for start in range(0, len(chosen), 4))

        return calibrate(model, batches, CalibrationConfig(correct_bias=correct_bias))

    old = calibrated(bench.model, bench.clean[bench.reference])
    few = field[:: FIELD // REFERENCE]
    models = {
        "original FP32": bench.model,
        "original INT8": old.model,
        "adapted FP32": adapted,
        "adapted INT8, old thresholds": quantize(adapted, old.points, old.thresholds),
        "adapted INT8, new thresholds": calibrated(adapted, few).model,
        "the same, biases corrected": calibrated(adapted, few, correct_bias=True).model,
    }
    return {name: float(bench.right(model, images).mean()) for name, model in models.items()}


def cost(bench: Bench, rounds: int = 3) -> None:
    """Print the processor time of adapting, divided by that of running the field images."""
    images = bench.clean[bench.field]
    for number in range(rounds):
        started = time.process_time()
        run(bench.model, Preprocessor.of(bench.spec).convert(images))
        middle = time.process_time()
        adapt(bench.model, images, AdaptConfig(threads=1))
        single, whole = middle - started, time.process_time() - middle
        print(f"round {number}: run {single:.2f} s, adapt {whole:.2f} s, ratio {whole / single:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Photographs, WNID/IMAGE.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for the model and the results of cells.")
    parser.add_argument("--extras", action="store_true", help="Measure the four corruptions that mCE does not use.")
    parser.add_argument("--int8", action="store_true", help="Measure INT8 with thresholds from before and after.")
    parser.add_argument("--report", type=Path, metavar="FILE", help="Page to write: NAME.md, with a picture.")
    parser.add_argument("--time", action="store_true", help="Measure the cost of an adaptation.")
    arguments = parser.parse_args()
    if arguments.report:
        write_page(arguments.out, arguments.report)
        return
    use_one_core()
    bench = Bench(arguments.data, arguments.out)
    if arguments.time:
        cost(bench)
        return
    if arguments.int8:
        for cell in INT8_CELLS:
            found = int8(bench, cell)
            path = arguments.out / "int8" / f"{cell[0]}-{cell[1]}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1))
            print(cell, {name: f"{100 * value:.1f}" for name, value in found.items()}, flush=True)
        return
    names = EXTRAS if arguments.extras else CORRUPTIONS
    cells = [CLEAN, *((name, severity) for severity in (3, 5, 1, 4, 2) for name in names)]
    for cell in cells:
        path = arguments.out / "cells" / f"{cell[0]}-{cell[1]}.json"
        if path.exists():
            continue
        result = measure(bench, cell)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1))
        shown = {key: f"{100 * value['forced']:.1f} {value['verdict']}" for key, value in result.items() if "-" in key}
        print(cell, f"{100 * result['before']:.1f}", shown, flush=True)


if __name__ == "__main__":
    main()
