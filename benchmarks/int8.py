"""Compare INT8 calibration with ONNX Runtime's: accuracy, robustness, time and memory.

    python -m benchmarks.int8 --val imagenet_dev
        EfficientNet-Lite0 with its ImageNet weights: about fifteen minutes on two cores
    python -m benchmarks.int8 --net runs/resnet18/best.pt --calib cifar10/train --val cifar10/val --corrupted 500
        an advprop checkpoint; also the mean error on 500 images under 15 corruptions × 5 severities

Without `--calib`, 256 evenly spaced images of `--val` (`CLASS/*`) are used for calibration, and
accuracy is measured on the others. For a budget, a quarter of the calibration images is held out.
Every graph runs with exact Q/DQ arithmetic (`session.disable_quant_qdq`), because ONNX Runtime's
INT8 kernels saturate on CPUs without VNNI. Each row runs in a separate process, to measure its peak
memory. Time and memory are those of the calibration, including decoding. The corruption `frost`
needs the textures of imagecorruptions-imaug; without them it is skipped, with a message.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.config import CalibrationConfig
from calib.images import Adversary, CalibrationImage, CalibrationSet
from calib.ptq import calibrate
from runtime.errors import BackendUnavailable
from runtime.graph.model import open_session
from runtime.graph.structure import node_macs
from runtime.graph.summary import summarize
from runtime.preprocessing import Preprocessor, normalize
from runtime.spec import ModelSpec, Preprocessing
from runtime.system.files import sha256_file
from runtime.system.image_sources import image_paths, spread
from tests.support.real_weights import SOURCE, labeled_images, save_lite0

BATCH = 4
OURS: dict[str, dict[str, Any]] = {
    "minmax": {"method": "minmax", "correct_bias": False},
    "percentile 99.99": {"method": "percentile", "correct_bias": False},
    "entropy": {"method": "entropy", "correct_bias": False},
    "mse": {"method": "mse", "correct_bias": False},
    "auto": {"method": "auto", "correct_bias": False},
    "auto, bias corrected": {},
    "+ equalized": {"equalize": True},
    "+ reconstructed": {"reconstruct": True},
    "+ budget 0.5": {"budget": 0.5},
    "+ clean, corrupted": {"mix": ("clean", "corrupted")},
    "+ clean, adversarial": {"mix": ("clean", "adversarial")},
    "+ all three": {"mix": ("clean", "corrupted", "adversarial")},
    "+ all three, budget 0.5": {"mix": ("clean", "corrupted", "adversarial"), "budget": 0.5},
}
THEIRS: dict[str, dict[str, Any]] = {
    "ORT MinMax": {"method": "MinMax"},
    "ORT Entropy": {"method": "Entropy"},
    "ORT Percentile 99.99": {"method": "Percentile", "extra": {"CalibPercentile": 99.99}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", type=Path, help="Checkpoint (default: EfficientNet-Lite0).")
    parser.add_argument("--val", type=Path, required=True, help="Labeled images, CLASS/*.")
    parser.add_argument("--calib", type=Path, help="Folder of calibration images (default: images of --val).")
    parser.add_argument("--images", type=int, nargs="+", default=[256], help="Numbers of calibration images.")
    parser.add_argument("--corrupted", type=int, default=0, help="Number of images to measure under all corruptions.")
    parser.add_argument("--rows", nargs="+", default=["float32", *THEIRS, *OURS])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.folder, arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = export(arguments, folder)
        if arguments.corrupted:
            store_corrupted(arguments, spec, folder)
        heading = "  mean corruption error" if arguments.corrupted else ""
        print(f"{'':26} images   top-1  agrees  INT8 MACs  seconds  peak MB{heading}")
        for row in arguments.rows:
            for images in arguments.images:
                show(row, images, run(row, images, folder))


def export(arguments: argparse.Namespace, folder: Path) -> ModelSpec:
    from export.config import ExportConfig
    from export.pipeline import export_checkpoint

    if arguments.net is None:
        weights = save_lite0(folder / "lite0.pth")
        source = export_checkpoint(SOURCE, ExportConfig(weights=weights, data=arguments.val, out=folder)).onnx
    else:
        source = export_checkpoint(arguments.net, ExportConfig(out=folder)).onnx
    spec = summarize(source).spec
    assert spec is not None
    return spec


def run(row: str, images: int, folder: Path) -> dict[str, float] | str:
    command = [
        sys.executable,
        "-m",
        "benchmarks.int8",
        *sys.argv[1:],
        "--row",
        row,
        "--folder",
        str(folder),
        "--images",
        str(images),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def show(row: str, images: int, found: dict[str, float] | str) -> None:
    if isinstance(found, str):
        print(f"{row:26} failed: {found}", flush=True)
        return
    line = (
        f"{row:26} {images:6} {found['top1']:7.2%} {found['agreement']:7.2%} {found['share']:10.1%} "
        f"{found['seconds']:8.1f} {found['peak_mb']:8.0f}"
    )
    if "corrupted" in found:
        line += f"  {found['corrupted']:.2%}"
    print(line, flush=True)


def batch_size(spec: Preprocessing) -> int:
    """Return the batch size for measuring accuracy."""
    return 64 if spec.height <= 64 else BATCH


def batches(paths: list[Path], spec: Preprocessing, size: int = BATCH) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(paths), size):
        yield Preprocessor(spec)(paths[start : start + size])


def labeled(folder: Path, spec: ModelSpec) -> tuple[list[Path], list[int]]:
    """Return the images of `folder/CLASS/*`, and the index of each image's class."""
    if spec.wnids:
        return labeled_images(folder)
    places = {name: place for place, name in enumerate(spec.classes)}
    paths = sorted(path for path in folder.glob("*/*") if path.parent.name in places)
    return paths, [places[path.parent.name] for path in paths]


def split(arguments: argparse.Namespace, spec: ModelSpec) -> tuple[Path, list[Path], list[Path], list[int]]:
    """Return the calibration folder and images, and the validation images with their labels."""
    paths, labels = labeled(arguments.val, spec)
    if arguments.calib is not None:
        others = image_paths(arguments.calib)
        return arguments.calib, spread(others, arguments.images[0]), paths, labels
    chosen = set(np.unique(np.linspace(0, len(paths) - 1, arguments.images[0]).astype(int)).tolist())
    left = [place for place in range(len(paths)) if place not in chosen]
    return (
        arguments.val,
        [paths[place] for place in sorted(chosen)],
        [paths[place] for place in left],
        [labels[place] for place in left],
    )


def measure(row: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    source = folder / "model.onnx"
    spec = summarize(source).spec
    assert spec is not None
    root, chosen, held, labels = split(arguments, spec)
    model = onnx.load(source)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    share = 0.0
    if row in OURS:
        quantized, share = ours(model, root, chosen, spec, CalibrationConfig(**OURS[row]), arguments.net)
    elif row in THEIRS:
        options = THEIRS[row]
        quantized = theirs(source, chosen, spec.preprocessing, options["method"], options.get("extra", {}))
        macs = node_macs(model)
        share = sum(count for name, count in macs.items() if is_quantized(quantized, name)) / sum(macs.values())
    else:
        quantized = model
    found = {
        "share": share,
        "seconds": time.perf_counter() - began,
        "peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024,
    }
    session, reference = open_session(quantized), open_session(model)
    logits, expected = [], []
    for batch in batches(held, spec.preprocessing, batch_size(spec.preprocessing)):
        logits.append(session.run(None, {"input": batch})[0].argmax(1))
        expected.append(reference.run(None, {"input": batch})[0].argmax(1))
    classes = np.concatenate(logits)
    found |= {
        "top1": float((classes == np.asarray(labels)).mean()),
        "agreement": float((classes == np.concatenate(expected)).mean()),
    }
    if arguments.corrupted:
        found["corrupted"] = mean_corruption_error(session, folder, spec.preprocessing)
    return found


def ours(
    model: onnx.ModelProto,
    root: Path,
    chosen: list[Path],
    spec: ModelSpec,
    config: CalibrationConfig,
    checkpoint: Path | None,
) -> tuple[onnx.ModelProto, float]:
    images = [CalibrationImage(path.relative_to(root).as_posix(), sha256_file(path)) for path in chosen]
    apart = set(images[3::4]) if config.budget is not None else set()
    chosen_set = CalibrationSet(
        source=root,
        images=tuple(image for image in images if image not in apart),
        held=tuple(apart and images[3::4]),
        mix=config.mix,
    )
    adversary = attacker(checkpoint) if "adversarial" in config.mix else None
    preprocessing = spec.preprocessing

    def held(kind: str) -> Any:
        return lambda: chosen_set.batches(preprocessing, kinds=(kind,), held=True, adversary=adversary)

    result = calibrate(
        model,
        lambda count: chosen_set.batches(preprocessing, count, adversary=adversary),
        config,
        held={kind: held(kind) for kind in config.mix} if apart else None,
    )
    return result.model, result.int8_share


def attacker(checkpoint: Path | None) -> Adversary:
    from export.adversary import adversary_of
    from export.source import load_source

    if checkpoint is not None:
        return adversary_of(load_source(checkpoint))
    with tempfile.TemporaryDirectory() as name:
        return adversary_of(load_source(SOURCE, weights=save_lite0(Path(name) / "lite0.pth")))


def theirs(source: Path, images: list[Path], spec: Preprocessing, method: str, extra: dict[str, Any]) -> Any:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.left = batches(images, spec)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"input": batch}

    target = source.with_name("theirs.onnx")
    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, **extra},
    )
    return onnx.load(target)


def is_quantized(model: onnx.ModelProto, name: str) -> bool:
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    node = next(node for node in model.graph.node if node.name == name)
    return all(producers.get(source) == "DequantizeLinear" for source in node.input[:2])


def store_corrupted(arguments: argparse.Namespace, spec: ModelSpec, folder: Path) -> None:
    """Store images under every corruption and severity, once for all rows."""
    from runtime.evaluate.corruptions import CORRUPTIONS, corrupt

    _, _, paths, labels = split(arguments, spec)
    chosen = spread(list(zip(paths, labels, strict=True)), arguments.corrupted)
    fitted = Preprocessor(spec.preprocessing).fit([path for path, _ in chosen])
    np.save(folder / "labels.npy", [label for _, label in chosen])
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            try:
                few = [corrupt(image, name, severity, key=str(key)) for key, image in enumerate(fitted)]
            except BackendUnavailable as error:
                print(f"skipped {name}: {error}")
                break
            np.save(folder / f"{name}-{severity}.npy", np.stack(few))


def mean_corruption_error(session: Any, folder: Path, spec: Preprocessing) -> float:
    labels = np.load(folder / "labels.npy")
    errors = []
    for path in sorted(folder.glob("*-[1-5].npy")):
        images = np.load(path)
        size = batch_size(spec)
        classes = [
            session.run(None, {"input": normalize(images[start : start + size], spec)})[0].argmax(1)
            for start in range(0, len(images), size)
        ]
        errors.append(float((np.concatenate(classes) != labels).mean()))
    return float(np.mean(errors))


if __name__ == "__main__":
    main()
