"""EfficientNet-Lite0 with its real ImageNet weights on real photographs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.verify import TOLERANCE, compare
from tests.support.lite0_stages import stage_logits
from tests.support.real_weights import labeled_images


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_every_stage_agrees_with_the_checkpoint(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "few"
    for folder in sorted((shared_data("imagenet_dev.tar") / "imagenet_dev").iterdir())[:24]:
        shutil.copytree(folder, data / folder.name)
    stages = stage_logits(data, tmp_path, images=24)
    labels = np.asarray(labeled_images(data)[1])
    assert (stages["torch"].argmax(1) == labels).mean() > 0.8
    for name, tolerance in (("ONNX FP32", "fp32"), ("ONNX FP16", "fp16"), ("ONNX FP32, uint8 in", "fp32")):
        parity = compare(stages["torch"], stages[name])
        assert (parity.relative <= TOLERANCE[tolerance], parity.agreement) == (True, 1.0), name
