from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from runtime.errors import ModelFileError
from runtime.graph.fused import lower_fused_operators
from runtime.graph.model import check, run_batches

RANDOM = np.random.default_rng(7)
CONV: dict[str, Any] = {"kernel_shape": [1, 1]}


def fused(op: str, others: list[str], shape: list[int | str], rank: int = 4, **attributes: Any) -> onnx.ModelProto:
    """Build a graph of one operator of ONNX Runtime, with constants for its other inputs."""
    sizes = {
        "w": (4, 3, 1, 1), "b": (4,), "m": (3, 4), "t": (4, 3), "c": (3,), "gamma": (3,), "beta": (3,), "bias": (3,),
        "z": (1, 4, 2, 2), "skip": (1, 5, 3),
    }  # fmt: skip
    arrays = {name: RANDOM.normal(size=sizes[name]).astype(np.float32) for name in others if name}
    outputs = ["y", "", "", "total"] if op == "SkipLayerNormalization" else ["y"]
    node = helper.make_node(op, ["x", *others], outputs, "node", domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    "model",
    [
        fused("FusedConv", ["w"], ["n", 3, 2, 2], activation="Relu", **CONV),
        fused("FusedConv", ["w", "b"], ["n", 3, 2, 2], activation="Clip", activation_params=[-0.5, 0.5], **CONV),
        fused("FusedConv", ["w", "b"], ["n", 3, 2, 2], activation="LeakyRelu", activation_params=[0.3], **CONV),
        fused("FusedConv", ["w", "b", "z"], [1, 3, 2, 2], activation="Relu", **CONV),
        fused("FusedGemm", ["m"], ["n", 3], 2, activation="Sigmoid", alpha=0.5),
        fused("FusedGemm", ["t", "b"], ["n", 3], 2, activation="LeakyRelu", activation_alpha=0.3, transB=1, beta=2.0),
        fused("FusedMatMul", ["m"], ["n", 5, 3], 3, alpha=0.25),
        fused("FusedMatMul", ["t"], ["n", 5, 3], 3, transB=1),
        fused("FusedMatMul", ["m"], ["n", 3, 5], 3, transA=1),
        fused("Gelu", [], ["n", 5], 2),
        fused("BiasGelu", ["c"], ["n", 3], 2),
        fused("FastGelu", ["c"], ["n", 3], 2),
        fused("FastGelu", [], ["n", 3], 2),
        fused("QuickGelu", [], ["n", 3], 2, alpha=1.5),
        fused("SkipLayerNormalization", ["skip", "gamma", "beta", "bias"], [1, 5, 3], 3, epsilon=1e-5),
        fused("SkipLayerNormalization", ["skip", "gamma"], [1, 5, 3], 3),
    ],
    ids=lambda model: f"{model.graph.node[0].op_type}-{len(model.graph.node[0].input)}",
)
def test_standard_operators_compute_the_same(model: onnx.ModelProto) -> None:
    sizes = [size.dim_value or 2 for size in model.graph.input[0].type.tensor_type.shape.dim]
    batch = RANDOM.normal(size=sizes).astype(np.float32)
    expected = run_batches(model, [batch])
    lower_fused_operators(model)
    assert {node.domain for node in model.graph.node} == {""}
    check(model)
    np.testing.assert_allclose(run_batches(model, [batch]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (fused("Attention", ["m"], ["n", 5, 3], 3, num_heads=1), "'node' (com.microsoft.Attention) is not an ONNX"),
        (fused("FusedConv", ["w"], ["n", 3, 2, 2], activation="Swish", **CONV), "has the activation 'Swish'; expected"),
        (fused("FusedMatMul", ["m"], ["n", 3, 5], 3, transBatchA=1), "transposes batch dimensions"),
    ],
)
def test_other_forms_are_refused_with_the_name_of_the_node(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ModelFileError) as error:
        lower_fused_operators(model)
    assert message in str(error.value)
