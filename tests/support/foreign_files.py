"""ONNX classifiers as other tools write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import numpy_helper

HEIGHT, WIDTH, CLASSES = 8, 12, 5
COLOR_MEANS = "p = GlobalAveragePool(x) f = Flatten(p) scores = Gemm <transB = 1> (f, w)"
"""Scores that depend on the mean of each channel of `x`, (N, 3, H, W)."""
WEIGHTS = np.random.default_rng(2).normal(size=(CLASSES, 3))


def write_graph(
    path: Path, body: str, image: str, scores: str = "float[n, 5] scores", opset: int = 13, /, **weights: ArrayLike
) -> Path:
    """Write a graph from `image`, such as "float[n, 3, 8, 12] image", to `scores`."""
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]> g ({image}) => ({scores}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        values = np.asarray(array)
        floats = values if values.dtype.kind == "i" else values.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(floats, name))
    onnx.save(model, path)
    return path


def write_network(path: Path, opset: int = 13, batch: str = "1", size: str = "8, 12") -> Path:
    """Write a network with a fixed batch, a BatchNorm, weights in Constant nodes and no node names."""
    random = np.random.default_rng(0)
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    g (float[{batch}, 3, {size}] image) => (float[{batch}, {CLASSES}] scores) {{
        a = Conv(image, w1)
        n = BatchNormalization(a, gamma, beta, mean, variance)
        r = Relu(n)
        p = GlobalAveragePool(r)
        f = Flatten(p)
        scores = Gemm <transB = 1> (f, w2, bias)
    }}"""
    model = onnx.parser.parse_model(text)
    arrays = {
        "w1": random.normal(size=(6, 3, 3, 3)),
        "gamma": random.uniform(0.5, 2, 6),
        "beta": random.normal(size=6),
        "mean": random.normal(size=6),
        "variance": random.uniform(0.5, 2, 6),
        "w2": random.normal(size=(CLASSES, 6)),
        "bias": random.normal(size=CLASSES),
    }
    for name, array in arrays.items():
        value = numpy_helper.from_array(array.astype(np.float32))
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=value))
    onnx.save(model, path)
    return path
