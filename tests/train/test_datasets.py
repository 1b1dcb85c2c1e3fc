import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.errors import ConfigError, DataError
from runtime.spec import Preprocessing
from runtime.system.decode import decode
from tests.support.archive_files import files_of, pack
from train.config import DataConfig, OptimConfig, TrainConfig
from train.data import ImageSet, ImageStream, embedded_digits
from train.datasets import open_data
from train.loaders import eval_loader, train_loader
from train.loop import fit

CPU = torch.device("cpu")
SPEC = Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)


webdataset_leaves_files_open = pytest.mark.filterwarnings(
    "ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning"
)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the embedded digits in the file format of MNIST."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = embedded_digits()
    for part, images in (("train", digits.train), ("t10k", digits.val)):
        assert isinstance(images, ImageSet)
        small = (decode(images.images[number]).convert("L") for number in range(len(images)))
        pixels = np.stack([np.asarray(image.resize((28, 28))) for image in small])
        header = struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = np.array(images.labels, dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes())
    return root


@pytest.fixture
def shards(image_folder: Path, tmp_path: Path) -> Path:
    """Write the image folder as WebDataset shards, with the index that timm needs."""
    root = tmp_path / "shards"
    splits = {}
    for part in ("train", "val"):
        lengths = {}
        for number, name in enumerate(("bright", "dark")):
            files: dict[str, bytes] = {}
            for path, content in files_of(image_folder / part / name).items():
                files[f"{name}-{path}"] = content
                files[f"{name}-{path}".replace(".png", ".cls")] = str(number).encode()
            pack(root / f"{part}-{number}.tar", files)
            lengths[f"{part}-{number}.tar"] = len(files) // 2
        splits[part] = {
            "name": part,
            "num_samples": sum(lengths.values()),
            "filenames": list(lengths),
            "shard_lengths": list(lengths.values()),
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def test_a_torchvision_dataset_is_read(mnist: Path) -> None:
    data = open_data(DataConfig(dataset="torch/mnist", root=mnist))
    assert data.classes[:2] == ("0 - zero", "1 - one")
    assert (len(data.train), len(data.val), data.short_side) == (1437, 360, 28)
    expected = embedded_digits().train
    assert isinstance(data.train, ImageSet) and isinstance(expected, ImageSet)
    assert data.train.labels == expected.labels
    assert data.train.name(3) == "torch/mnist[3]"


@pytest.mark.slow
def test_training_on_a_torchvision_dataset(mnist: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        arch="resnet10t",
        epochs=1,
        batch_size=128,
        out=tmp_path,
        data=DataConfig(dataset="torch/mnist", root=mnist, workers=2, img_size=16),
        optim=OptimConfig(),
    )
    result = fit(config)
    assert result.metrics[0].step == 11


def test_a_hugging_face_dataset_is_read(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra [datasets] is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = DataConfig(dataset=f"hfds/{image_folder}", root=tmp_path / "cache")
    data = open_data(config)
    assert data.classes == ("bright", "dark")
    assert (len(data.train), len(data.val), data.short_side) == (48, 16, 36)
    assert isinstance(data.val, ImageSet)
    darkness = [np.asarray(decode(data.val.images[index])).mean() < 100 for index in range(16)]
    assert darkness == [label == 1 for label in data.val.labels]


@webdataset_leaves_files_open
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_reproducible_and_resumes(shards: Path, workers: int) -> None:
    pytest.importorskip("webdataset", reason="the extra [datasets] is not installed")
    config = DataConfig(dataset="wds/", root=shards, val_split="val", num_classes=2, workers=workers)
    data = open_data(config)
    assert isinstance(data.train, ImageStream)
    assert (data.classes, data.short_side) == (("class 0", "class 1"), 36)

    def epoch(number: int, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loader = train_loader(data, config, SPEC, batch_size=8, seed=5, device=CPU)
        loader.start_at(number, start)
        batches = list(loader)
        assert len(batches) == len(loader) == 6 - start
        return batches

    first, again, resumed, other = epoch(0), epoch(0), epoch(0, 4), epoch(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first[4:], resumed, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert torch.cat([labels for _, labels in first]).bincount().tolist() == [24, 24]

    def labels_of(every: int) -> list[int]:
        loader = eval_loader(data, config, SPEC, batch_size=8, device=CPU, every=every)
        return torch.cat([labels for _, labels in loader]).tolist()

    assert sorted(labels_of(every=1)) == [0] * 8 + [1] * 8
    assert sorted(labels_of(every=4)) == [0] * 2 + [1] * 2


@webdataset_leaves_files_open
@pytest.mark.slow
def test_training_on_a_stream(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra [datasets] is not installed")
    data = DataConfig(dataset="wds/", root=shards, val_split="val", num_classes=2, workers=1)
    result = fit(TrainConfig(arch="resnet10t", epochs=2, batch_size=8, out=tmp_path / "run", data=data))
    assert [row.step for row in result.metrics] == [6, 12]
    assert result.best_epoch.top1 == 1.0  # bright versus dark images


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        ({"dataset": "cifar10"}, ConfigError, r"'cifar10': unknown kind of dataset; expected torch/…, hfds/…"),
        ({"dataset": "torch/mnist"}, ConfigError, "needs --data DIR"),
        ({"dataset": "torch/mnist", "root": "here"}, DataError, r"timm cannot open torch/mnist.*data\.download=true"),
        ({"dataset": "torch/nonsense", "root": "here"}, DataError, "Unknown torchvision dataset nonsense"),
    ],
)
def test_unusable_names_are_refused(
    tmp_path: Path, config: dict[str, Any], kind: type[Exception], expected: str
) -> None:
    root = {"root": tmp_path} if "root" in config else {}
    with pytest.raises(kind, match=expected):
        open_data(DataConfig(**{**config, **root}))


def test_a_path_that_the_file_system_refuses_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read --data .*: File name too long"):
        open_data(DataConfig(root=tmp_path / ("x" * 300)))


@webdataset_leaves_files_open
def test_a_stream_without_a_number_of_classes_is_refused(shards: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra [datasets] is not installed")
    with pytest.raises(ConfigError, match=r"the number of classes of wds/ is unknown; add --set data\.num_classes=N"):
        open_data(DataConfig(dataset="wds/", root=shards, val_split="val"))
