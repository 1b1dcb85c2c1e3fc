"""The Python code in the documentation runs and does what the text says."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import advprop
import runtime
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from export.source import load_source
from tests.support import ROOT
from tests.support.evaluation_sets import labeled_folder, toy_onnx
from tests.support.serving_models import images_of, serving_model
from train.loop import FitResult


def block(file: str, containing: str) -> str:
    """Return the first block of Python code in a file that contains a text."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S)
    return next(text for text in blocks if containing in text)


def with_files(code: str, files: dict[str, Path]) -> str:
    """Replace the string literals that end with these names by the paths of real files."""
    for name, path in files.items():
        code = re.sub(rf'"[^"]*{re.escape(name)}"', repr(str(path)), code)
    return code


def run(code: str, **names: object) -> dict[str, Any]:
    """Run code as a program that already has some names. Return all names."""
    variables: dict[str, Any] = {"__name__": "__main__", **names}
    exec(code, variables)
    return variables


def trains_everything(code: str) -> bool:
    """Return whether a training loop updates all parameters, and the auxiliary BatchNorms see images."""
    batch = torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2, 3])
    found = run(code, loader=[batch] * 2)
    auxiliary = [buffer for name, buffer in found["model"].named_buffers() if ".aux.adv.running_mean" in name]
    assert auxiliary
    assert all(buffer.any() for buffer in auxiliary)
    steps = [found["optimizer"].state[parameter].get("step") for parameter in found["model"].parameters()]
    return all(step == 2 for step in steps)


def test_a_training_loop_updates_all_parameters() -> None:
    code = block("docs/how-to/training_loop.md", "AdvPropTask(")
    assert trains_everything(code)
    (task,) = re.findall(r"^task = .*\n", code, re.M)
    (optimizer,) = re.findall(r"^optimizer = .*\n", code, re.M)
    assert not trains_everything(code.replace(task, "").replace(optimizer, optimizer + task))


def test_a_stripped_checkpoint_has_the_weights_of_the_main_route(trained: FitResult) -> None:
    code = block("docs/how-to/timm.md", "strip_auxiliary(").replace("runs/resnet50/best.pt", str(trained.best))
    code = code.replace('"resnet50"', '"resnet10t"')
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.inference_mode():
        found = run(code)["model"].eval()(images)
        assert torch.equal(found, load_source(trained.best, ema=False).model(images))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\.aux\.adv\."):
        run(re.sub(r"strip_auxiliary\((.*?\])\)", r"\1", code))


def test_evaluation_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labeled_folder(tmp_path / "val", count=2)
    code = block("docs/how-to/test_sets.md", "SuiteConfig(").replace("limit=500", 'limit=4, only=("fog",)')
    files = {
        "photos/val": tmp_path / "val",
        "model.onnx": toy_onnx(tmp_path / "m.onnx"),
        "evaluation": tmp_path / "out",
    }
    run(with_files(code, files))
    assert "'corruptions': ['fog']" in capsys.readouterr().out


def test_a_benchmark_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: toy_onnx(tmp_path / name) for name in ("model.onnx", "model.int8.onnx")}
    code = block("docs/how-to/benchmark.md", "open_targets(")
    code = code.replace("batch_sizes=(1, 8)", "batch_sizes=(1, 8), warm_up_ms=0, duration_s=0, iterations=6, rounds=3")
    result = run(with_files(code, files))["result"]
    names = [point["model"] for point in result["points"] if point["batch_size"] == 8]
    assert len(names) == len(set(names)) == 4  # two files, each with ONNX Runtime as its peer
    assert float(capsys.readouterr().out.splitlines()[0]) > 0


@pytest.mark.slow
def test_a_prediction_from_python(trained: FitResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = export_checkpoint(trained.last, ExportConfig(out=tmp_path, precision="fp16")).reduced_onnx
    assert file is not None
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.full((9, 9), 128, np.uint8)).save(photo)
    run(with_files(block("README.md", "advprop.load("), {"model.fp16.onnx": file, "photo.jpg": photo}))
    with runtime.load(file) as session:
        (expected,) = session.predict([photo])
    assert capsys.readouterr().out == f"{expected.label} {expected.probability} {expected.top(3)}\n"


def test_a_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"model.fp16.onnx": tmp_path / "m.onnx", "a.jpg": tmp_path / "a.png", "b.jpg": tmp_path / "b.png"}
    onnx.save(serving_model(), files["model.fp16.onnx"])
    for name, color in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (9, 9), color).save(files[name])
    names: dict[str, Any] = {"batch": images_of(1, 2), "jpeg_bytes": files["b.jpg"].read_bytes()}
    names = run(with_files(block("docs/reference/session.md", "advprop.load("), files), **names)
    assert [answer.label for answer in names["answers"]] == ["red", "blue"]
    assert names["logits"].shape == (2, 3)
    assert "ONNX Runtime" in capsys.readouterr().out
    names = run(block("docs/reference/session.md", "submit_predict(").replace("0.5", "60"), **names)
    assert [answer.label for answer in names["answer"]] == ["blue"]
    names["session"].close()


def test_a_prediction_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    with advprop.load(tmp_path / "m.onnx") as session:
        code = with_files(block("docs/reference/python/index.md", "answer.top(3)"), {"photo.jpg": tmp_path / "a.png"})
        run(code, session=session, json=json)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("red: ")
    assert json.loads(last)["label"] == "red"


def test_every_name_of_advprop_in_the_documents_exists() -> None:
    files = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.py"))
    texts = [path.read_text() for path in files]
    names = {name for text in texts for name in re.findall(r"(?<![\w./-])advprop\.([A-Za-z]\w+)(?![\w/-]|\.pt)", text)}
    assert {"load", "fit", "export", "TrainConfig"} <= names
    known = {*advprop.__all__, "checkpoints"}
    assert names <= known | {"md", "adaptation", "confidence", "norms", "spec"}  # a page, and keys in model files
