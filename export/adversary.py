"""Create adversarial calibration images with the gradient of the exported network."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from calib.images import Adversary
from export.source import Source
from train.attack import evaluation_attack
from train.recipes import MAIN

__all__ = ["EPSILON", "adversary_of"]

EPSILON = 4.0
"""Maximum change of a pixel, in 1/255: the usual ε for ImageNet models."""
_STEPS = 3


def adversary_of(source: Source) -> Adversary:
    """Return a function that attacks normalized images, float32 (N, 3, H, W), with PGD-3.

    The attack is untargeted. It moves images away from the class that the network predicts, because
    calibration images have no labels. The seed of the random start depends on the content of the
    batch, so equal batches yield equal adversarial images.
    """
    preprocessing = source.spec.preprocessing
    attack = evaluation_attack(EPSILON, preprocessing.mean, preprocessing.std, steps=_STEPS)

    def attacked(images_NCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        images = torch.from_numpy(images_NCHW)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(images_NCHW.tobytes()))
            with torch.inference_mode():
                labels_N = source.model(images).argmax(1)
            result: NDArray[np.float32] = attack(source.model, images, labels_N.clone(), MAIN).numpy()
        return result

    return attacked
