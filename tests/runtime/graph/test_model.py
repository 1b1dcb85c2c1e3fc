import numpy as np
import onnx
import pytest

from runtime.graph.model import check, infer_shapes, is_large, open_session
from tests.support.networks import graph


def network() -> onnx.ModelProto:
    body = "a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Reshape(p, shape)"
    random = np.random.default_rng(0)
    model = graph(body, w1=random.normal(size=(64, 3, 3, 3)), w2=random.normal(size=(4, 64, 1, 1)))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([-1, 4]), "shape"))
    return model


def test_a_model_too_large_for_protobuf_is_run_with_its_weights_beside_it() -> None:
    """What a limit of 4,000 bytes makes of a small model is what the real one makes of a large model."""
    model = network()
    assert (is_large(model), is_large(model, 4000)) == (False, True)
    check(model, 4000)
    images = np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)
    whole, light = (open_session(model, limit).run(None, {"input": images})[0] for limit in (10**9, 4000))
    assert np.array_equal(whole, light)
    shapes = {value.name: value.type.tensor_type.shape for value in infer_shapes(model, 4000).value_info}
    assert [size.dim_value for size in shapes["a"].dim][1:] == [64, 6, 6]


def test_a_fault_is_found_without_the_weights() -> None:
    model = network()
    model.graph.node[2].input[1] = "none"
    with pytest.raises(onnx.checker.ValidationError):
        check(model, 4000)
