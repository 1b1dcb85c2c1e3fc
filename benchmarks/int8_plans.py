"""Measure TensorRT-RTX engines of FP32, FP16 and INT8 graphs: size, INT8 share, memory traffic.

    python -m benchmarks.int8_plans --data imagenet_dev    three networks, SM 89: about three minutes
    python -m benchmarks.int8_plans --data imagenet_dev --sm 75 80 86 120 --variants fp16 int8 int8-best
    python -m benchmarks.int8_plans --data imagenet_dev --nets resnet18 --variants int8 --layers

Engines are only built, which needs no GPU. EfficientNet-Lite0 has its ImageNet weights, the other
networks have random weights. Thresholds are the largest magnitudes on 32 images of `--data`,
because the plan contains a separate kernel for each threshold. "moved" is the memory traffic: the
bytes of activations that all kernels read and write per image. Less traffic is better, but is not a
measure of time.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import helper, numpy_helper

import runtime
from calib import collect_amax
from calib.images import calibration_set
from calib.placement import points_of, residual_inputs
from calib.precision import to_reduced
from calib.quantize import quantize
from export.source import load_source
from export.to_onnx import to_onnx
from runtime.engine.flavors import choose_flavor, native_logger
from runtime.engine.int8 import int8_layers
from runtime.engine.layers import layers_of_log
from tests.support.real_weights import ARCH, SOURCE, save_lite0

IMAGES = 32
NETS = ("resnet18", "efficientnet_b0", ARCH)


def int8(
    model: onnx.ModelProto,
    thresholds: dict[str, float],
    leave: tuple[str, ...] = (),
    residuals: bool = False,
    half: bool = True,
) -> onnx.ModelProto:
    """Return the Q/DQ graph that `calib` creates with the options `leave` and `residuals`."""
    points = points_of(model, leave=leave)
    found = residual_inputs(model, points) if residuals else ()
    quantized = quantize(model, points, thresholds, residuals=found)
    return to_reduced(quantized, "fp16") if half else quantized


def one_scale(model: onnx.ModelProto, factors: bool = True) -> onnx.ModelProto:
    """Use one weight scale per convolution, a power of two, and rescale the output channels.

    Args:
        model: an FP16 Q/DQ graph, which is changed.
        factors: multiply by the factors. Without them, the plan is that of weights quantized per
            tensor, but the outputs are wrong.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        back = producers.get(node.input[1]) if node.op_type == "Conv" else None
        if back is None or back.op_type != "DequantizeLinear":
            continue
        scales = numpy_helper.to_array(tensors[back.input[1]])
        one = np.asarray(2.0 ** np.ceil(np.log2(scales.max())), scales.dtype)
        new = {"one": one, "zero": np.zeros((), np.int8), "factors": (scales / one).reshape(1, -1, 1, 1)}
        model.graph.initializer.extend(
            numpy_helper.from_array(value, f"{node.name}_{key}") for key, value in new.items()
        )
        del back.attribute[:]
        back.input[1], back.input[2] = f"{node.name}_one", f"{node.name}_zero"
        if not factors:
            continue
        result, raw, scaled = node.output[0], f"{node.name}_raw", f"{node.name}_scaled"
        node.output[0] = raw
        nodes.append(helper.make_node("Mul", [raw, f"{node.name}_factors"], [scaled], name=f"{node.name}_mul"))
        if len(node.input) == 3:
            bias = numpy_helper.to_array(tensors[node.input[2]]).reshape(1, -1, 1, 1)
            model.graph.initializer.append(numpy_helper.from_array(bias, f"{node.name}_bias"))
            nodes.append(helper.make_node("Add", [scaled, f"{node.name}_bias"], [result], name=f"{node.name}_add"))
            del node.input[2]
        else:
            nodes[-1].output[0] = result
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return model


def listed_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert the scales of activations to lists with one number, as some exporters write them."""
    names = {name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.input[1:]}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.dims.append(1)
    return model


BEST = ("depthwise", "gates")
Maker = Callable[[onnx.ModelProto, dict[str, float]], onnx.ModelProto]
VARIANTS: dict[str, Maker] = {
    "fp32": lambda model, _: model,
    "fp16": lambda model, _: to_reduced(model, "fp16"),
    "int8": int8,
    "int8-rest-fp32": lambda model, limits: int8(model, limits, half=False),
    "int8-residuals": lambda model, limits: int8(model, limits, residuals=True),
    "int8-one-scale": lambda model, limits: one_scale(int8(model, limits)),
    "int8-per-tensor": lambda model, limits: one_scale(int8(model, limits), factors=False),
    "int8-no-depthwise": lambda model, limits: int8(model, limits, ("depthwise",)),
    "int8-no-depthwise-no-gates": lambda model, limits: int8(model, limits, BEST),
    "int8-best": lambda model, limits: one_scale(int8(model, limits, BEST, residuals=True)),
    "int8-listed-scales": lambda model, limits: listed_scales(int8(model, limits)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Measurements of an engine. Sizes are in bytes."""

    plan: int
    zipped: int
    weights: int
    moved: int
    kernels: int
    layers: list[runtime.engine.int8.LayerReport]

    @property
    def share(self) -> float:
        return sum(layer.macs for layer in self.layers if layer.int8) / sum(layer.macs for layer in self.layers)


def float_graph(name: str, folder: Path, data: Path) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Return the float32 graph, and the largest magnitude of each of its tensors."""
    weights = folder / "weights.pth"
    if name == ARCH:
        source = load_source(SOURCE, weights=save_lite0(weights))
    else:
        torch.manual_seed(0)
        options = (
            {"zero_init_last": False} if name.startswith("resnet") else {}
        )  # the plan would store identical zero weights once
        torch.save(timm.create_model(name, **options).state_dict(), weights)
        source = load_source(f"timm:{name}", weights=weights)
    model, preprocessing = to_onnx(source.model, source.spec), source.spec.preprocessing
    images = calibration_set(data, IMAGES, preprocessing)
    return model, collect_amax(model, images.batches(preprocessing, IMAGES))


def built(model: onnx.ModelProto, folder: Path, sm: int, batch: tuple[int, int, int]) -> Built:
    path = folder / "model.onnx"
    onnx.save(model, path)
    runtime.build(path, sm=(sm,), batch=batch, flavor="tensorrt_rtx")
    layers = layers_of_log(native_logger(choose_flavor("tensorrt_rtx", (sm,))).listing)
    plan = path.with_suffix(".engine").read_bytes()
    return Built(
        plan=len(plan),
        zipped=len(zlib.compress(plan)),
        weights=sum(tensor.bytes for layer in layers for tensor in layer.constants),
        moved=sum(layer.moved_bytes for layer in layers) // (batch[0] if batch[0] == batch[2] else 1),
        kernels=sum(layer.kind not in ("signal", "wait", "shape_call") for layer in layers),
        layers=list(int8_layers(path, layers, sms=(sm,))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of photographs for calibration.")
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--sm", nargs="+", type=int, default=[89])
    parser.add_argument("--batch", nargs=3, type=int, default=[1, 8, 32], metavar=("MIN", "OPT", "MAX"))
    parser.add_argument("--layers", action="store_true", help="List the layers of each engine.")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    print(
        "net                     SM variant                    plan ÷ FP16  zipped weights   moved kernels  INT8 MACs"
    )
    for name in arguments.nets:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model, limits = float_graph(name, folder, arguments.data)
            for sm in arguments.sm:
                half = built(VARIANTS["fp16"](model, limits), folder, sm, arguments.batch).plan
                for variant in arguments.variants:
                    found = built(VARIANTS[variant](model, limits), folder, sm, arguments.batch)
                    print(
                        f"{name:22} {sm:3} {variant:25} {found.plan / 1e6:6.1f} {found.plan / half:6.2f} "
                        f"{found.zipped / 1e6:7.1f} {found.weights / 1e6:7.1f} {found.moved / 1e6:7.1f} "
                        f"{found.kernels:7} {sum(layer.int8 for layer in found.layers):4}/{len(found.layers)} "
                        f"{found.share:6.1%}",
                        flush=True,
                    )
                    for layer in found.layers if arguments.layers else ():
                        print(f"    {layer.node:20} {layer.op:5} {layer.macs:12,} {layer.computes:5} {layer.why}")


if __name__ == "__main__":
    main()
