"""Graphs with a GPU's roundings, against ONNX's reference implementation."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from calib.precision import to_reduced
from runtime.graph.compare import tensor_values
from runtime.graph.model import run_batches
from runtime.graph.rounding import rounded_file, with_roundings
from runtime.graph.structure import rename_tensors
from tests.support.networks import graph

IMAGES = np.random.default_rng(1).normal(size=(4, 3, 8, 8)).astype(np.float32)


def network(gain: float = 1.0) -> onnx.ModelProto:
    """Build two convolutions: the first is scaled by `gain`, the second by its inverse."""
    random = np.random.default_rng(0)
    body = "a = Conv(input, w1) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Flatten(p)"
    return graph(body, w1=random.normal(size=(4, 3, 3, 3)) * gain, w2=random.normal(size=(4, 4, 1, 1)) / gain)


def reference(model: onnx.ModelProto) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns about overflows
        (logits,) = ReferenceEvaluator(model).run(None, {"input": IMAGES})
        return np.asarray(logits)


def rounded(model: onnx.ModelProto) -> np.ndarray:
    return run_batches(with_roundings(model), [IMAGES])


def test_roundings_are_those_of_the_reference() -> None:
    half = to_reduced(network(), "fp16")
    np.testing.assert_array_equal(rounded(half), reference(half))


def test_an_overflow_is_no_longer_hidden() -> None:
    half = to_reduced(network(1e4), "fp16")
    assert not np.isfinite(reference(half)).all()
    assert not np.isfinite(rounded(half)).all()


def test_bf16_tensors_have_eight_significant_bits() -> None:
    values = tensor_values(with_roundings(to_reduced(network(), "bf16")), ["r/rounded"], IMAGES)["r/rounded"]
    assert values.any()
    assert not (values.view(np.uint32) & 0xFFFF).any()


def test_rounding_behind_selecting_operators_yields_the_same_bits() -> None:
    body = """a = Conv(input, w) m = MaxPool<kernel_shape=[2, 2]>(a) c = Clip(m, low, high)
        t = Transpose<perm=[0, 1, 3, 2]>(c) r = Relu(t) p = GlobalAveragePool(r) logits = Flatten(p)"""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    half = to_reduced(graph(body, w=weight, low=np.float32(-0.3), high=np.float32(2.7)), "fp16")
    casts = [node.op_type for node in with_roundings(half).graph.node].count("Cast")
    assert casts == 2 * 3 + 2  # two per rounded tensor (input, clipped, pooled), and those at the graph's ends
    np.testing.assert_array_equal(rounded(half), reference(half))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_file_is_rounded_only_if_it_has_narrow_tensors(tmp_path: Path, precision: str) -> None:
    onnx.save(network(), tmp_path / "fp32.onnx")
    assert rounded_file(tmp_path / "fp32.onnx") == str(tmp_path / "fp32.onnx")
    reduced = to_reduced(network(), precision)
    onnx.save(reduced, tmp_path / "reduced.onnx")
    content = rounded_file(tmp_path / "reduced.onnx")
    assert isinstance(content, bytes)
    np.testing.assert_array_equal(run_batches(onnx.ModelProto.FromString(content), [IMAGES]), rounded(reduced))


@pytest.mark.parametrize("suffix", ["/rounded", "/unrounded", "/narrow"])
def test_names_that_end_like_our_own_are_rounded_too(suffix: str) -> None:
    model = to_reduced(network(), "fp16")
    expected = rounded(model)
    rename_tensors(model.graph, {"r": f"a{suffix}"})
    np.testing.assert_array_equal(rounded(model), expected)
