"""The corruptions of ImageNet-C, computed on the fly: nothing is downloaded or stored.

    from runtime.evaluate.corruptions import corrupt

    corrupt(image_HWC, "fog", severity=3, key="val/cat/17.jpg")

Fifteen corruptions count in mCE (`CORRUPTIONS`); four more are for validation (`EXTRAS`). The
algorithms and parameters are those of Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations" (ICLR 2019), and of the code published with it,
github.com/hendrycks/robustness. All three of its parameter tables are included: ImageNet, Tiny
ImageNet and CIFAR.

Importing this package needs only NumPy. OpenCV, SciPy and Pillow are imported by the corruptions
that need them.
"""

from __future__ import annotations

from runtime.evaluate.corruptions.corrupt import corrupt
from runtime.evaluate.corruptions.severities import CORRUPTIONS, EXTRAS, TABLES, table_for

__all__ = ["CORRUPTIONS", "EXTRAS", "TABLES", "corrupt", "table_for"]
