from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.graph.model import check, infer_shapes, is_large, open_session, run_batches, save_onnx
from tests.support.networks import graph


def network() -> onnx.ModelProto:
    body = "a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Reshape(p, shape)"
    random = np.random.default_rng(0)
    model = graph(body, w1=random.normal(size=(64, 3, 3, 3)), w2=random.normal(size=(4, 64, 1, 1)))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([-1, 4]), "shape"))
    return model


def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)


def test_a_model_too_large_for_protobuf_runs_with_external_weights() -> None:
    """A limit of 4,000 bytes makes a small model take the path of a model with more than 2 GiB."""
    model = network()
    assert (is_large(model), is_large(model, 4000)) == (False, True)
    check(model, 4000)
    whole, split = (open_session(model, limit).run(None, {"input": images()})[0] for limit in (10**9, 4000))
    assert np.array_equal(whole, split)
    shapes = {value.name: value.type.tensor_type.shape for value in infer_shapes(model, 4000).value_info}
    assert [size.dim_value for size in shapes["a"].dim][1:] == [64, 6, 6]


def test_a_large_model_is_saved_with_external_weights_that_a_smaller_one_removes(tmp_path: Path) -> None:
    save_onnx(network(), tmp_path / "m.onnx", 4000)
    assert (tmp_path / "m.onnx").stat().st_size < 4000 < (tmp_path / "m.onnx.data").stat().st_size
    np.testing.assert_array_equal(
        run_batches(onnx.load(tmp_path / "m.onnx"), [images()]), run_batches(network(), [images()])
    )
    save_onnx(network(), tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_batches_are_run_in_order() -> None:
    split = run_batches(network(), [images()[:1], images()[1:]])
    np.testing.assert_allclose(split, run_batches(network(), [images()]), rtol=1e-5)


def test_a_fault_is_found_without_the_weights() -> None:
    model = network()
    model.graph.node[2].input[1] = "none"
    with pytest.raises(onnx.checker.ValidationError):
        check(model, 4000)
