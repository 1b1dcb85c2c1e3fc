import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from export.fold import BatchNormToAffine, FoldBatchNorm

CHANNELS = 6

GRAPHS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "conv": ("[n, 4, 8, 8]", "y = Conv<pads=[1, 1, 1, 1]>(x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}),
    "conv without bias": ("[n, 4, 8, 8]", "y = Conv(x, w)", {"w": (6, 4, 3, 3)}),
    "depthwise": ("[n, 6, 8, 8]", "y = Conv<group=6>(x, w)", {"w": (6, 1, 3, 3)}),
    "grouped": ("[n, 4, 8, 8]", "y = Conv<group=2>(x, w, b)", {"w": (6, 2, 3, 3), "b": (6,)}),
    "transposed": ("[n, 4, 8, 8]", "y = ConvTranspose<strides=[2, 2]>(x, w, b)", {"w": (4, 6, 2, 2), "b": (6,)}),
    "grouped transposed": ("[n, 4, 8, 8]", "y = ConvTranspose<group=2>(x, w)", {"w": (4, 3, 2, 2)}),
    "gemm": ("[n, 4]", "y = Gemm<transB=1>(x, w, b)", {"w": (6, 4), "b": (6,)}),
    "gemm not transposed": ("[n, 4]", "y = Gemm(x, w)", {"w": (4, 6)}),
}


def graph(shape: str, body: str, shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    """Build a graph from `x` to `z`, with random weights and the parameters of a BatchNorm with 6 channels.

    `shape` is the shape of `x` in ONNX text, such as `[n, 4, 8, 8]`.
    """
    text = f"""<ir_version: 9, opset_import: ["" : 20]>
    g (float{shape} x) => (float[] z) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape) for name, shape in shapes.items()}
    for name in ("scale", "shift", "mean"):
        arrays[name] = random.normal(size=CHANNELS)
    arrays["var"] = random.uniform(0.01, 3, CHANNELS)
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def array(value: ir.Value | None) -> np.ndarray:
    """Return a constant."""
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", GRAPHS)
def test_folding_does_not_change_the_output_of_any_linear_operator(name: str) -> None:
    shape, linear, shapes = GRAPHS[name]
    model = graph(shape, f"{linear} z = BatchNormalization<epsilon=0.001>(y, scale, shift, mean, var)", shapes)
    sizes = [3 if size == "n" else int(size) for size in shape[1:-1].split(", ")]
    x = np.random.default_rng(1).normal(size=sizes).astype(np.float32)
    expected = run(model, x)
    assert FoldBatchNorm()(model).modified
    assert ops(model) == [linear.split("= ")[1].split("(")[0].split("<")[0]]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=2e-5)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_folded_weights_are_computed_in_float64_and_rounded_once() -> None:
    shape, linear, shapes = GRAPHS["conv"]
    model = graph(shape, f"{linear} z = BatchNormalization(y, scale, shift, mean, var)", shapes)
    before = {name: array(value).astype(np.float64) for name, value in model.graph.initializers.items()}
    FoldBatchNorm()(model)
    factor = before["scale"] / np.sqrt(before["var"] + 1e-5)
    conv = next(iter(model.graph))
    weight, bias = (array(value) for value in conv.inputs[1:])
    assert np.array_equal(weight, (before["w"] * factor.reshape(-1, 1, 1, 1)).astype(np.float32))
    shift = before["shift"] - factor * before["mean"]
    assert np.array_equal(bias, (factor * before["b"] + shift).astype(np.float32))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Relu(x) z = BatchNormalization(y, scale, shift, mean, var)", "it follows Relu"),
        ("z = BatchNormalization(x, scale, shift, mean, var)", "it follows the input"),
        (
            "y = Conv(x, w) a = BatchNormalization(y, scale, shift, mean, var) z = Add(a, y)",
            "has other readers",
        ),
    ],
)
def test_a_batch_norm_that_cannot_be_folded_is_logged_and_becomes_mul_and_add(
    body: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = graph("[n, 6, 4, 4]", body, {"w": (6, 6, 1, 1)})
    x = np.random.default_rng(1).normal(size=(2, 6, 4, 4)).astype(np.float32)
    expected = run(model, x)
    with caplog.at_level("INFO"):
        assert not FoldBatchNorm()(model).modified
    assert reason in caplog.text
    assert BatchNormToAffine()(model).modified
    assert "BatchNormalization" not in ops(model)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_shared_by_two_convolutions_is_folded_into_copies() -> None:
    body = """y = Conv(x, w) a = BatchNormalization(y, scale, shift, mean, var)
              u = Conv(x, w) b = BatchNormalization(u, shift, scale, mean, var) z = Add(a, b)"""
    model = graph("[n, 4, 4, 4]", body, {"w": (6, 4, 1, 1)})
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 4)).astype(np.float32)
    expected = run(model, x)
    FoldBatchNorm()(model)
    assert ops(model) == ["Conv", "Conv", "Add"]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)


def test_a_gemm_with_factors_is_not_folded() -> None:
    body = "y = Gemm<alpha=2.0, transB=1>(x, w, b) z = BatchNormalization(y, scale, shift, mean, var)"
    assert not FoldBatchNorm()(graph("[n, 4]", body, {"w": (6, 4), "b": (6,)})).modified


def test_a_gemm_whose_bias_has_a_factor_is_not_folded() -> None:
    body = "y = Gemm<beta=0.5, transB=1>(x, w, b) z = BatchNormalization(y, scale, shift, mean, var)"
    assert not FoldBatchNorm()(graph("[n, 4]", body, {"w": (6, 4), "b": (6,)})).modified


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "y = Conv(x, w, b) s = Identity(scale) z = BatchNormalization(y, s, shift, mean, var)",
            "its parameters are not constant",
        ),
        (
            "k = Identity(w) y = Conv(x, k, b) z = BatchNormalization(y, scale, shift, mean, var)",
            "the weights of Conv Conv_1 are not constant",
        ),
        (
            "k = Identity(b) y = Conv(x, w, k) z = BatchNormalization(y, scale, shift, mean, var)",
            "the weights of Conv Conv_1 are not constant",
        ),
    ],
)
def test_computed_parameters_and_weights_are_not_folded(
    body: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = graph("[n, 4, 4, 4]", body, {"w": (6, 4, 1, 1), "b": (6,)})
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level("INFO"):
        assert not FoldBatchNorm()(model).modified
    assert caplog.messages == [f"BatchNorm BatchNormalization_2 is not folded: {reason}"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_folded_layer_keeps_its_name_attributes_and_metadata() -> None:
    body = "y = Conv<pads=[1, 1, 1, 1], strides=[2, 2]>(x, w) z = BatchNormalization(y, scale, shift, mean, var)"
    model = graph("[n, 4, 8, 8]", body, {"w": (6, 4, 3, 3)})
    before = next(iter(model.graph))
    before.metadata_props["source"] = "stem.conv"
    FoldBatchNorm()(model)
    after = next(iter(model.graph))
    assert after is not before
    assert (after.name, after.attributes, after.metadata_props) == (
        "Conv_0",
        before.attributes,
        {"source": "stem.conv"},
    )


@pytest.mark.parametrize("rewrite", [FoldBatchNorm(), BatchNormToAffine()])
def test_a_graph_without_batch_norm_is_not_modified(rewrite: ir.passes.InPlacePass) -> None:
    assert not rewrite(graph("[n, 4, 4, 4]", "z = Conv(x, w)", {"w": (6, 4, 1, 1)})).modified


@pytest.mark.parametrize("unknown", ["parameters", "shape"])
def test_a_batch_norm_with_unknown_parameters_or_shape_stays_and_others_become_mul_and_add(
    unknown: str, caplog: pytest.LogCaptureFixture
) -> None:
    scale = "s" if unknown == "parameters" else "scale"
    body = f"""s = Identity(scale) r = Relu(x) y = BatchNormalization(r, {scale}, shift, mean, var)
               z = BatchNormalization(y, scale, shift, mean, var)"""
    model = graph("[n, 6, 4, 4]", body, {})
    x = np.random.default_rng(1).normal(size=(2, 6, 4, 4)).astype(np.float32)
    expected = run(model, x)
    if unknown == "shape":
        next(node for node in model.graph if node.op_type == "Relu").outputs[0].shape = None
    assert BatchNormToAffine()(model).modified
    assert ops(model) == ["Identity", "Relu", "BatchNormalization", "Mul", "Add"]
    assert caplog.messages == [
        "BatchNorm BatchNormalization_2 is not replaced: its parameters or shape are not constant"
    ]
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-5)


def test_new_nodes_have_different_names_that_contain_the_name_of_the_batch_norm() -> None:
    body = "y = BatchNormalization(x, scale, shift, mean, var) z = BatchNormalization(y, shift, scale, mean, var)"
    model = graph("[n, 6, 4, 4]", body, {})
    BatchNormToAffine()(model)
    names = [str(node.name) for node in model.graph]
    assert len(set(names)) == 4
    assert [name.rpartition("_")[0] for name in names] == ["BatchNormalization_0"] * 2 + ["BatchNormalization_1"] * 2
