"""Digits, a network that classifies them in ONNX and torch, and models that record queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from advprop.checkpoints.attacker import gradient_attacks
from runtime.evaluate.attacks.methods import Attacker, image_generator, image_seed
from runtime.evaluate.attacks.target import AttackTarget, evaluate_images
from runtime.evaluate.models import Model
from tests.support.report_sets import digit_images


def held_digits(model: Model, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return digits that the network was not fitted to and classifies correctly."""
    images, labels = digit_images()
    images, labels = images[1500:], labels[1500:].astype(np.int64)
    right = evaluate_images(model, images, labels)[0]
    return images[right][:count], labels[right][:count]


def torch_digit_net(file: Path) -> nn.Module:
    """Return the network of `report_sets.digit_net` in torch, with the weights of the ONNX file."""
    weights = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(file).graph.initializer
    }
    first = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
    second = nn.Conv2d(16, 24, 3, padding=1, bias=False)
    last = nn.Linear(weights["head"].shape[0], 10, bias=False)
    for layer, weight in ((first, weights["w0"]), (second, weights["w1"]), (last, weights["head"].T)):
        layer.weight = nn.Parameter(weight.contiguous())
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), last).eval()


def digit_attacker(file: Path, model: Model, name: str = "net.main") -> Attacker:
    """Return that network as a checkpoint to attack with."""
    craft = gradient_attacks(torch_digit_net(file), model.spec, torch.device("cpu"))
    return Attacker(name=name, spec=model.spec, craft=craft, facts={"sha256": "of the checkpoint"})


def target_of(model: Model, images: NDArray[np.uint8], labels: NDArray[np.int64], radius: int) -> AttackTarget:
    """Return a model under attack on images that are all classified correctly."""
    return AttackTarget(model, images, labels, np.ones(len(labels), bool), radius, "an attack")


def generators_of(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [image_generator(image_seed(seed, str(place), "an attack", 4.0)) for place in range(count)]


def recording(model: Model, seen: list[NDArray[np.uint8]]) -> Model:
    """Return the same model, which also appends every batch it gets to `seen`."""

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        seen.append(images.copy())
        return model.logits(images)

    return dataclasses.replace(model, logits=logits)


def with_logits(model: Model, logits: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> Model:
    return dataclasses.replace(model, logits=logits)
