"""INT8 after training: accuracy, speed and memory of our calibration beside ONNX Runtime's.

    python benchmarks/int8.py --data imagenet_dev         EfficientNet-Lite0, ten rows: about ten minutes on two cores

Real ImageNet weights; 256 calibration images spread over `--data` (`WNID/*.JPEG`), accuracy on the others.
Every graph runs with exact Q/DQ arithmetic (`session.disable_quant_qdq`): ONNX Runtime's own INT8 kernels saturate
on CPUs without VNNI. Each row is a process of its own, so that its peak memory is its own. Seconds and memory are of
the calibration; decoded images are counted in both.
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
from real_weights import SOURCE, labelled_images, save_lite0

from calib.config import CalibrationConfig
from calib.graphs import open_session
from calib.ptq import calibrate
from runtime.engine.graph import node_macs, summarise
from runtime.images import fit_all, normalise
from runtime.spec import Preprocessing

BATCH = 4
OURS: dict[str, dict[str, Any]] = {
    "minmax": {"method": "minmax", "correct_bias": False},
    "percentile 99.99": {"method": "percentile", "correct_bias": False},
    "entropy": {"method": "entropy", "correct_bias": False},
    "mse": {"method": "mse", "correct_bias": False},
    "auto": {"method": "auto", "correct_bias": False},
    "auto, bias corrected": {"method": "auto", "correct_bias": True},
}
THEIRS: dict[str, dict[str, Any]] = {
    "ORT MinMax": {"method": "MinMax"},
    "ORT Entropy": {"method": "Entropy"},
    "ORT Percentile 99.99": {"method": "Percentile", "extra": {"CalibPercentile": 99.99}},
}


def batches(paths: list[Path], spec: Preprocessing) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(paths), BATCH):
        yield normalise(fit_all(paths[start : start + BATCH], spec), spec)


def split(data: Path, count: int) -> tuple[list[int], list[int]]:
    """Positions of the calibration images, evenly spread, and of all others."""
    total = len(labelled_images(data)[0])
    chosen = np.unique(np.linspace(0, total - 1, count).astype(int))
    return chosen.tolist(), np.setdiff1d(np.arange(total), chosen).tolist()


def theirs(source: Path, images: list[Path], spec: Preprocessing, method: str, extra: dict[str, Any]) -> Any:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
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


def measure(row: str, source: Path, data: Path, images: int) -> dict[str, float]:
    spec = summarise(source).spec.preprocessing
    paths, labels = labelled_images(data)
    calibration, held = split(data, images)
    chosen = [paths[place] for place in calibration]
    model = onnx.load(source)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    share = 0.0
    if row in OURS:
        result = calibrate(model, lambda count: batches(chosen[: count or None], spec), CalibrationConfig(**OURS[row]))
        quantised, share = result.model, result.int8_share
    elif row in THEIRS:
        options = THEIRS[row]
        quantised = theirs(source, chosen, spec, options["method"], options.get("extra", {}))
        macs = node_macs(model)
        share = sum(count for name, count in macs.items() if quantised_node(quantised, name)) / sum(macs.values())
    else:
        quantised = model
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    session, reference = open_session(quantised), open_session(model)
    right = same = 0
    for start in range(0, len(held), BATCH):
        places = held[start : start + BATCH]
        batch = normalise(fit_all([paths[place] for place in places], spec), spec)
        classes = session.run(None, {"input": batch})[0].argmax(1)
        right += int((classes == np.asarray([labels[place] for place in places])).sum())
        same += int((classes == reference.run(None, {"input": batch})[0].argmax(1)).sum())
    return {
        "top1": right / len(held),
        "agreement": same / len(held),
        "share": share,
        "seconds": seconds,
        "peak_mb": peak,
        "held": len(held),
    }


def quantised_node(model: onnx.ModelProto, name: str) -> bool:
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    node = next(node for node in model.graph.node if node.name == name)
    return all(producers.get(source) == "DequantizeLinear" for source in node.input[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[256], help="Calibration images.")
    parser.add_argument("--rows", nargs="+", default=["float32", *THEIRS, *OURS])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments.source, arguments.data, arguments.images[0])))
        return
    with tempfile.TemporaryDirectory() as name:
        from export.pipeline import export_checkpoint

        weights = save_lite0(Path(name) / "lite0.pth")
        source = export_checkpoint(SOURCE, weights=weights, data=arguments.data, out=Path(name)).onnx
        print(f"{'':22} images  top-1  agrees  INT8 MACs  seconds  peak MB")
        for row in arguments.rows:
            for images in arguments.images:
                command = [sys.executable, __file__, "--row", row, "--source", str(source)]
                command += ["--data", str(arguments.data), "--images", str(images)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{row:22} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
                found = json.loads(done.stdout.strip().splitlines()[-1])
                print(
                    f"{row:22} {images:6} {found['top1']:6.1%} {found['agreement']:7.1%} {found['share']:10.1%} "
                    f"{found['seconds']:8.1f} {found['peak_mb']:8.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
