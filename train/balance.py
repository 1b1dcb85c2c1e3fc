"""Training on classes of uneven size: draw their images equally often, or weight their losses."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from runtime.errors import ConfigError
from train.data import ImageData, ImageSet

__all__ = ["balanced_order", "check_balance", "class_weights"]

log = logging.getLogger(__name__)

_UNEVEN = 10


def check_balance(data: ImageData, balance: str) -> None:
    """Report classes of very uneven size if nothing is done about them.

    Raises:
        ConfigError: the training images are a stream, whose labels are not known in advance.
    """
    if not isinstance(data.train, ImageSet):
        if balance != "none":
            raise ConfigError(
                f"data.balance={balance} needs the labels of all training images, which the stream {data.name} "
                "does not have",
                fix="use files with random access (a folder, tar files), or --set data.balance=none",
            )
        return
    counts = torch.bincount(torch.tensor(data.train.labels), minlength=len(data.classes))
    most, fewest = int(counts.argmax()), int(counts.argmin())
    if balance == "none" and counts[most] >= _UNEVEN * counts[fewest]:
        log.warning(
            "the class %s has %d training images and %s has %d: --set data.balance=sampler draws all classes equally "
            "often",
            data.classes[most],
            counts[most],
            data.classes[fewest],
            counts[fewest],
        )


def class_weights(labels: Sequence[int], classes: int) -> torch.Tensor:
    """Return the weight of each class, (classes,): the mean class size divided by its size.

    The mean weight of an image is 1. A class without images has weight 1.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    mean = len(labels) / int((counts > 0).sum())
    return torch.where(counts > 0, mean / counts.clamp(min=1), 1.0)


def balanced_order(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return an order of `len(labels)` images in which all classes are equally frequent.

    Every image of a class is used before one is repeated.

    Args:
        labels: int64 labels of all images, (N,).
        generator: source of random numbers.

    Returns:
        Indices of images, (N,).
    """
    found = labels.unique()  # type: ignore[no-untyped-call]
    found = found[torch.randperm(len(found), generator=generator)]
    share, larger = divmod(len(labels), len(found))  # the first `larger` classes get one image more
    parts = []
    for place, label in enumerate(found):
        members = (labels == label).nonzero().flatten()
        count = share + (place < larger)
        rounds = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-count // len(members)))]
        parts += [torch.cat(rounds)[:count]] if rounds else []
    order = torch.cat(parts)
    return order[torch.randperm(len(order), generator=generator)]
