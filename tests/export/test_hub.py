"""Folders for the Hugging Face Hub: weights that timm loads, and model cards."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import advprop
from export.cli import main
from export.config import ExportConfig
from export.hub import export_hub
from export.pipeline import export_checkpoint
from export.source import load_source
from runtime.errors import CheckpointError, DataError
from runtime.preprocessing import normalize
from runtime.system.files import sha256_file
from tests.support.evaluation_sets import labeled_folder, spec_of
from train.checkpoint import save_checkpoint
from train.config import DataConfig, TrainConfig
from train.config_file import to_toml
from train.dual_bn import add_auxiliary_bns
from train.models import create_model


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of an untrained network with an auxiliary route, as a run writes it."""
    path = tmp_path_factory.mktemp("run") / "best.pt"
    torch.manual_seed(0)
    model = add_auxiliary_bns(create_model("resnet10t", num_classes=3), ["adv"])
    averaged = {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    photos = path.parent / "photos"
    config = TrainConfig(arch="resnet10t", epochs=3, out=path.parent, data=DataConfig(root=photos, mixup=0.2))
    content: dict[str, Any] = {"arch": "resnet10t", "model_kwargs": {"num_classes": 3}, "recipe": "advprop"}
    spec = dataclasses.replace(spec_of(wnids=()), arch="resnet10t", recipe="advprop", dataset="photos")
    content |= {"spec": spec.to_json(), "state_dict": model.state_dict(), "ema_state_dict": averaged}
    content |= {"epoch": 3, "step": 9, "config": to_toml(config), "metrics": [{"epoch": 2, "top1": 0.75}]}
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8)
    save_checkpoint(path, {**content, "sample": {"images": images, "labels": torch.zeros(8)}})
    return path


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the result of an evaluation of the checkpoint on a few images with fog."""
    folder = tmp_path_factory.mktemp("results")
    data = labeled_folder(folder / "colors" / "val", count=2)
    suite = advprop.SuiteConfig(name="corruptions", data=data, only=("clean", "fog"))
    (found,) = advprop.evaluate(checkpoint, suite, advprop.RunConfig(out=folder, workers=0), device="cpu")
    path = folder / "best.main.corruptions.json"
    path.write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("ema", [True, False])
def test_timm_loads_the_network_with_the_same_logits(checkpoint: Path, tmp_path: Path, ema: bool) -> None:
    export_hub(checkpoint, tmp_path / "hub", ExportConfig(ema=ema))
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    source = load_source(checkpoint, ema=ema)
    images_NCHW = torch.from_numpy(normalize(source.images_NHWC[:8], source.spec.preprocessing))
    with torch.inference_mode():
        assert torch.equal(model(images_NCHW), source.model(images_NCHW))
    assert not any(".aux." in name for name in model.state_dict())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()), "BatchNorms are not folded"


def test_the_configuration_describes_classes_and_preprocessing(checkpoint: Path, tmp_path: Path) -> None:
    export_hub(checkpoint, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    spec = load_source(checkpoint).spec
    assert content["architecture"] == spec.arch
    assert tuple(content["label_names"]) == spec.classes
    assert not {"license", "tag", "origin_url"} & set(content["pretrained_cfg"])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    found = timm.data.resolve_model_data_config(model)
    size = spec.preprocessing
    assert found["input_size"] == (3, size.height, size.width)
    assert (tuple(found["mean"]), tuple(found["std"])) == (size.mean, size.std)
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == (
        *(size.interpolation, size.crop_pct, size.crop_mode),
    )
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 3
    assert len(set(modes.values())) == 1, "others can read the weights if they can read the card"


def test_the_card_has_a_model_index_of_the_results(checkpoint: Path, result: Path, tmp_path: Path) -> None:
    output = run(checkpoint, "--hub", tmp_path, "--results", result)
    assert f"results in the model card: {result}" in output.replace("\n", "")
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata is not None
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("timm", "image-classification")
    card = ModelCard.load(tmp_path / "README.md")
    assert not card.ignore_metadata_errors
    figures = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results or ()}
    metrics = json.loads(result.read_text())["metrics"]
    assert figures == {
        ("colors/val", "accuracy"): round(metrics["cells"]["clean"]["top1"], 4),
        ("colors/val, corruptions", "mean_corruption_error"): round(metrics["mean_error"]["value"], 4),
    }
    for text in (
        "advprop train --arch resnet10t --recipe advprop --epochs 3 --data photos --set data.mixup=0.2\n",
        "advprop eval best.pt --suite corruptions --data colors/val --seed 0",
        "| colors/val, corruptions | 6 | mean error |",
        "Best validation accuracy during training: 75.0%, in epoch 2",
    ):
        assert text in card.text, card.text
    assert str(result.parent) not in card.content
    assert str(checkpoint.parent) not in card.content


def test_results_in_the_run_are_found_and_those_of_other_models_are_not_used(
    checkpoint: Path, result: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    copy = folder / "best.pt"
    copy.write_bytes(checkpoint.read_bytes())
    assert export_hub(copy, tmp_path / "hub").results == ()
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.eval_results is None
    (folder / "evaluation" / "a.json").write_bytes(result.read_bytes())
    (folder / "broken.json").write_text("{")
    assert [each.file.name for each in export_hub(copy, tmp_path / "hub").results] == ["a.json"]
    exported = export_checkpoint(copy, ExportConfig(precision="fp16"))
    content = json.loads(result.read_text())
    for name, file in (("fp32", exported.onnx), ("fp16", exported.reduced_onnx)):
        assert file is not None
        content["model"] = {"name": name, "classes": 3, "sha256": sha256_file(file)}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    used = export_hub(copy, tmp_path / "hub", results=[tmp_path / "fp32.json", tmp_path / "fp16.json"])
    assert [each.file.name for each in used.results] == ["fp32.json"]
    with pytest.raises(DataError, match=r"fp16\.json \(fp16\); expected evaluations of .*advprop eval"):
        export_hub(copy, tmp_path / "hub", results=[tmp_path / "fp16.json"])
    with pytest.raises(DataError, match="no such result file or folder"):
        export_hub(copy, tmp_path / "hub", results=[tmp_path / "none.json"])


def test_an_edited_card_is_kept_and_an_unedited_one_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert not export_hub(checkpoint, tmp_path).card_kept
    written = card.read_text()
    assert not export_hub(checkpoint, tmp_path).card_kept
    assert card.read_text() == written
    card.write_text(written + "\nTested by us.\n")
    assert export_hub(checkpoint, tmp_path).card_kept
    assert card.read_text().endswith("Tested by us.\n")


def test_a_plain_state_dict_has_a_card_without_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save(expected.state_dict(), tmp_path / "w.pth")
    run(tmp_path / "w.pth", "--arch", "resnet10t", "--hub", tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images_NCHW = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        assert torch.equal(model(images_NCHW), expected(images_NCHW))
    assert "## Training" not in ModelCard.load(tmp_path / "hub" / "README.md").text


def test_a_failed_export_leaves_no_folder(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        export_hub(tmp_path / "bad.pt", tmp_path / "hub")
    (tmp_path / "taken").write_text("a file")
    refused = CliRunner().invoke(main, [str(checkpoint), "--hub", str(tmp_path / "taken" / "hub")])
    assert refused.exit_code == 2
    assert "cannot write" in refused.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "taken"]
    alone = CliRunner().invoke(main, [str(checkpoint), "--results", str(tmp_path)])
    assert "--results requires --hub" in alone.output
