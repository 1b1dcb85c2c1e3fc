"""`advprop attack` on files and a real checkpoint, and `advprop report` of what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from advprop.cli import main
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from runtime.spec import METADATA_KEY
from tests.support.evaluation_sets import labeled_folder, spec_of, toy_onnx
from train.checkpoint import save_checkpoint
from train.models import create_model


def run(*arguments: object, command: str = "attack") -> Result:
    return CliRunner().invoke(main, [command, *map(str, arguments)])


def attack(*arguments: object) -> Result:
    return run(*arguments, "--device", "cpu", "--threads", "1", "--queries", "10", "--draws", "3", "--steps", "2")


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def checkpoint_of(path: Path, classes: tuple[str, ...] = ("red", "green", "blue")) -> Path:
    """Write the checkpoint of an untrained network."""
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=len(classes))
    spec = dataclasses.replace(spec_of(classes, wnids=()), arch="resnet10t")
    fields: dict[str, Any] = {"arch": "resnet10t", "model_kwargs": {"num_classes": len(classes)}, "recipe": "vanilla"}
    fields |= {"spec": spec.to_json(), "state_dict": model.state_dict(), "ema_state_dict": None, "epoch": 0, "step": 0}
    sample = {"images": torch.zeros(4, 32, 32, 3, dtype=torch.uint8), "labels": torch.zeros(4)}
    save_checkpoint(path, {**fields, "sample": sample})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_folder(tmp_path_factory.mktemp("data") / "set", count=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("checkpoint") / "best.pt")


@pytest.fixture(scope="module")
def file(checkpoint: Path) -> Path:
    return export_checkpoint(checkpoint, ExportConfig(out=checkpoint.parent / "model")).onnx


def test_all_attacks_are_in_one_table_and_in_the_report(
    tmp_path: Path, data: Path, checkpoint: Path, file: Path
) -> None:
    result = attack(file, "--checkpoint", checkpoint, "--data", data, "--eps", "2,8", "--limit", "6", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    words = ("top-1 on 6 images", "ε = 2/255", "pgd", "apgd", "square, 10 queries", "worst", "noise, worst of 3")
    for word in (*words, "* white box", "square fooled it on"):
        assert word in result.output, result.output
    own, model = content(tmp_path / "best.attack.json"), content(tmp_path / "model.attack.json")
    assert [curve["attack"] for curve in own["curves"]] == ["pgd", "apgd", "noise", "worst"]
    assert [curve["attack"] for curve in model["curves"]] == ["pgd", "apgd", "square", "noise", "worst"]
    assert own["curves"][0]["white_box"]
    assert model["curves"][0]["of_own_checkpoint"]
    assert own["names_sha256"] == model["names_sha256"]
    # The file equals the checkpoint up to rounding, so transfer is as strong as a white-box attack.
    assert own["curves"][0]["points"] == model["curves"][0]["points"]
    options = ("--suite", "imagenet", "--limit", "6", "--workers", "0", "--device", "cpu")
    again = run(file, checkpoint, "--data", data, "--out", tmp_path, *options, command="eval")
    assert again.exit_code == 0, again.output
    evaluated = content(tmp_path / "model.imagenet.json")
    assert evaluated["cells"]["images"]["names_sha256"] == model["names_sha256"]
    assert evaluated["cells"]["images"]["counts"]["top1"] == model["curves"][0]["points"][0]["right"]
    page = run(*sorted(tmp_path.glob("*.json")), "-o", tmp_path / "report.html", command="report")
    assert page.exit_code == 0, page.output
    html = (tmp_path / "report.html").read_text()
    for word in (
        "model under attack",
        "best under attack",
        "in 1/255 of the pixel range",
        ">noise<",
        ">worst<",
        "dashed",
    ):
        assert word in html, word


def test_a_checkpoint_is_attacked_with_its_own_gradient(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    result = attack(checkpoint, "--data", data, "--out", tmp_path, "--attacks", "pgd,noise", "--limit", "3")
    assert result.exit_code == 0, result.output
    assert content(tmp_path / "best.attack.json")["curves"][0]["white_box"]
    assert "--checkpoint has no effect" not in result.output


def test_without_a_checkpoint_only_square_and_noise_run(tmp_path: Path, data: Path) -> None:
    model = toy_onnx(tmp_path / "toy.onnx")
    result = attack(model, "--data", data, "--out", tmp_path, "--limit", "6")
    assert result.exit_code == 0, result.output
    assert "no transfer attacks: PGD and APGD need --checkpoint. Square attack alone is weak" in result.output
    assert "top-1 on 6 images" in result.output
    assert "ε = 8/255" in result.output  # 32 pixels
    found = content(tmp_path / "toy.attack.json")
    assert [curve["attack"] for curve in found["curves"]] == ["square", "noise", "worst"]
    assert found["checkpoint"] is None
    assert found["model"]["arithmetic"] == "as written, every rounding done"
    alone = attack(model, "--data", data, "--out", tmp_path, "--attacks", "square")
    assert "no noise control" in alone.output
    assert run(command="attack").exit_code == 2


def test_transfer_from_an_unrelated_checkpoint_causes_a_warning(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    model = toy_onnx(tmp_path / "toy.onnx", spec=spec_of(wnids=()))
    options = ("--data", data, "--out", tmp_path, "--checkpoint", checkpoint)
    result = attack(model, *options, "--attacks", "pgd")
    assert result.exit_code == 0, result.output
    assert "toy: according to the model file, it was not exported from this checkpoint" in result.output
    assert "transfer alone overestimates" in result.output
    unused = attack(model, *options, "--attacks", "noise")
    assert "--checkpoint has no effect" in unused.output


def test_invalid_input_exits_with_2_and_a_message(tmp_path: Path, data: Path, checkpoint: Path, file: Path) -> None:
    (tmp_path / "empty" / "red").mkdir(parents=True)
    labeled_folder(tmp_path / "strange", {"purple": "red"}, count=1)
    (tmp_path / "taken").write_text("a file")
    other = checkpoint_of(tmp_path / "other.pt", ("a", "b"))
    model, out = toy_onnx(tmp_path / "toy.onnx"), ("--out", tmp_path)
    proto = onnx.load(model)
    spec = dataclasses.replace(spec_of(), output_form="topk")
    onnx.helper.set_model_props(proto, {METADATA_KEY: spec.to_json()})
    cases = [
        ((model, "--data", data, "--eps", "0", *out), "ε must be from 1 to 255, in units of 1/255, such as 4; found 0"),
        ((model, "--data", data, "--eps", "0.0157", *out), "for 0.0157 of the range [0, 1], pass 4"),
        ((model, "--data", data, "--eps", "300", *out), "found 300"),
        ((model, "--data", data, "--eps", "four", *out), "expected numbers such as 1,2,4; found 'four'"),
        ((model, "--data", data, "--attacks", "sqare", *out), "unknown attack 'sqare'; did you mean square"),
        ((model, "--data", data, "--attacks", "pgd,noise", *out), "pgd need a gradient, which model files do not"),
        ((model, "--data", tmp_path / "none", *out), "found no such file or folder"),
        ((model, "--data", tmp_path / "empty", *out), "found none"),
        ((model, "--data", tmp_path / "strange", *out), "expected folders named by the model's classes"),
        ((model, "--data", data, "--out", tmp_path / "taken"), "cannot write"),
        ((tmp_path / "none.onnx", "--data", data, *out), "no such"),
        ((file, "--data", data, "--checkpoint", other, *out), "other has other classes"),
        ((file, "--data", data, "--checkpoint", file, *out), "is a model file, which has no gradient"),
        ((file, "--data", data, "--checkpoint", tmp_path / "none.pt", *out), "no such"),
    ]
    for arguments, words in cases:
        result = attack(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in " ".join(result.stderr.split()), (words, result.stderr)
    assert not list(tmp_path.glob("*.attack.json"))


def test_ctrl_c_stops_an_attack_and_keeps_its_progress(tmp_path: Path, data: Path) -> None:
    model = toy_onnx(tmp_path / "toy.onnx")
    command = [sys.executable, "-m", "advprop.cli", "attack", str(model), "--data", str(data), "--out", str(tmp_path)]
    # Blocks of one image: a few are finished early, and most are not.
    command += ["--queries", "2000", "--batch-size", "1", "--eps", "1", "--device", "cpu", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while not any(path.read_bytes().count(b"\n") > 2 for path in tmp_path.glob(".unfinished-*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "steps are finished; run the same command to resume" in output
    assert list(tmp_path.glob(".unfinished-*"))
    assert not list(tmp_path.glob("*.attack.json"))
