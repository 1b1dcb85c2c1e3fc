from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.to_onnx import to_onnx
from runtime.adapt.estimate import Estimate, Layer, estimate, with_affines
from runtime.adapt.moments import measure_moments
from runtime.adapt.sessions import SegmentedGraph
from runtime.errors import DataError
from runtime.graph.model import run_batches
from runtime.graph.norms import read_norms
from tests.support.norm_networks import NETWORKS, SPEC, norm_layers, randomize_norms

SIZE = (SPEC.preprocessing.height, SPEC.preprocessing.width)
PRIOR = 16


def field_images(count: int = 12, seed: int = 1) -> np.ndarray:
    """Return images of another brightness and contrast than those that the networks expect."""
    return (2 * np.random.default_rng(seed).normal(size=(count, 3, *SIZE)) + 1.5).astype(np.float32)


def reestimated(network: nn.Module, images: np.ndarray) -> nn.Module:
    """Mix the statistics of all BatchNorms with those on `images`, each behind the mixed earlier ones."""
    weight = len(images) / (PRIOR + len(images))

    def mix(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        axes = [axis for axis in range(inputs[0].ndim) if axis != 1]
        variance, mean = torch.var_mean(inputs[0], axes, unbiased=False)
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.lerp_(mean, weight)
        layer.running_var.lerp_(variance, weight)

    hooks = [layer.register_forward_pre_hook(mix) for layer in norm_layers(network)]
    with torch.no_grad():
        network(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    return network


def fixed(layer: Layer) -> float:
    return 12 / (PRIOR + 12)


@pytest.mark.parametrize("name", NETWORKS)
def test_adapting_the_file_equals_reestimating_the_network_and_exporting_it(name: str) -> None:
    network = randomize_norms(NETWORKS[name]())
    model = to_onnx(network, SPEC)
    images = field_images()
    norms = read_norms(model)
    found = estimate(model, norms, images, fixed, size=SIZE)
    adapted = with_affines(model, norms, found.affines)
    expected = to_onnx(reestimated(network, images), SPEC)
    others = field_images(seed=2)
    logits = run_batches(expected, [others])
    np.testing.assert_allclose(run_batches(adapted, [others]), logits, atol=1e-4 * max(1, abs(logits).max()))
    assert abs(run_batches(model, [others]) - logits).max() > 0.01
    np.testing.assert_allclose(found.outputs_NK, run_batches(expected, [images]), rtol=1e-3, atol=1e-3)
    assert [node.op_type for node in adapted.graph.node] == [node.op_type for node in model.graph.node]
    for one, other in zip(read_norms(adapted).values(), read_norms(expected).values(), strict=True):
        np.testing.assert_allclose(one.epsilon_C, other.epsilon_C, rtol=1e-4)


class Residual(nn.Module):
    """Narrow blocks that expand to 32 channels of 96 × 96, which are computed again instead of held."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(4, 32, 1), nn.BatchNorm2d(32), nn.ReLU6()),
                *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32), nn.ReLU6()),
                *(nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4)),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def test_large_tensors_are_computed_again_with_the_same_result() -> None:
    spec = replace(SPEC, preprocessing=replace(SPEC.preprocessing, height=96, width=96))
    model = to_onnx(randomize_norms(Residual()), spec)
    norms = read_norms(model)
    images = (2 * np.random.default_rng(1).normal(size=(12, 3, 96, 96)) + 1.5).astype(np.float32)
    graph = SegmentedGraph(model, norms.keys(), (96, 96))
    assert sum(not segment.outputs for segment in graph.segments) == 3
    found = estimate(model, norms, images, fixed, size=(96, 96))
    adapted = with_affines(model, norms, found.affines)
    np.testing.assert_allclose(found.outputs_NK, run_batches(adapted, [images]), rtol=1e-3, atol=1e-3)


def test_groups_of_images_that_fit_the_memory_give_nearly_the_same_statistics() -> None:
    model = to_onnx(randomize_norms(NETWORKS["depthwise"]()), SPEC)
    norms = read_norms(model)
    images = field_images(64)
    whole = estimate(model, norms, images, fixed, size=SIZE)
    parts = estimate(model, norms, images, fixed, size=SIZE, memory_bytes=16 * 14 * 14 * 8 * 4)
    assert 0 < max(abs(a - b).max() for a, b in zip(_affines(whole), _affines(parts), strict=True)) < 0.05


def _affines(found: Estimate) -> list[np.ndarray]:
    return [array for affine in found.affines.values() for array in affine]


def test_a_layer_reports_distance_noise_and_evidence() -> None:
    model = to_onnx(randomize_norms(NETWORKS["conv"]()), SPEC)
    norms = read_norms(model)
    clean = measure_moments(model, norms, [field_images(400, seed=3) / np.float32(2)])
    norms = {name: replace(norm, clean=clean[name]) for name, norm in norms.items()}
    shifted = estimate(model, norms, field_images(32), lambda _: 0.0, size=SIZE).layers
    same = estimate(model, norms, field_images(32) / np.float32(2), lambda _: 0.0, size=SIZE).layers
    assert min(layer.evidence for layer in shifted) > 0.9
    assert max(layer.evidence for layer in same) < 0.6


def test_the_moments_of_a_single_pass_are_those_of_the_tensors() -> None:
    model = to_onnx(randomize_norms(NETWORKS["pre-activation"]()), SPEC)
    norms = read_norms(model)
    images = field_images(10)
    found = measure_moments(model, norms, [images[:4], images[4:]])
    name = next(iter(norms))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output[0].name = name
    probe.graph.output[0].type.tensor_type.ClearField("shape")
    values = run_batches(probe, [images]).astype(np.float64)
    np.testing.assert_allclose(found[name].mean_C, values.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found[name].variance_C, values.var((0, 2, 3)), rtol=1e-5)


def test_a_graph_with_a_fixed_batch_size_of_one_has_the_same_result() -> None:
    model = to_onnx(randomize_norms(NETWORKS["conv"]()), SPEC)
    single = onnx.ModelProto()
    single.CopyFrom(model)
    single.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    one, any_size = (estimate(graph, read_norms(graph), field_images(6), fixed, size=SIZE) for graph in (single, model))
    np.testing.assert_allclose(one.outputs_NK, any_size.outputs_NK, rtol=1e-4, atol=1e-4)


def test_no_images_are_reported() -> None:
    model = to_onnx(randomize_norms(NETWORKS["conv"]()), SPEC)
    with pytest.raises(DataError, match="without images"):
        estimate(model, read_norms(model), field_images(0), fixed, size=SIZE)
