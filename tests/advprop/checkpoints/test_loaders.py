"""The loaders that the package exports; what the tools do with them is tested with the commands."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from advprop.checkpoints import describe_checkpoint, load_attacker, load_predictor, open_torch_peer
from runtime.errors import CheckpointError, ConfigError
from runtime.system.files import sha256_file
from tests.support import ROOT
from train.checkpoint import load_checkpoint
from train.dual_bn import strip_auxiliary
from train.loop import FitResult
from train.models import restore_model

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from pathlib import Path
import advprop.checkpoints as checkpoints
from runtime.errors import BackendUnavailable

path = Path("best.pt")
for load in (
    checkpoints.load_predictor,
    checkpoints.load_attacker,
    checkpoints.describe_checkpoint,
    lambda path: checkpoints.open_torch_peer(None, checkpoint=path, half=False, device="cpu", threads=0),
):
    try:
        load(path)
    except BackendUnavailable as error:
        print(error)
"""


def test_the_package_works_without_torch() -> None:
    """Its functions report what is missing and what to do instead."""
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True, check=True)
    messages = run.stdout.splitlines()
    assert len(messages) == 4, run.stdout
    assert all("needs torch and timm" in message and "pip install torch timm, or" in message for message in messages)


def test_the_predictor_uses_the_requested_route_and_weights(trained: FitResult) -> None:
    loaded = load_predictor(trained.last, route="adv", ema=False, device="cpu")
    assert (loaded.spec.route, loaded.spec.checkpoint_sha256) == ("adv", sha256_file(trained.last))
    assert (loaded.facts["route"], loaded.facts["weights"], loaded.facts["device"]) == ("adv", "last", "cpu")
    assert loaded.accepts_any_size
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    network = restore_model(load_checkpoint(trained.last), trained.last, bn="adv", ema=False).eval()
    with torch.inference_mode():
        assert np.array_equal(loaded.predict(images), network(torch.from_numpy(images)).numpy())
    with pytest.raises(ConfigError, match="no BatchNorm route 'other'; available: main, adv"):
        load_predictor(trained.last, route="other", device="cpu")


def test_the_attacker_changes_pixels_up_to_the_radius(trained: FitResult) -> None:
    spec, craft, facts = load_attacker(trained.last, device="cpu")
    assert facts["weights"] == "moving average"
    sample = load_checkpoint(trained.last)["sample"]
    images, labels = sample["images"][:3].numpy(), sample["labels"][:3].numpy()
    attacked = craft("pgd", images, labels, radius=2, seeds=[1, 2, 3], steps=2, restarts=1)
    assert attacked.shape == (1, *images.shape)
    assert np.abs(attacked[0].astype(int) - images).max() == 2
    assert spec.arch == "resnet10t"


def test_a_torch_peer_has_the_weights_of_the_checkpoint_or_none(trained: FitResult) -> None:
    spec, ((suffix, model), *_) = open_torch_peer(None, checkpoint=trained.last, half=False, device="cpu", threads=0)
    assert (suffix, model.image_size, model.facts["kind"]) == ("", (32, 32), "checkpoint")
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    expected = load_predictor(trained.last, device="cpu").predict(images)
    np.testing.assert_allclose(model.run(images), expected, rtol=1e-4, atol=1e-5)
    assert model.probe(images)() > 0
    _, ((_, untrained), *_) = open_torch_peer(spec, checkpoint=None, half=False, device="cpu", threads=0)
    assert untrained.facts["kind"] == "peer"
    assert not np.allclose(untrained.run(images), expected, atol=0.1)
    with pytest.raises(ConfigError, match="needs a spec or a checkpoint"):
        open_torch_peer(None, checkpoint=None, half=False, device="cpu", threads=0)


def test_a_description_lists_weights_routes_and_training(trained: FitResult) -> None:
    facts = describe_checkpoint(trained.last)
    weights = load_checkpoint(trained.last)["state_dict"]
    main, total = (sum(t.numel() for t in part.values()) for part in (strip_auxiliary(weights), weights))
    assert facts["weights"] == f"{main:,} for inference, {total - main:,} auxiliary"
    assert main < total
    assert facts["BatchNorm routes"] == "main, adv"
    assert facts["moving average"] == "yes"
    assert facts["trained for"] == "1 epochs, 44 steps"
    assert facts["best epoch"].startswith(f"1: clean {trained.metrics[0].top1:.1%}, under attack ")
    assert facts["spec"].arch == "resnet10t"


def test_other_files_are_not_described(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt is not an advprop checkpoint: it is a plain state_dict"):
        describe_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        describe_checkpoint(tmp_path / "none.pt")
