import copy
import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from torch import nn

from export.to_onnx import to_onnx
from runtime.errors import ArchError, OutputError
from runtime.graph.model import OPSET, save_onnx
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from train.dual_bn import add_auxiliary_bns, strip_auxiliary

SIZE = 48


def spec(arch: str) -> ModelSpec:
    preprocessing = Preprocessing(
        height=SIZE, width=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0
    )
    return ModelSpec(arch=arch, classes=("a", "b", "c"), preprocessing=preprocessing, recipe="advprop")


def randomized(arch: str) -> nn.Module:
    """Return a model whose BatchNorms are not the identity, like after training."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_(0, 0.2)
            module.get_buffer("running_var").uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet10t"])
def test_the_exported_graph_meets_its_specification(arch: str) -> None:
    model = randomized(arch)
    proto = to_onnx(model, spec(arch))
    ops = {node.op_type for node in proto.graph.node}
    assert "BatchNormalization" not in ops
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [OPSET]
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    dimensions = proto.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in dimensions] == ["batch", 3, SIZE, SIZE]
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert ModelSpec.from_json(metadata[METADATA_KEY]) == spec(arch)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = model(images).numpy()
        found = session.run(None, {"input": images.numpy()})[0]
        assert np.abs(found - expected).max() <= 1e-4


@pytest.mark.slow
def test_auxiliary_statistics_do_not_change_a_byte_of_the_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = randomized("resnet10t")
    garbage = add_auxiliary_bns(copy.deepcopy(model), ["adv"])
    for name, buffer in garbage.named_buffers():
        if ".aux." in name and buffer.is_floating_point():
            buffer.fill_(float("nan"))
    stripped = timm.create_model("resnet10t", num_classes=3).eval()
    stripped.load_state_dict(strip_auxiliary(garbage.state_dict()))
    folder = tmp_path_factory.mktemp("bytes")
    for name, source in (("a", model), ("b", stripped)):
        save_onnx(to_onnx(source, spec("resnet10t")), folder / name)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    onnx.checker.check_model(str(folder / "a"), full_check=True)
    with pytest.raises(OutputError):
        save_onnx(onnx.load(folder / "a"), folder / "a" / "below-a-file")


def test_the_reason_why_torch_cannot_export_is_in_the_message() -> None:
    torch.manual_seed(0)
    model = timm.create_model("dla46x_c", num_classes=3).eval()
    described = spec("dla46x_c")
    small = dataclasses.replace(described.preprocessing, height=50, width=50)
    with pytest.raises(ArchError, match=r"dla46x_c at 50x50 px to ONNX: .*dimension.*--img-size"):
        to_onnx(model, dataclasses.replace(described, preprocessing=small))
