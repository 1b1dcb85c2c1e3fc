"""EfficientNet-Lite0 with its real ImageNet weights on real photographs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lite0_export import measure
from real_weights import labelled_images

from export.verify import TOLERANCE, compare


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_every_stage_answers_like_the_checkpoint(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    data = shared_data("imagenet_dev.tar") / "imagenet_dev"
    stages = measure(data, tmp_path, images=60)
    labels = np.asarray(labelled_images(data)[1][:60])
    assert (stages["torch"].argmax(1) == labels).mean() > 0.8
    for name, tolerance in (("ONNX FP32", "fp32"), ("ONNX FP16", "fp16"), ("ONNX FP32, uint8 in", "fp32")):
        parity = compare(stages["torch"], stages[name])
        assert (parity.relative <= TOLERANCE[tolerance], parity.agreement) == (True, 1.0), name
