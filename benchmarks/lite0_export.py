"""Measure the top-1 accuracy of EfficientNet-Lite0 at each stage of an export.

    python -m benchmarks.lite0_export --data imagenet_dev    500 images: about a minute on two cores

`--data` contains `WNID/*.JPEG`. Each row uses the preprocessing of the file's own spec:

    torch                 the stock timm model with timm's transform
    ONNX FP32             the exported file in ONNX Runtime
    ONNX FP16             the FP16 file with every FP16 tensor rounded as on a GPU
    ONNX FP32, uint8 in   a file whose input is uint8 pixels
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from tests.support.lite0_stages import stage_logits
from tests.support.real_weights import ARCH, labeled_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    _, labels = labeled_images(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        stages = stage_logits(arguments.data, Path(folder))
    reference = stages["torch"]
    print(f"{ARCH}, {len(labels)} images")
    print(f"{'':20} {'top-1':>6} {'agrees with torch':>18} {'max |Δlogit|':>13}")
    for name, logits in stages.items():
        classes = logits.argmax(1)
        print(
            f"{name:20} {(classes == np.asarray(labels)).mean():6.1%} "
            f"{(classes == reference.argmax(1)).mean():18.1%} {np.abs(logits - reference).max():13.1e}"
        )


if __name__ == "__main__":
    main()
