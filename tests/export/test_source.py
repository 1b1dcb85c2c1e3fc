from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from timm.layers import convert_splitbn_model

from calib.config import CalibrationConfig
from calib.images import calibration_set
from export.cli import main
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from export.source import load_source, with_unused_images
from runtime.errors import CheckpointError, ConfigError, DataError
from runtime.preprocessing import Preprocessor
from tests.support.evaluation_sets import labeled_folder
from train.checkpoint import load_checkpoint, save_checkpoint
from train.dual_bn import add_auxiliary_bns, route
from train.loop import FitResult


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a state dict of tf_efficientnet_b0 like those that timm publishes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(timm.create_model("tf_efficientnet_b0").state_dict(), path)
    return path


def test_published_weights_use_the_mean_they_were_trained_with(published: Path) -> None:
    source = load_source("timm:tf_efficientnet_b0.ap_in1k", weights=published)
    assert source.spec.preprocessing.mean == source.spec.preprocessing.std == (0.5, 0.5, 0.5)
    assert source.spec.preprocessing.interpolation == "bicubic"
    assert (len(source.spec.classes), source.spec.classes[1], source.spec.wnids[1]) == (
        *(1000, "goldfish, Carassius auratus", "n01443537"),
    )
    other = load_source("timm:tf_efficientnet_b0.in1k", weights=published)
    assert other.spec.preprocessing.mean == (0.485, 0.456, 0.406)
    white = np.full((300, 300, 3), 255, np.uint8)
    assert Preprocessor(source.spec.preprocessing)([white]).max() == 1.0
    assert Preprocessor(other.spec.preprocessing)([white]).max() > 2


def test_timms_split_batch_norms_are_stripped(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = convert_splitbn_model(timm.create_model("resnet10t", num_classes=5), 2)
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "s.pth"
    )
    source = load_source(tmp_path / "s.pth", "resnet10t")
    assert torch.equal(logits(source.model), logits(model.eval()))
    split = load_source(tmp_path / "s.pth", "resnet10t", route="aux_bn.0")
    found, expected = (net.get_buffer("running_var") for net in (split.model.get_submodule("bn1"), model.bn1.aux_bn[0]))
    assert torch.equal(found, expected)


def test_an_auxiliary_route_is_exported_on_request(trained: FitResult) -> None:
    content = load_checkpoint(trained.last)
    model = add_auxiliary_bns(timm.create_model("resnet10t", num_classes=10), ["adv"])
    model.load_state_dict(content["state_dict"])
    source = load_source(trained.last, route="adv", ema=False)
    assert source.spec.route == "adv"
    with route(model.eval(), "adv"):
        assert torch.equal(logits(source.model), logits(model))
    assert not torch.equal(logits(source.model), logits(load_source(trained.last, ema=False).model))
    with pytest.raises(ConfigError, match="no BatchNorm route 'nonsense'; available: main, adv"):
        load_source(trained.last, route="nonsense")


def test_the_moving_average_is_optional(trained: FitResult) -> None:
    content = load_checkpoint(trained.last)
    plain, average = (load_source(trained.last, ema=ema).model.get_parameter("conv1.0.weight") for ema in (False, True))
    assert torch.equal(plain, content["state_dict"]["conv1.0.weight"])
    assert not torch.equal(plain, average)


@pytest.mark.slow
def test_auxiliary_statistics_do_not_change_an_export(trained: FitResult, tmp_path: Path) -> None:
    content = load_checkpoint(trained.last)
    for name in ("state_dict", "ema_state_dict"):
        content[name] = {
            key: torch.full_like(value, float("nan")) if ".aux." in key and value.is_floating_point() else value
            for key, value in content[name].items()
        }
    save_checkpoint(tmp_path / "garbage.pt", content)
    files = [
        export_checkpoint(path, ExportConfig(out=tmp_path / name, precision="fp16"))
        for name, path in (("clean", trained.last), ("garbage", tmp_path / "garbage.pt"))
    ]
    for kind in ("onnx", "reduced_onnx"):
        clean, garbage = (getattr(result, kind).read_bytes() for result in files)
        # The file contains the hash of its checkpoint, which differs.
        hashes = [load_source(path).spec.checkpoint_sha256.encode() for path in (trained.last, tmp_path / "garbage.pt")]
        assert clean.replace(*hashes) == garbage


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["timm:tf_efficientnet_b0", "--arch", "resnet18"], "remove --arch"),
        (["timm:tf_efficientnet_b0", "--route", "adv"], "timm's weights have the BatchNorm route main only"),
        (["timm:tf_efficientnet_b00"], "no architecture 'tf_efficientnet_b00'; did you mean"),
        (["{published}", "--arch", "tf_efficientnet_b0", "--weights", "{published}"], "--weights requires timm:NAME"),
        (["{published}"], r"plain state_dict"),
        (["timm:resnet18", "--weights", "{published}"], "does not fit resnet18: it has no fc.weight"),
        (["timm:tf_efficientnet_b0", "--weights", "{published}"], "add --data DIR"),
    ],
)
def test_conflicting_options_are_refused(published: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    filled = [argument.format(published=published) for argument in arguments]
    result = CliRunner().invoke(main, [*filled, "--out", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert expected in " ".join(result.output.split())


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"expected a state dict of weights in .*: it is a dict with a"):
        load_source(tmp_path / "a.pth", "resnet18")


@pytest.mark.parametrize(
    ("count", "budget", "calibrated", "verified"), [(40, None, 16, 24), (12, None, 9, 3), (12, 1.0, 4, 4)]
)
def test_calibration_data_verifies_on_images_that_do_not_calibrate(
    tmp_path: Path, count: int, budget: float | None, calibrated: int, verified: int
) -> None:
    data = labeled_folder(tmp_path / "photos", {"red": "red"}, count=count)
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "w.pth")
    bare = load_source(tmp_path / "w.pth", "resnet10t", size=(32, 32))
    source, settings = with_unused_images(bare, data, CalibrationConfig(images=16, budget=budget))
    chosen = calibration_set(data, settings.images, held=budget is not None)
    assert (len(chosen.images), len(source.images_NHWC)) == (calibrated, verified)
    used = Preprocessor(bare.spec.preprocessing).fit([data / image.name for image in (*chosen.images, *chosen.held)])
    assert not any(np.array_equal(one, other) for one in source.images_NHWC for other in used)
    chosen.save(tmp_path / "m.calib.json")
    again, _ = with_unused_images(bare, tmp_path / "m.calib.json", CalibrationConfig())
    assert len(again.images_NHWC) == count - len(chosen.images)
    with pytest.raises(DataError, match="too few to calibrate and to verify on others"):
        with_unused_images(bare, labeled_folder(tmp_path / "few", {"red": "red"}, count=3), CalibrationConfig())
