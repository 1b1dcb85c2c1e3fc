import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch

from calib.precision import to_reduced
from export.io_forms import with_forms
from export.source import timm_spec
from export.to_onnx import to_onnx
from runtime.errors import ModelFileError
from runtime.graph.convert import convert_classifier
from runtime.graph.foreign import ForeignOptions
from runtime.graph.norms import NORMS_KEY, read_norms
from runtime.graph.structure import metadata, set_metadata
from tests.support.norm_networks import NETWORKS, SPEC, norm_layers, randomize_norms


@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_records_scale_mean_and_epsilon_of_every_batch_norm(name: str) -> None:
    network = randomize_norms(NETWORKS[name]())
    norms = list(read_norms(to_onnx(network, SPEC)).values())
    layers = norm_layers(network)
    assert len(norms) == len(layers) > 0
    for norm, layer in zip(norms, layers, strict=True):
        assert layer.running_var is not None
        gamma, beta, variance = (
            value.detach().double().numpy() for value in (layer.weight, layer.bias, layer.running_var)
        )
        np.testing.assert_allclose(norm.scale_C, abs(gamma), rtol=1e-6)
        np.testing.assert_allclose(norm.mean_C, beta, rtol=1e-6)
        np.testing.assert_allclose(norm.epsilon_C, gamma**2 * layer.eps / (variance + layer.eps), rtol=1e-6)
        np.testing.assert_allclose(norm.variance, gamma**2 * variance / (variance + layer.eps), rtol=1e-5)


def test_the_record_takes_17_bytes_per_channel_and_a_few_per_tensor() -> None:
    network = timm.create_model("test_efficientnet", num_classes=3).eval()
    model = to_onnx(network, SPEC)
    norms = read_norms(model)
    assert {entry.key for entry in model.metadata_props} == {"advprop.spec", NORMS_KEY}
    assert len(metadata(model, NORMS_KEY)) < 17 * sum(len(norm.mean_C) for norm in norms.values()) + 50 * len(norms)


def test_float_files_of_any_input_keep_the_record_and_reduced_files_do_not() -> None:
    model = to_onnx(randomize_norms(NETWORKS["conv"]()), SPEC)
    pixels = with_forms(model, timm_spec(timm.create_model("test_resnet"), "test_resnet"))
    assert metadata(pixels, NORMS_KEY) == metadata(model, NORMS_KEY) != ""
    assert metadata(to_reduced(model, "fp16"), NORMS_KEY) == ""


def test_a_converted_file_of_another_tool_keeps_the_record(tmp_path: Path) -> None:
    network = randomize_norms(NETWORKS["conv"]())
    path = tmp_path / "other.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (torch.zeros(2, 3, 16, 16),), dynamo=True, optimize=False)
    assert program is not None
    onnx.save(program.model_proto, path)
    converted = convert_classifier(path, ForeignOptions(mean=(0.5,) * 3, std=(0.5,) * 3)).model
    found = sorted(read_norms(converted).values(), key=lambda norm: norm.scale_C.sum())
    expected = sorted(read_norms(to_onnx(network, SPEC)).values(), key=lambda norm: norm.scale_C.sum())
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.epsilon_C, other.epsilon_C, rtol=1e-6)


@pytest.mark.parametrize("change", [{"format": "advprop.norms/2"}, {"tensors": {"y": "AAAA"}}, {"tensors": []}])
def test_a_damaged_record_is_reported(change: dict[str, object]) -> None:
    model = to_onnx(randomize_norms(NETWORKS["conv"]()), SPEC)
    content = json.loads(metadata(model, NORMS_KEY)) | change
    set_metadata(model, {NORMS_KEY: json.dumps(content)})
    with pytest.raises(ModelFileError, match="export the model again"):
        read_norms(model)
