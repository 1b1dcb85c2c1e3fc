import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from onnx import helper, numpy_helper
from torch import nn

from runtime.errors import ConfigError, ModelFileError
from runtime.graph.model import first_output, open_session, run_batches
from runtime.graph.optimize import optimize
from runtime.graph.prepare import PreparedClassifier, prepare_classifier
from runtime.graph.shapes import infer
from runtime.graph.structure import node_macs, shape_of

RANDOM = np.random.default_rng(5)
FEATURES = "a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1) r = Relu(a) p = GlobalAveragePool(r)"
HEAD = "f = Flatten(p) logits = Gemm <transB = 1> (f, w2, b2)"
WEIGHTS = {"w1": RANDOM.normal(size=(6, 3, 3, 3)), "w2": RANDOM.normal(size=(5, 6)), "b2": RANDOM.normal(size=5)}


def model_of(
    body: str,
    image: str = "float[n, 3, 8, 8] x",
    output: str = "float[n, 5] logits",
    opset: int = 17,
    **weights: ArrayLike,
) -> onnx.ModelProto:
    """Build a graph from `image` to `output` with unnamed nodes; integers become int64."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({image}) => ({output}) {{ {body} }}'
    )
    for name, array in (WEIGHTS | weights).items():
        values = np.asarray(array)
        values = values.astype(np.int64 if values.dtype.kind == "i" else np.float32)
        if any(name in node.input for node in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def images(count: int, size: int = 8) -> NDArray[np.float32]:
    return RANDOM.normal(size=(count, 3, size, size)).astype(np.float32)


def assert_same(prepared: PreparedClassifier, original: onnx.ModelProto, batch: int = 3) -> None:
    """Compare on a batch, run through the original graph one image at a time."""
    batch_NCHW = images(batch)
    expected = run_batches(original, [image[None] for image in batch_NCHW])
    np.testing.assert_allclose(run_batches(prepared.model, [batch_NCHW]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("image_is_last", [False, True])
def test_initializers_leave_the_graph_inputs_and_batch_norms_are_folded(version: int, image_is_last: bool) -> None:
    names = ("gamma", "beta", "mean", "variance")
    body = FEATURES.replace("r = Relu(a)", f"b = BatchNormalization(a, {', '.join(names)}) r = Relu(b)")
    vectors = {name: RANDOM.uniform(0.5, 2, 6) for name in names}
    model = model_of(f"{body} {HEAD}", "float[1, 3, 8, 8] x", "float[1, 5] logits", opset=9, **vectors)
    model.ir_version = version
    listed = [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in model.graph.initializer
    ]
    image = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    del model.graph.input[:]
    model.graph.input.extend([*listed, image] if image_is_last else [image, *listed])
    prepared = prepare_classifier(model)
    assert [value.name for value in prepared.model.graph.input] == ["x"]
    assert [node.op_type for node in prepared.model.graph.node] == [
        "Conv",
        "Relu",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
    ]
    assert_same(prepared, model)


@pytest.mark.parametrize("opset", [9, 12, 13, 17, 19, 21, 22])
def test_every_tensor_has_a_type_whatever_the_opset(opset: int) -> None:
    model = model_of(f"{FEATURES} {HEAD}", opset=opset)
    graph = prepare_classifier(model).model.graph
    known = {value.name for value in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= known


def test_sizes_behind_a_computed_reshape_are_known() -> None:
    model = model_of(
        f"""{FEATURES} s = Shape(p) n = Slice(s, zero, one) to = Concat <axis = 0> (n, minus)
        f = Reshape(p, to) m = MatMul(f, w3) l = Add(m, b) probs = Softmax <axis = 1> (l)""",
        output="float[n, 5] probs",
        opset=12,
        zero=[0],
        one=[1],
        minus=[-1],
        w3=RANDOM.normal(size=(6, 5)),
        b=RANDOM.normal(size=5),
    )
    prepared = prepare_classifier(model)
    assert prepared.output_form == "probs"
    assert sum(node.op_type == "Softmax" for node in prepared.model.graph.node) == 1
    assert list(node_macs(prepared.model).values()) == [4 * 4 * 6 * 27, 30]
    assert list(node_macs(model).values()) == [4 * 4 * 6 * 27, 30]
    assert_same(prepared, model)


@pytest.mark.parametrize(
    ("tail", "shape", "form"),
    [
        ("l = Gemm <transB = 1> (f, w2) logits = Softmax <axis = 1> (l)", [5], "probs"),
        ("l = Gemm <transB = 1> (f, w2) s = Softmax <axis = 1> (l) logits = Identity(s)", [5], "probs"),
        ("l = Gemm <transB = 1> (f, w2) s = Softmax <axis = 1> (l) logits = Reshape(s, five)", [5], "probs"),
        ("c = Conv(p, w4) s = Softmax <axis = 1> (c) logits = Squeeze(s, last)", [5], "probs"),
        ("c = Conv(p, w4) s = Softmax <axis = 1> (c) logits = Flatten(s)", [5], "probs"),
        ("l = Gemm <transB = 1> (f, w2) logits = LogSoftmax <axis = 1> (l)", [5], "logits"),
        ("l = Gemm <transB = 1> (f, w2) e = Exp(l) s = ReduceSum(e, axis) logits = Div(e, s)", [5], "probs"),
        ("l = Gemm <transB = 1> (f, w2) logits = Sigmoid(l)", [5], "sigmoid"),
    ],
)
def test_the_form_of_the_output_is_recognized(tail: str, shape: list[int], form: str) -> None:
    constants: dict[str, Any] = {"five": [-1, 5], "last": [2, 3], "axis": [1], "w4": RANDOM.normal(size=(5, 6, 1, 1))}
    model = model_of(f"{FEATURES} f = Flatten(p) {tail}", **constants)
    prepared = prepare_classifier(model)
    assert (prepared.output_form, prepared.classes) == (form, *shape)
    assert prepared.spec_form == ("logits" if form == "logits" else "probs")
    assert_same(prepared, model)


def test_an_output_with_trailing_dimensions_is_flattened() -> None:
    model = model_of(
        f"{FEATURES} logits = Conv(p, w4)", output="float[n, 5, 1, 1] logits", w4=RANDOM.normal(size=(5, 6, 1, 1))
    )
    prepared = prepare_classifier(model)
    assert shape_of(prepared.model.graph.output[0].type.tensor_type) == (-1, 5)
    batch = images(2)
    np.testing.assert_array_equal(run_batches(prepared.model, [batch]), run_batches(model, [batch])[:, :, 0, 0])


@pytest.mark.parametrize("has_sigmoid", [False, True])
def test_one_value_per_image_becomes_two_classes(has_sigmoid: bool) -> None:
    tail = "z = Gemm <transB = 1> (f, w3) logits = Sigmoid(z)" if has_sigmoid else "logits = Gemm <transB = 1> (f, w3)"
    model = model_of(f"{FEATURES} f = Flatten(p) {tail}", output="float[n, 1] logits", w3=RANDOM.normal(size=(1, 6)))
    prepared = prepare_classifier(model)
    assert (prepared.output_form, prepared.classes) == ("probs" if has_sigmoid else "logits", 2)
    assert any("two classes" in note for note in prepared.notes)
    batch = images(4)
    found, expected = run_batches(prepared.model, [batch]), run_batches(model, [batch])[:, 0]
    if not has_sigmoid:
        found = np.exp(found) / np.exp(found).sum(1, keepdims=True)
        expected = 1 / (1 + np.exp(-expected))
    np.testing.assert_allclose(found, np.stack([1 - expected, expected], 1), rtol=1e-4, atol=1e-6)


def test_one_of_several_outputs_must_be_chosen() -> None:
    model = model_of(f"{FEATURES} {HEAD} aux = Neg(logits)", output="float[n, 5] logits, float[n, 5] aux")
    with pytest.raises(ModelFileError, match=r"2 outputs: logits \[-1, 5\], aux \[-1, 5\]; .* with --output NAME"):
        prepare_classifier(model)
    with pytest.raises(ConfigError, match=r"no output is called 'logit'; .* did you mean logits"):
        prepare_classifier(model, output="logit")
    prepared = prepare_classifier(model, output="logits")
    assert [value.name for value in prepared.model.graph.output] == ["logits"]
    assert all(node.op_type != "Neg" for node in prepared.model.graph.node)


@pytest.mark.parametrize("batch", ["n", "1"])
def test_shapes_that_contain_the_batch_size_follow_it(batch: str) -> None:
    """Also with a class token, a constant of batch size 1."""
    model = model_of(
        """a = Conv <strides = [4, 4]> (x, w1) t = Reshape(a, tokens) s = Concat <axis = 2> (token, t)
        m = ReduceMean <axes = [2], keepdims = 0> (s) f = Reshape(m, flat) logits = Gemm <transB = 1> (f, w2)""",
        f"float[{batch}, 3, 8, 8] x",
        f"float[{batch}, 5] logits",
        w1=RANDOM.normal(size=(6, 3, 4, 4)),
        tokens=[1, 6, -1],
        token=RANDOM.normal(size=(1, 6, 1)),
        flat=[1, 6],
    )
    prepared = prepare_classifier(model)
    assert shape_of(prepared.model.graph.input[0].type.tensor_type)[0] == -1
    assert_same(prepared, model)
    assert any("batch size" in note for note in prepared.notes)


def test_a_graph_that_mixes_images_keeps_its_batch_size() -> None:
    body = f"{FEATURES} s = Softmax <axis = 0> (p) f = Flatten(s) logits = Gemm <transB = 1> (f, w2)"
    model = model_of(body, "float[2, 3, 8, 8] x", "float[2, 5] logits")
    prepared = prepare_classifier(model)
    assert shape_of(prepared.model.graph.input[0].type.tensor_type)[0] == 2
    assert "works with a batch size of 2 only" in prepared.notes[-1]


def test_a_condition_on_shapes_is_replaced_by_the_branch_that_runs() -> None:
    condition = "s = Shape(p) d = Gather(s, three) c = Equal(d, one)"
    branches = "then_branch = g1 () => (y) { y = Squeeze(p, last) }, else_branch = g2 () => (y) { y = Identity(p) }"
    body = f"{FEATURES} {condition} q = If (c) <{branches}> f = Flatten(q) logits = Gemm <transB = 1> (f, w2)"
    model = model_of(body, three=np.int64(3), one=np.int64(1), last=[2, 3])
    model.graph.initializer.extend([numpy_helper.from_array(np.asarray([2, 3]), "last")])
    prepared = prepare_classifier(model)
    assert all(node.op_type not in ("If", "Equal") for node in prepared.model.graph.node)
    assert_same(prepared, model)


def test_a_condition_on_the_image_is_refused_with_its_name() -> None:
    branches = "then_branch = g1 () => (y) { y = Neg(p) }, else_branch = g2 () => (y) { y = Identity(p) }"
    body = f"{FEATURES} t = ReduceMax <keepdims = 0> (p) c = Greater(t, t) q = If (c) <{branches}> f = Flatten(q)"
    model = model_of(f"{body} logits = Gemm <transB = 1> (f, w2)")
    next(node for node in model.graph.node if node.op_type == "If").name = "choice"
    with pytest.raises(ModelFileError, match=r"the node 'choice' \(If\) chooses a branch by the content of an image"):
        prepare_classifier(model)


def test_local_functions_are_inlined() -> None:
    model = model_of(
        f"{FEATURES} n = my.Block(p) f = Flatten(n) logits = Gemm <transB = 1> (f, w2)".replace("my.", "my_")
    )
    node = next(node for node in model.graph.node if node.op_type == "my_Block")
    node.domain, node.op_type = "my", "Block"
    body = [helper.make_node("Neg", ["u"], ["t"]), helper.make_node("Relu", ["t"], ["v"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("my", "Block", ["u"], ["v"], body, opsets))
    model.opset_import.append(helper.make_opsetid("my", 1))
    prepared = prepare_classifier(model)
    assert [entry.domain for entry in prepared.model.opset_import] == [""]
    assert_same(prepared, model)


def test_an_operator_that_is_not_standard_is_refused_with_its_name() -> None:
    model = model_of(f"{FEATURES} m = Mystery(p) f = Flatten(m) logits = Gemm <transB = 1> (f, w2)")
    model.graph.node[3].name = "odd"
    with pytest.raises(ModelFileError, match=r"the node 'odd' \(Mystery\) is not an ONNX operator"):
        prepare_classifier(model)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("float[n, 3, 8, 8] x, float[n] phase", r"has 2 inputs \(x, phase\); expected one image input"),
        ("float[n, 192] x", r"the input 'x' is float \[-1, 192\]; expected images"),
        ("float[n, 4, 8, 8] x", "has 4 channels in the layout NCHW"),
    ],
)
def test_graphs_without_an_image_input_are_refused(image: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        prepare_classifier(model_of(f"{FEATURES} {HEAD}", image))


def test_channels_last_images_become_channels_first() -> None:
    """The Transpose that TensorFlow's converter starts with is canceled."""
    body = f"c = Transpose <perm = [0, 3, 1, 2]> (x) {FEATURES.replace('(x, ', '(c, ')} {HEAD}"
    model = model_of(body, "float[n, 8, 8, 3] x")
    prepared = prepare_classifier(model)
    assert prepared.layout == "NHWC"
    assert all(node.op_type != "Transpose" for node in prepared.model.graph.node)
    batch = images(2)
    expected = first_output(open_session(model), np.ascontiguousarray(batch.transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(run_batches(prepared.model, [batch]), expected, rtol=1e-4, atol=1e-5)


def test_names_that_exist_are_not_given_to_other_nodes() -> None:
    model = model_of(f"{FEATURES} {HEAD}")
    model.graph.node[1].name = "Conv_0"  # the name that the first node would get
    names = [node.name for node in prepare_classifier(model).model.graph.node]
    assert len(set(names)) == len(names) == 5


def test_open_sizes_of_the_same_name_become_sizes_of_their_own() -> None:
    model = model_of(f"{FEATURES} {HEAD}", "float[q, 3, q, q] x", "float[q, 5] logits")
    sizes = prepare_classifier(model).model.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 3, "height", "width"]


def test_weights_can_be_optimized_without_serializing_them() -> None:
    """As for graphs over 2 GB."""
    model = model_of(f"{FEATURES} {HEAD}", opset=20)
    optimized = optimize(model, limit=0)
    batch = images(2)
    np.testing.assert_allclose(run_batches(optimized, [batch]), run_batches(model, [batch]), rtol=1e-5)


class _Network(nn.Module):
    """Operators that exporters write in several ways: HardSwish, LayerNorm, GELU, attention, split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.norm, self.mixer = nn.LayerNorm(8), nn.Linear(8, 24)
        self.head = nn.Linear(8, 4)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(images_NCHW).flatten(2).transpose(1, 2)
        query, key, value = self.mixer(self.norm(tokens)).chunk(3, -1)
        mixed = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, -1) @ value
        return torch.as_tensor(self.head(nn.functional.gelu(tokens + mixed).mean(1)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_open_batch", [False, True])
@pytest.mark.parametrize(
    ("opset", "dynamo"), [(9, False), (11, False), (13, False), (17, False), (18, True), (20, True), (22, True)]
)
def test_exports_of_torch_are_prepared(tmp_path: Path, opset: int, dynamo: bool, has_open_batch: bool) -> None:
    torch.manual_seed(0)
    network, path = _Network().eval(), tmp_path / "net.onnx"
    example = torch.zeros(2 if dynamo and has_open_batch else 1, 3, 8, 8)
    opened: dict[str, Any] = {"dynamic_shapes": ({0: "n"},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = opened if has_open_batch else {}
        torch.onnx.export(
            network, (example,), path, opset_version=opset, dynamo=dynamo, verbose=False, **names, **extra
        )
    prepared = prepare_classifier(onnx.load(path))
    assert (prepared.classes, len(prepared.model.graph.input)) == (4, 1)
    assert len(node_macs(prepared.model)) >= 4
    assert not infer(prepared.model, 1).reason
    count = 3 if shape_of(prepared.model.graph.input[0].type.tensor_type)[0] < 0 else 1
    batch = images(count)
    expected = network(torch.from_numpy(batch)).detach().numpy()
    np.testing.assert_allclose(run_batches(prepared.model, [batch]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_files_of_onnx_runtimes_optimizer_are_prepared(tmp_path: Path, level: str) -> None:
    model = model_of(f"{FEATURES} {HEAD}")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert any(node.domain == "com.microsoft" for node in optimized.graph.node) == level.endswith("EXTENDED")
    assert_same(prepare_classifier(optimized), model)
