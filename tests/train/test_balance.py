import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from runtime.errors import ConfigError
from train.balance import balanced_order, check_balance, class_weights
from train.config import DataConfig, OptimConfig, TrainConfig
from train.data import ImageStream, embedded_digits
from train.folders import image_folder as open_folder
from train.loop import fit
from train.samples import EpochBatches

UNEVEN = [0] * 30 + [1] * 6 + [2] * 3


def test_a_balanced_order_draws_all_classes_equally_often() -> None:
    order = balanced_order(torch.tensor(UNEVEN), torch.Generator().manual_seed(0))
    assert torch.bincount(torch.tensor(UNEVEN)[order]).tolist() == [13, 13, 13]
    uses = torch.bincount(order, minlength=len(UNEVEN))
    assert uses[:30].max() == 1  # 13 of 30 images
    assert sorted(uses[30:36].tolist()) == [2, 2, 2, 2, 2, 3]
    assert sorted(uses[36:].tolist()) == [4, 4, 5]


def test_balanced_batches_depend_on_seed_and_epoch_only() -> None:
    first, again, other = (EpochBatches(UNEVEN, 8, seed, balanced=True) for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert list(first) != list(other)
    assert len(list(first)) == len(first) == 4
    resumed = EpochBatches(UNEVEN, 8, 1, balanced=True)
    resumed.start = 2
    assert list(resumed) == list(first)[2:]
    first.epoch = 1
    assert [index for _, index in next(iter(first))] != [index for _, index in next(iter(again))]


def test_class_weights_are_inverse_to_class_sizes() -> None:
    weights = class_weights(UNEVEN, 4)
    torch.testing.assert_close(weights, torch.tensor([13 / 30, 13 / 6, 13 / 3, 1.0]))
    assert weights[torch.tensor(UNEVEN)].mean() == pytest.approx(1)


def test_a_stream_cannot_be_balanced() -> None:
    stream = dataclasses.replace(embedded_digits(), train=ImageStream(lambda *_: None))
    check_balance(stream, "none")
    with pytest.raises(ConfigError, match=r"data\.balance=loss needs the labels.*--set data\.balance=none"):
        check_balance(stream, "loss")


def test_very_uneven_classes_are_reported(uneven_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_balance(open_folder(uneven_folder), "sampler")
        assert "data.balance" not in caplog.text
        check_balance(open_folder(uneven_folder), "none")
    assert "the class bright has 24 training images and dark has 2: --set data.balance=sampler" in caplog.text


@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_training_on_uneven_classes(uneven_folder: Path, tmp_path: Path, balance: str) -> None:
    data = DataConfig(root=uneven_folder, img_size=32, workers=0, balance=balance, mixup=0.2)
    optim = OptimConfig(lr=1e-3)
    config = TrainConfig(
        arch="test_resnet", recipe="fast", epochs=2, batch_size=13, out=tmp_path / "run", data=data, optim=optim
    )
    assert len(fit(config).metrics) == 2


@pytest.fixture
def uneven_folder(image_folder: Path) -> Path:
    """Remove 22 of 24 training images of the class `dark`."""
    for number in range(2, 24):
        (image_folder / "train" / "dark" / f"{number}.png").unlink()
    return image_folder
