"""`advprop eval` and `advprop eval-merge`, on files and checkpoints."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from advprop.checkpoints import load_predictor
from advprop.cli import main
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime.errors import CheckpointError, ConfigError, SpecError
from runtime.evaluate.models import load_model
from runtime.evaluate.results import result_path
from runtime.spec import METADATA_KEY
from tests.support.checkpoints import save_resnet10t
from tests.support.evaluation_sets import labeled_folder, spec_of, toy_onnx
from train.checkpoint import load_checkpoint
from train.dual_bn import add_auxiliary_bns, route
from train.models import create_model, restore_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments), "--workers", "0", "--device", "cpu"])


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return labeled_folder(tmp_path / "set", count=10)


def test_a_table_and_a_result(tmp_path: Path, data: Path) -> None:
    model, out = toy_onnx(tmp_path / "toy.onnx"), tmp_path / "out"
    result = run(model, "--suite", "corruptions", "--data", data, "--out", out, "--only", "clean", "--only", "fog")
    assert result.exit_code == 0, result.output
    for text in ("clean top-1", "100.0% [88.6, 100.0]", "mean_error", "no mce_alexnet: mCE needs ImageNet's 1,000"):
        assert text in result.output, result.output
    assert "error, fog " in result.output
    one = run(model, "--suite", "corruptions", "--data", data, "--out", out, "--only", "fog/5", "--only", "snow/2")
    assert "error, fog/5" in one.output
    assert "error, snow/2" in one.output
    found = content(out / "toy.corruptions.clean+fog.json")
    assert found["format"] == "advprop.evaluation/1"
    assert found["model"]["arithmetic"] == "as written, every rounding done"
    assert found["model"]["backend"] == "onnxruntime"
    assert len(found["model"]["sha256"]) == 64
    assert found["settings"]["table"] == "cifar"
    assert found["data"]["path"] == str(data)
    assert {"numpy", "onnxruntime", "opencv", "pillow", "scipy", "advprop"} == set(found["versions"])
    assert found["cells"]["fog/3"]["counts"]["images"] == 30
    assert not list(out.glob(".unfinished-*"))


def test_shards_and_merge(tmp_path: Path, data: Path) -> None:
    model, out = toy_onnx(tmp_path / "toy.onnx"), tmp_path / "out"
    options = [model, "--suite", "imagenet", "--data", data, "--out", out, "--batch-size", 8]
    assert run(*options).exit_code == 0
    for shard in ("1/2", "2/2"):
        part = run(*options, "--shard", shard)
        assert part.exit_code == 0
        assert "merge all shards with advprop eval-merge" in part.output
    parts = sorted(map(str, out.glob("toy.imagenet.*of2.json")))
    merged = CliRunner().invoke(main, ["eval-merge", *parts, "--out", str(tmp_path / "all.json")])
    assert merged.exit_code == 0, merged.output
    assert "100.0%" in merged.output
    assert (tmp_path / "all.json").read_bytes() == (out / "toy.imagenet.json").read_bytes()
    assert run(*options, "--shard", "two").exit_code == 2
    twice = CliRunner().invoke(main, ["eval-merge", *parts, *parts, "--out", str(tmp_path / "all.json")])
    assert twice.exit_code == 2
    assert "overlap" in twice.stderr


def test_models_with_equal_names_have_separate_results(tmp_path: Path, data: Path) -> None:
    for folder, scale in (("a", 8.0), ("b", -8.0)):
        (tmp_path / folder).mkdir()
        toy_onnx(tmp_path / folder / "toy.onnx", scale)
    models = [tmp_path / folder / "toy.onnx" for folder in ("a", "b")]
    options = ["--suite", "imagenet", "--data", data, "--out", tmp_path / "out"]
    result = run(*models, *options, "--reference", models[0])
    assert result.exit_code == 0, result.output
    top1 = {}
    for path in (tmp_path / "out").glob("toy-*.imagenet.json"):
        found = content(path)
        top1[found["reference"] is None] = found["metrics"]["cells"]["images"]["top1"]
    assert top1 == {True: 1.0, False: 0.0}
    assert "-100.0 [-100.0, " in result.output
    same = run(models[0], models[0], *options)
    assert same.exit_code == 0  # a file given twice is evaluated once


def test_a_model_with_pixel_input_and_probabilities_has_the_same_result(tmp_path: Path, data: Path) -> None:
    plain = toy_onnx(tmp_path / "plain.onnx")
    text = """<ir_version: 9, opset_import: ["" : 20]> g (uint8[n, 32, 32, 3] input) => (float[n, 3] probs)
    <float half = {127.5}, float s = {0.12549019}>
    { x = Cast<to = 1>(input) y = Transpose<perm = [0, 3, 1, 2]>(x) z = Sub(y, half) p = GlobalAveragePool(z)
      f = Flatten(p) l = Mul(f, s) a = Add(l, l) b = Sub(a, l) probs = Softmax<axis = 1>(b) }"""
    model = onnx.parser.parse_model(text)
    spec = dataclasses.replace(spec_of(), input_form="uint8 NHWC", output_form="probs")
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, tmp_path / "pixels.onnx")
    options = ["--suite", "imagenet", "--data", data, "--out", tmp_path, "--reference", plain]
    result = run(plain, tmp_path / "pixels.onnx", *options)
    assert result.exit_code == 0, result.output
    floats, pixels = (content(tmp_path / f"{name}.imagenet.json") for name in ("plain", "pixels"))
    assert pixels["metrics"]["cells"]["images"]["against_reference"]["agreement"] == 1.0
    sums = [sum(found["cells"]["images"]["counts"]["bin_confidence_nano"]) for found in (floats, pixels)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write the checkpoint of an untrained network whose two routes have different outputs."""
    torch.manual_seed(0)
    model = add_auxiliary_bns(create_model("resnet10t", num_classes=3), ("adv",))
    for name, value in model.state_dict().items():
        if ".aux." in name and name.endswith(("weight", "bias")):
            value.uniform_(0.2, 1.5)
    return save_resnet10t(tmp_path / "best.pt", model, np.zeros((4, 32, 32, 3), np.uint8), recipe="advprop")


def test_both_routes_of_a_checkpoint_and_its_onnx_file_are_compared(
    tmp_path: Path, checkpoint: Path, data: Path
) -> None:
    out, file = tmp_path / "out", export_checkpoint(checkpoint, ExportConfig(out=tmp_path / "model")).onnx
    options = ["--suite", "imagenet", "--data", data, "--out", out]
    result = run(checkpoint, file, "--route", "main", "--route", "adv", "--reference", checkpoint, *options)
    assert result.exit_code == 0, result.output
    main_route, adv = (content(out / f"{name}.imagenet.json") for name in ("best", "best.adv"))
    exported = content(out / "model.imagenet.json")
    assert main_route["reference"] is None
    assert (main_route["model"]["route"], adv["model"]["route"]) == ("main", "adv")
    assert main_route["model"]["weights"] == "last"
    assert exported["model"]["checkpoint_sha256"] == main_route["model"]["sha256"]
    assert exported["metrics"]["cells"]["images"]["against_reference"]["agreement"] == 1.0
    assert exported["cells"]["images"]["counts"]["top1"] == main_route["cells"]["images"]["counts"]["top1"]
    sums = [sum(found["cells"]["images"]["counts"]["bin_confidence_nano"]) for found in (main_route, exported, adv)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    assert sums[0] != pytest.approx(sums[2], rel=1e-4)
    wrong = run(checkpoint, "--route", "none", *options)
    assert wrong.exit_code == 2
    assert "no BatchNorm route 'none'" in wrong.stderr


def test_a_loaded_route_has_the_logits_of_that_route(checkpoint: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    normalized = torch.from_numpy((images.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).float()
    network = restore_model(load_checkpoint(checkpoint), checkpoint, routes=True).eval()
    answers = {}
    for name in ("main", "adv"):
        answers[name] = load_model(checkpoint, route=name, device="cpu", checkpoint_loader=load_predictor).logits(
            images
        )
        with torch.inference_mode(), route(network, name):
            np.testing.assert_allclose(answers[name], network(normalized).numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(answers["main"] - answers["adv"]).max() > 1e-3


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "other.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "other.pt", checkpoint_loader=load_predictor)
    with pytest.raises(ConfigError, match=r"pass checkpoint_loader=advprop\.checkpoints\.load_predictor"):
        load_model(tmp_path / "other.pt")
    bare = toy_onnx(tmp_path / "bare.onnx")
    proto = onnx.load(bare)
    del proto.metadata_props[:]
    onnx.save(proto, bare)
    with pytest.raises(SpecError, match=r"has no advprop\.spec"):
        load_model(bare, device="cpu")
    missing = run(tmp_path / "none.onnx", "--suite", "imagenet", "--data", data, "--out", tmp_path)
    assert missing.exit_code == 2
    assert "no such ONNX file" in missing.stderr


def test_ray_options_are_checked_and_a_missing_ray_is_reported(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(toy_onnx(tmp_path / "toy.onnx")), "--suite", "imagenet", "--data", str(data)]
    monkeypatch.setitem(sys.modules, "ray", None)
    for more, code, words in (
        (["--ray", "auto"], 3, "[ray]'"),
        (["--ray-workers", "2"], 2, "require --ray ADDRESS"),
        (["--ray", "auto", "--workers", "1"], 2, "--workers cannot be combined with --ray"),
    ):
        result = CliRunner().invoke(main, ["eval", *options, *more])
        assert result.exit_code == code, result.output
        assert words in result.stderr


def test_the_result_of_another_file_with_that_name_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = ({"name": "model", "sha256": letter * 64} for letter in "ab")
    path = result_path(first, tmp_path, "imagenet.json")
    assert path == tmp_path / "model.imagenet.json"
    path.write_text(json.dumps({"model": first}))
    assert result_path(first, tmp_path, "imagenet.json") == path
    assert result_path(second, tmp_path, "imagenet.json") == tmp_path / "model-2.imagenet.json"
    assert "is the result of another model file" in caplog.text
    path.write_text("no JSON")
    assert result_path(second, tmp_path, "imagenet.json") == path
