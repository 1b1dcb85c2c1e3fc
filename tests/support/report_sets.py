"""A small network that classifies digits, in FP32, INT8 and with a planted fault; results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from sklearn.datasets import load_digits

from calib.config import CalibrationConfig
from calib.pipeline import calibrate_file
from runtime.evaluate.models import Model
from runtime.evaluate.results import Result, write_result
from runtime.evaluate.run import evaluate
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from tests.support.evaluation_sets import config, run_config

SIDE = 16
CLASSES = tuple(str(digit) for digit in range(10))


def digit_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return scikit-learn's scans of digits, enlarged: uint8 (N, 16, 16, 3), and their labels."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    return np.stack([pixels] * 3, -1), digits.target


def digit_folder(root: Path, numbers: Sequence[int]) -> Path:
    """Write the images with these numbers as `root/DIGIT/N.png`."""
    images, labels = digit_images()
    for number in numbers:
        folder = root / CLASSES[labels[number]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(folder / f"{number}.png")
    return root


def digit_net(path: Path) -> Path:
    """Write two random convolutions, and a linear layer fitted to 1,500 digits by least squares."""
    random = np.random.default_rng(0)
    weights = {
        "w0": random.normal(0, 0.3, (16, 3, 3, 3)).astype(np.float32),
        "w1": random.normal(0, 0.1, (24, 16, 3, 3)).astype(np.float32),
    }
    images, labels = digit_images()
    inputs_NCHW = ((images[:1500].transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).astype(np.float32)
    session = onnxruntime.InferenceSession(_graph(weights, "f").SerializeToString())
    (features_NF,) = session.run(None, {"input": inputs_NCHW})
    targets_NK = np.eye(10)[labels[:1500]]
    ridge = features_NF.T @ features_NF + 10 * np.eye(features_NF.shape[1])
    weights["head"] = (8 * np.linalg.solve(ridge, features_NF.T @ targets_NK)).astype(np.float32)
    model = _graph(weights, "logits")
    preprocessing = Preprocessing(
        height=SIDE, width=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=1.0
    )
    spec = ModelSpec(arch="digit_net", classes=CLASSES, wnids=(), preprocessing=preprocessing)
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, path)
    return path


def _graph(weights: dict[str, NDArray[np.float32]], output: str) -> onnx.ModelProto:
    head = "logits = MatMul(f, head)" if output == "logits" else ""
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[n, 3, {SIDE}, {SIDE}] input) => (float[n, c] {output}) {{
      a = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(input, w0) b = Relu(a)
      c = Conv<pads = [1, 1, 1, 1]>(b, w1) d = Relu(c)
      e = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d) f = Flatten(e) {head} }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def quantized(source: Path, data: Path, target: Path) -> Path:
    """Write the network in INT8, calibrated by advprop."""
    calibrate_file(source, data, target, CalibrationConfig(images=48), cache=False)
    return target


def with_fault(source: Path, target: Path, place: float = 0.5) -> Path:
    """Write an INT8 file in which one layer's activation scale is ×0.1.

    The layer's input is clipped to a tenth of its range. `place` is the depth of the layer in the
    network, from 0 to 1.
    """
    model = onnx.load(source)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    activations = [
        node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    ]
    faulty = activations[int(place * len(activations))]
    scale = constants[faulty.input[1]]
    value = numpy_helper.to_array(scale)
    scale.CopyFrom(numpy_helper.from_array((value * 0.1).astype(value.dtype), scale.name))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == faulty.output[0]:
            node.input[1] = scale.name
    onnx.save(model, target)
    return target


def results_of(
    models: Sequence[Model], data: Path, out: Path, suite: str = "corruptions", compared: bool = True, **options: Any
) -> list[Path]:
    """Evaluate models, compare them with the first one, and write their results."""
    reference = models[0] if compared else None
    run = run_config(out, batch_size=32)
    paths = []
    for place, result in enumerate(evaluate(models, config(suite, data, **options), run, reference=reference)):
        paths.append(out / f"{place}.{suite}.json")
        write_result(paths[-1], result)
    return paths


def changed(path: Path, target: Path, **changes: Any) -> Path:
    """Write a copy of a JSON file with some top-level keys changed."""
    content: Result = json.loads(path.read_text())
    target.write_text(json.dumps({**content, **changes}))
    return target


def bench_file(path: Path, sha256: str, p50_ms: float, device: str = "a GPU", name: str = "m") -> Path:
    """Write a latency file."""
    model = {"name": name, "sha256": sha256}
    content = {"format": "advprop.bench/1", "model": model, "device": device, "backend": "b", "batch_size": 1}
    path.write_text(json.dumps({**content, "p50_ms": p50_ms}))
    return path


def attack_file(path: Path, sha256: str, name: str = "m") -> Path:
    """Write a file with an attack and its control, on 50 images."""
    steps = (0, 1, 2, 4)
    curves = [
        {"attack": "square", "queries": 500, "points": [{"epsilon": e / 255, "right": 45 - 10 * e} for e in steps]},
        {"attack": "noise", "points": [{"epsilon": e / 255, "right": 45 - e} for e in steps]},
    ]
    model = {"name": name, "sha256": sha256}
    content = {"format": "advprop.attack/1", "model": model, "images": 50, "names_sha256": "x", "seed": 0}
    path.write_text(json.dumps({**content, "curves": curves}))
    return path
