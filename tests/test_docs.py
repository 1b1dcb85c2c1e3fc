"""The code that the documentation shows is run."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from export.config import ExportConfig
from export.pipeline import export_checkpoint
from tests.support import ROOT
from tests.support.evaluation_sets import labeled_folder, toy_onnx
from tests.support.serving_models import images_of, serving_model
from train.loop import FitResult


def block(file: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S)
    return next(text for text in blocks if containing in text)


def test_a_loop_of_your_own() -> None:
    loader = [(torch.rand(4, 3, 32, 32) * 2 - 1, torch.tensor([0, 1, 2, 3]))] * 2
    names: dict[str, object] = {"loader": loader}
    exec(block("docs/training.md", "AdvPropTask("), names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_stripping_a_checkpoint(trained: FitResult) -> None:
    code = block("docs/training.md", "strip_auxiliary(").replace("runs/resnet50/best.pt", str(trained.best))
    exec(code.replace('"resnet50"', '"resnet10t"'), {})


def test_evaluating_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labeled_folder(tmp_path / "val", count=2)
    toy_onnx(tmp_path / "model.onnx")
    code = block("docs/evaluation.md", "SuiteConfig(")
    for shown, real in (("photos/val", "val"), ("model.onnx", "model.onnx"), ("evaluation", "out")):
        code = code.replace(f'Path("{shown}")', f"Path({str(tmp_path / real)!r})")
    exec(code.replace("limit=500", 'limit=4, only=("fog",)'), {"__name__": "__main__"})
    assert "'corruptions': ['fog']" in capsys.readouterr().out


@pytest.mark.slow
def test_embedding(trained: FitResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = export_checkpoint(trained.last, ExportConfig(out=tmp_path, precision="fp16"))
    Image.fromarray(np.full((9, 9), 128, np.uint8)).save(tmp_path / "photo.jpg")
    code = block("README.md", "import runtime").replace(
        '"runs/efficientnet_b3/model.fp16.onnx"', repr(str(result.reduced_onnx))
    )
    exec(code.replace('"photo.jpg"', repr(str(tmp_path / "photo.jpg"))), {})
    assert re.fullmatch(r"\d 0\.\d+\n", capsys.readouterr().out)


def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    Image.fromarray(np.full((9, 9), 128, np.uint8)).save(tmp_path / "a.jpg")
    names: dict[str, object] = {"batch": images_of(1, 2), "jpeg_bytes": (tmp_path / "a.jpg").read_bytes()}
    code = block("docs/serving.md", "runtime.load(").replace('"model.fp16.onnx"', repr(str(tmp_path / "m.onnx")))
    exec(code.replace('["a.jpg", "b.jpg"]', repr([str(tmp_path / "a.jpg")] * 2)), names)
    exec(block("docs/serving.md", "submit_predict(").replace("0.5", "60"), names)
    assert [answer.label for answer in names["answer"]] == [names["answers"][0].label]
    assert "ONNX Runtime" in capsys.readouterr().out
    names["session"].close()
