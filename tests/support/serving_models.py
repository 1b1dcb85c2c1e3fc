"""Small real models for tests of serving. The images decide how long they run, or that they fail.

An image is float32, (3, 4, 4), and the logits of each model are the means of its colors.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import runtime
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing

SPEC = ModelSpec(
    arch="toy",
    classes=("red", "green", "blue"),
    preprocessing=Preprocessing(
        height=4, width=4, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest", crop_pct=1.0
    ),
)
MEAN = "p = GlobalAveragePool(input) logits = Flatten(p)"
SLOW = """
    largest = ReduceMax <keepdims=0> (input) trips = Cast <to=7> (largest) go = Constant <value = bool {1}> ()
    zero = Constant <value = float {0}> ()
    last = Loop (trips, go, zero) <body = work (int64 i, bool c, float x) => (bool d, float y) {
        d = Identity(c) y = Sin(x)
    }>
    p = GlobalAveragePool(input) q = Flatten(p) none = Mul(last, zero) logits = Add(q, none)
"""
"""Repeats a loop as often as the largest number in the batch."""
LONG = 400_000.0
"""An image with this value makes the slow model run for about half a second."""
FRAGILE = """
    largest = ReduceMax <keepdims=0> (input) index = Cast <to=7> (largest)
    table = Constant <value = float[1] {0}> () none = Gather(table, index)
    p = GlobalAveragePool(input) q = Flatten(p) logits = Add(q, none)
"""
"""Fails on a CPU on a batch that contains a number of 1 or more: it looks up an index beyond the end of
a table, which CUDA does not check."""


def serving_model(body: str = MEAN, batch: str = "n", size: str = "4, 4") -> onnx.ModelProto:
    """Return a model with the given body and input shape, and a spec."""
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float[{batch}, 3, {size}] input) => (float[{batch}, 3] logits) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    onnx.helper.set_model_props(model, {METADATA_KEY: SPEC.to_json()})
    return model


def images_of(*values: float) -> NDArray[np.float32]:
    """Return one image per value, filled with it."""
    return np.repeat(np.asarray(values, np.float32), 48).reshape(-1, 3, 4, 4)


def open_session(folder: Path, body: str = MEAN, device: str = "auto", **batching: int) -> runtime.Session:
    """Open a session on a model with the given body, with the given settings of the batcher."""
    onnx.save(serving_model(body), folder / "m.onnx")
    settings = runtime.Batching(**batching)
    return runtime.load(folder / "m.onnx", device=device, threads=1, warm_up=(1,), batching=settings)


def busy(session: runtime.Session) -> Future[Any]:
    """Submit a long request, and return once it runs."""
    future = session.submit(images_of(LONG))
    while session.stats.batcher.waiting_images:
        time.sleep(0.001)
    return future
