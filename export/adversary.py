"""Adversarial images for calibration: attacks on the network that is exported."""

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
"""Largest change of a pixel, in 1/255: what ImageNet models are attacked with."""
_STEPS = 3


def adversary_of(source: Source) -> Adversary:
    """Returns an untargeted PGD attack on `source`'s network, away from the class it gives itself.

    The same images give the same attacked ones: the random start is drawn from their content.
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
