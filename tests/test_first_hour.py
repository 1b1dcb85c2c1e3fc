"""The first hour of a new user: the commands of docs/fine_tuning.md, on one folder of photographs."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.support import ROOT

COLORS = {
    "amber": (230, 150, 20),
    "blue": (30, 60, 220),
    "cyan": (20, 200, 200),
    "green": (30, 180, 40),
    "red": (220, 30, 30),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with 5 classes of 40 images in `photos`, and a file of weights."""
    random = np.random.default_rng(0)
    for name, color in COLORS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(40):
            noise = random.normal(0, 40, (40, 48, 3))
            image = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{number}.jpg")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet50.safetensors.pt")
    return tmp_path


def tutorial() -> list[list[str]]:
    """Return the commands of the section "From weights to a report"."""
    text = (ROOT / "docs" / "fine_tuning.md").read_text()
    section = text.partition("## From weights to a report")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = block.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.strip() and not line.startswith("#")]
    assert commands[0][:2] == ["pip", "install"]  # textures, which the environment of the tests may lack
    return commands[1:]


def command(words: list[str]) -> list[str]:
    """Return a command of the tutorial for a network that trains in seconds."""
    words = ["resnet10t" if word == "resnet50" else word for word in words]
    words = ["resnet50.safetensors.pt" if word == "resnet50.safetensors" else word for word in words]
    if words[:3] == ["python", "-m", "train.run"] and "--weights" in words:
        words += ["--img-size", "32", "--workers", "0"]
    if words[:2] == ["advprop", "compare"]:
        words += ["--workers", "0"]
        words += [] if find_spec("imagecorruptions") else ["--suite", "clean"]
    program = {"python": [sys.executable], "advprop": [sys.executable, "-m", "advprop"]}
    program["advprop-export"] = [sys.executable, "-m", "advprop", "export"]
    return [*program[words[0]], *words[1:]]


def run(words: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(words), cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


def stop_in_the_middle(words: list[str], folder: Path, run_folder: Path) -> None:
    """Start a training, and stop it with Ctrl-C after its first checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    training = subprocess.Popen(command(words), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    while not (run_folder / "last.pt").exists():
        assert training.poll() is None, training.communicate()
        time.sleep(0.05)
    training.send_signal(signal.SIGINT)
    _, errors = training.communicate(timeout=60)
    assert training.returncode in (130, 0), errors


@pytest.mark.slow
def test_the_tutorial_from_weights_to_a_report(folder: Path) -> None:
    first, resume, vanilla, *others = tutorial()
    stop_in_the_middle(first, folder, folder / "runs" / "robust")
    output = run(resume, folder)
    assert "epochs" in output, output
    run(vanilla, folder)
    (folder / "resnet50.safetensors.pt").unlink()
    outputs = [run(words, folder) for words in others]
    assert any("robust.int8" in output for output in outputs), outputs
    epochs = [line.split(",")[0] for line in (folder / "runs/robust/metrics.csv").read_text().splitlines()]
    assert epochs == ["epoch", "1", "2", "3", "4"]
    assert set((folder / "runs/robust").glob("*.onnx")) >= {
        folder / f"runs/robust/model.{p}.onnx" for p in ("fp16", "int8")
    }
    page = (folder / "report.html").read_text()
    for name in ("vanilla", "robust", "robust.fp16", "robust.int8"):
        assert f"<bdi>{name}</bdi>" in page, name
    assert str(folder) not in page
