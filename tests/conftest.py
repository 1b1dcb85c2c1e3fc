"""Fixtures shared by the tests of several packages: real data and a trained checkpoint."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support import SHARED_DATA
from tests.support.triton_server import make_environment
from train.config import DataConfig, OptimConfig, TrainConfig
from train.loop import FitResult, fit

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; commands that tests start inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start files with slow tests first: otherwise a process waits for one of them in the end."""
    files = [item.path for item in items]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(files)
    order = sorted(
        dict.fromkeys(files), key=lambda file: (slow[file] == 0, tests[file] if slow[file] else -tests[file])
    )
    rank = {file: position for position, file in enumerate(order)}
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a temporary cache folder for tests and the commands that they start."""
    os.environ["ADVPROP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that unpacks an archive of the data folder next to the checkout.

    The test is skipped if the archive does not exist.
    """

    def unpack(name: str) -> Path:
        archive = SHARED_DATA / name
        if not archive.is_file():
            pytest.skip(f"needs {name} in the data folder next to the checkout, which does not exist")
        folder = tmp_path_factory.mktemp("data")
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
        return folder

    return unpack


@pytest.fixture(scope="session")
def triton_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with Triton's server and clients, shared by all workers."""
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "triton.lock"):
        if not (shared / "triton" / "complete").exists():
            try:
                make_environment(shared / "triton")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"nvidia-pytriton cannot be installed here: {error.stderr.decode()[-300:]}")
            (shared / "triton" / "complete").touch()
    return shared / "triton" / "bin" / "python"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """Train a small ResNet with AdvProp on the embedded digits for one epoch."""
    out = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        arch="resnet10t", epochs=1, out=out, data=DataConfig(workers=0), optim=OptimConfig(ema_decay=0.99)
    )
    return fit(config)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Write 2 × 24 training and 2 × 8 validation images of dark and bright noise."""
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for name, level in (("bright", 160), ("dark", 0)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(level, level + 90, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"
