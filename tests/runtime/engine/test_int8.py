"""Reports on quantized layers, with engines that TensorRT-RTX built."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import runtime
from advprop.cli import main
from calib.placement import points_of
from calib.precision import to_reduced
from calib.quantize import quantize
from runtime.engine.int8 import LayerReport, Reason, summary_of, warn_about_floats
from runtime.engine.layers import layers_of_json, layers_of_log
from runtime.engine.sidecar import EngineInfo, read_sidecar, sidecar_path
from runtime.errors import ModelFileError
from tests.support.networks import graph

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")

CONVOLUTIONS = ["Conv_0", "Conv_2", "Conv_4"]


def quantized(path: Path, keep: tuple[str, ...] = (), half: bool = True, flat: bool = True) -> Path:
    """Write a dense, a depthwise and a pointwise convolution and a Gemm, with Q/DQ nodes."""
    random = np.random.default_rng(0)
    model = graph(
        """a = Conv<pads=[1, 1, 1, 1]>(input, w1, b1) r = Relu(a)
        d = Conv<group=16, pads=[1, 1, 1, 1]>(r, w2) s = Relu(d)
        e = Conv(s, w3) p = GlobalAveragePool(e) f = Flatten(p) logits = Gemm<transB=1>(f, w4)""",
        w1=random.normal(size=(16, 3, 3, 3)),
        b1=random.normal(size=16),
        w2=random.normal(size=(16, 1, 3, 3)),
        w3=random.normal(size=(32, 16, 1, 1)),
        w4=random.normal(size=(4, 32)),
    )
    points = points_of(model, keep)
    model = quantize(model, points, {point.tensor: 4.0 for point in points})
    if half:
        model = to_reduced(model, "fp16")
    if not flat:
        activations = {name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.input[1:]}
        for tensor in model.graph.initializer:
            if tensor.name in activations:
                tensor.dims.append(1)
    onnx.save(model, path)
    return path


def by_node(info: EngineInfo) -> dict[str, LayerReport]:
    return {layer.node: layer for layer in info.layers}


def types_in_plan(plan: bytes) -> dict[str, tuple[str, ...]]:
    """Return the types of each convolution's output and inputs, from the plan's program text."""
    text = plan.decode("latin-1")
    types = dict(re.findall(r'  tensor=\{[^\n]*? name="([^"\n]*)"[^\n]* type=(\w+) \}', text))
    found = re.findall(r'  corrltn=\{ name="([^"]*)" output=\{"([^"]*)" \} input=\{"([^"]*)" "([^"]*)"', text)
    return {name: tuple(types[tensor] for tensor in tensors) for name, *tensors in found}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    runtime.build(quantized(folder / "a.onnx"), sm=(89,), flavor="tensorrt_rtx")
    return folder / "a.engine"


def test_every_layer_is_in_int8_and_the_plan_confirms_it(engine: Path) -> None:
    layers = by_node(read_sidecar(engine))
    assert {name: (layer.op, layer.macs) for name, layer in layers.items()} == {
        "Conv_0": ("Conv", 64 * 16 * 27),
        "Conv_2": ("Conv", 64 * 16 * 9),
        "Conv_4": ("Conv", 64 * 32 * 16),
        "Gemm_7": ("Gemm", 4 * 32),
    }
    assert all(layer.quantized and layer.int8 for layer in layers.values())
    depthwise = layers["Conv_2"]
    assert depthwise.why == "its 16 channels are padded to 64, writes fp32"
    assert (depthwise.channels, depthwise.padded_channels, depthwise.writes_fp32) == (16, 64, True)
    assert [name for name, layer in layers.items() if layer.is_padded] == ["Conv_2"]
    assert types_in_plan(engine.read_bytes()) == dict.fromkeys(CONVOLUTIONS, ("float", "int8", "int8"))


@pytest.mark.parametrize(
    ("sm", "flat", "reason", "text"),
    [
        (75, True, Reason.OLD_TARGET, "no INT8 convolutions for SM 75"),
        (89, False, Reason.LIST_SCALE, "the scale of its input is a list with one number"),
    ],
)
def test_convolutions_that_the_builder_dequantizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sm: int, flat: bool, reason: Reason, text: str
) -> None:
    source = quantized(tmp_path / "a.onnx", flat=flat)
    layers = by_node(runtime.build(source, sm=(sm, 120), flavor="tensorrt_rtx"))
    for name in CONVOLUTIONS:
        assert layers[name].computes == "fp16"
        assert layers[name].reason is reason
        assert text in layers[name].why
    assert layers["Gemm_7"].int8
    assert "3 of 4 quantized layers are computed in floating point, starting with Conv_0" in caplog.text
    assert "build FP16 (--trt fp16)" in caplog.text
    plan = (tmp_path / "a.engine").read_bytes()
    assert types_in_plan(plan) == dict.fromkeys(CONVOLUTIONS, ("half", "half", "half"))
    weight = next(tensor for tensor in onnx.load(source).graph.initializer if list(tensor.dims) == [32, 16, 1, 1])
    assert numpy_helper.to_array(weight).tobytes() in plan  # the plan stores int8 anyway


def test_layers_that_are_not_quantized_have_no_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = runtime.build(quantized(tmp_path / "a.onnx", keep=("Conv_2",)), sm=(89,), flavor="tensorrt_rtx")
    layers = by_node(info)
    kept = layers["Conv_2"]
    assert (kept.quantized, kept.int8, kept.computes) == (False, False, "fp16")
    assert (kept.reason, kept.why) == (Reason.NONE, "")
    assert layers["Conv_0"].int8
    assert "computed in floating point" not in caplog.text
    assert summary_of(info.layers) == "3 of 4 layers, 86.8% of the MACs"


def test_the_other_layers_may_be_in_fp32(tmp_path: Path) -> None:
    info = runtime.build(quantized(tmp_path / "a.onnx", keep=("Conv_4",), half=False), sm=(86,), flavor="tensorrt_rtx")
    assert [layer.computes for layer in info.layers] == ["int8", "int8", "fp32", "int8"]


def test_a_transposed_convolution_has_no_int8_kernel(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    body = "a = ConvTranspose(input, w) r = Relu(a) p = GlobalAveragePool(r) logits = Flatten(p)"
    model = graph(body, w=random.normal(size=(3, 4, 2, 2)))
    points = points_of(model)
    onnx.save(quantize(model, points, {"input": 4.0}), tmp_path / "a.onnx")
    (layer,) = runtime.build(tmp_path / "a.onnx", sm=(89,), flavor="tensorrt_rtx").layers
    assert (layer.computes, layer.reason) == ("fp32", Reason.NO_KERNEL)
    assert layer.why == "TensorRT-RTX has no INT8 ConvTranspose"


def test_a_convolution_that_adds_a_residual(tmp_path: Path) -> None:
    """With one scale for all weights, bias, ReLU and an FP16 residual join the INT8 kernel."""
    random = np.random.default_rng(0)
    body = """a = Conv(input, w1) b = Conv<pads=[1, 1, 1, 1]>(a, w2) s = Add(b, a) r = Relu(s)
        p = GlobalAveragePool(r) logits = Flatten(p)"""
    model = graph(body, w1=random.normal(size=(4, 3, 1, 1)), w2=random.normal(size=(4, 4, 3, 3)))
    model = to_reduced(quantize(model, points_of(model), {"input": 4.0, "a": 4.0}), "fp16")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.attribute:
            for name in node.input[1:]:
                first = numpy_helper.to_array(tensors[name])[0]
                tensors[name].CopyFrom(numpy_helper.from_array(np.asarray(first), name))
            del node.attribute[:]
    onnx.save(model, tmp_path / "a.onnx")
    layers = by_node(runtime.build(tmp_path / "a.onnx", sm=(89,), flavor="tensorrt_rtx"))
    assert {name: (layer.computes, layer.why) for name, layer in layers.items()} == dict.fromkeys(
        ["Conv_0", "Conv_1"], ("int8", "")
    )
    plan = (tmp_path / "a.engine").read_bytes()
    assert types_in_plan(plan) == dict.fromkeys(["Conv_0", "Conv_1"], ("half", "int8", "int8"))
    assert re.search(rb'corrltn=\{ name="Conv_1"[^\n]* relu=true [^\n]* accu=true', plan)


def test_an_int8_plan_that_saves_no_space_causes_a_warning(
    engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.build(engine.with_suffix(".onnx"), tmp_path / "a.engine", sm=(89,), flavor="tensorrt_rtx")
    assert "outweigh the savings" in caplog.text
    assert "1 grouped convolutions, starting with Conv_2" in caplog.text


def test_build_and_inspect_report_int8(engine: Path, tmp_path: Path) -> None:
    arguments = ["build", str(engine.with_suffix(".onnx")), "--out", str(tmp_path / "a.engine"), "--sm", "89"]
    built = CliRunner().invoke(main, arguments)
    assert "in INT8: 4 of 4 layers, 100.0% of the MACs" in built.output.replace("\n", " ")
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.engine")]).output
    assert "4 of 4 layers, 100.0% of the MACs" in shown
    assert re.search(r"Conv_2 +│ Conv +│ 0\.01 M +│ yes +│ int8", shown)


def test_sidecars_without_layers_and_with_invalid_layers(engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a.engine"
    copy.write_bytes(engine.read_bytes())
    content = json.loads(sidecar_path(engine).read_text())
    del content["layers"]
    sidecar_path(copy).write_text(json.dumps(content))
    assert read_sidecar(copy) == dataclasses.replace(read_sidecar(engine), layers=())
    sidecar_path(copy).write_text(json.dumps(content | {"layers": [{"node": 1}]}))
    with pytest.raises(ModelFileError, match="is not an engine's sidecar"):
        read_sidecar(copy)


def test_sidecars_of_version_0_1_are_read(engine: Path, tmp_path: Path) -> None:
    """They have British names, and a text instead of a reason."""
    copy = tmp_path / "a.engine"
    copy.write_bytes(engine.read_bytes())
    content = json.loads(sidecar_path(engine).read_text())
    content["flavour"] = content.pop("flavor")
    for layer in content["layers"]:
        layer["quantised"] = layer.pop("quantized")
        for name in ("reason", "channels", "padded_channels", "writes_fp32"):
            del layer[name]
    sidecar_path(copy).write_text(json.dumps(content))
    info, current = read_sidecar(copy), read_sidecar(engine)
    assert info.flavor == "tensorrt_rtx"
    assert [(layer.node, layer.quantized, layer.computes, layer.why) for layer in info.layers] == [
        (layer.node, layer.quantized, layer.computes, layer.why) for layer in current.layers
    ]
    assert {layer.reason for layer in info.layers} == {Reason.UNSTATED}


def test_unknown_formats_give_no_layers() -> None:
    assert layers_of_log("Layers:\nsomething else\n") == layers_of_log("") == []
    assert layers_of_json("no JSON") == layers_of_json('{"Layers": ["conv1"]}') == []


def test_the_engine_inspectors_json_is_parsed() -> None:
    """Both notations of a type, from the examples in NVIDIA's documentation."""
    conv = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 32, 28, 28], "Format/Datatype": "Thirty-two wide Int8 format"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 64, 28, 28], "Format/Datatype": "Row major linear FP16 format"}],
        "Weights": {"Type": "Int8", "Count": 2048},
        "Metadata": "[ONNX Layer: conv1]\x1f[ONNX Layer: relu1]",
    }
    gemm = {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Dimensions": [1, 8], "Datatype": "Half"}]}
    first, second = layers_of_json(json.dumps({"Layers": [conv, gemm]}))
    assert [tensor.type for tensor in (*first.inputs, *first.constants, *first.outputs)] == ["int8", "int8", "fp16"]
    assert (set(first.nodes), first.moved_bytes) == ({"conv1", "relu1"}, 32 * 784 + 2 * 64 * 784)
    assert (second.inputs[0].type, second.nodes, second.moved_bytes) == ("fp16", frozenset(), 16)


def test_the_warning_depends_on_the_share_of_int8(caplog: pytest.LogCaptureFixture) -> None:
    def layer(name: str, macs: int, computes: str) -> LayerReport:
        return LayerReport(node=name, op="Conv", macs=macs, quantized=True, computes=computes, why="")

    warn_about_floats([layer("a", 90, "int8"), layer("b", 10, "fp16")])
    assert "1 of 2 quantized layers" in caplog.text
    assert "--trt fp16" not in caplog.text
    warn_about_floats([layer("a", 10, "int8"), layer("b", 90, "fp16")])
    assert "--trt fp16" in caplog.text
