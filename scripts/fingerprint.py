"""Print hashes of the files that the tools write for two small networks, to compare two commits.

    python scripts/fingerprint.py OUT > before.json     on one commit
    python scripts/fingerprint.py OUT > after.json      on the other commit

A refactoring must not change a single hash. The networks are ResNet-18 (30 AdvProp steps) and
EfficientNet-B0 (6 steps) on generated images. The script hashes their weights, the FP32, FP16 and
INT8 ONNX files, and the counts of an evaluation on 40 images under fourteen corruptions. It takes
about two minutes on two cores. OUT is a new folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image

NETWORKS = {"resnet18": 480, "efficientnet_b0": 96}
"""Architecture → number of training images, for two epochs with a batch size of 32."""

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""All corruptions except frost, whose textures are an optional package."""


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write `count` noisy images of four classes that differ in color."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        label = number % 4
        color = np.array([40 + 50 * label, 200 - 40 * label, 60 * (label % 2)])
        pixels = np.clip(color + generator.normal(0, 60, (64, 64, 3)), 0, 255).astype(np.uint8)
        path = folder / f"class{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def run(module: str, *arguments: str | Path) -> None:
    """Run `python -m module`, with its output on stderr."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=sys.stderr)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weights_hash(checkpoint: Path) -> str:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def onnx_hash(path: Path) -> str:
    """Return the hash of an ONNX file without its checkpoint's hash, which is not reproducible."""
    model = onnx.load(path)
    for entry in model.metadata_props:
        if entry.key == "advprop.spec":
            entry.value = json.dumps(json.loads(entry.value) | {"checkpoint_sha256": ""}, sort_keys=True)
    return sha256(model.SerializeToString(deterministic=True))


def fingerprint(arch: str, images: int, out: Path) -> dict[str, str]:
    """Train, export and evaluate one network; return the hash of each output by name."""
    write_images(out / "data" / "train", images, seed=1)
    write_images(out / "data" / "val", 64, seed=2)
    trained = out / "run"
    settings = ["--epochs", "2", "--batch-size", "32", "--img-size", "64", "--workers", "0", "--device", "cpu"]
    run("train.run", "--arch", arch, "--data", out / "data", "--out", trained, *settings)
    hashes = {"weights": weights_hash(trained / "last.pt")}
    for precision in ("fp16", "int8"):
        extra: list[str | Path] = ["--calib-data", out / "data" / "train"] if precision == "int8" else []
        run("export.cli", trained / "last.pt", "--precision", precision, "--out", out / "models", *extra)
    for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"):
        hashes[name] = onnx_hash(out / "models" / name)
    cli = "advprop.cli" if importlib.util.find_spec("advprop.cli") else "runtime" + ".cli"  # until 0.1
    suite: list[str | Path] = [
        "--suite",
        "corruptions",
        "--data",
        out / "data" / "val",
        "--limit",
        "40",
        "--out",
        out / "evaluation",
    ]
    only = [argument for name in CORRUPTIONS for argument in ("--only", name)]
    run(cli, "eval", out / "models" / "model.onnx", out / "models" / "model.int8.onnx", *suite, *only)
    for path in sorted((out / "evaluation").glob("*.json")):
        cells = json.loads(path.read_text())["cells"]
        hashes[f"evaluation {path.name.partition('.corruptions')[0]}"] = sha256(
            json.dumps(cells, sort_keys=True).encode()
        )
    return hashes


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    print(json.dumps({arch: fingerprint(arch, images, out / arch) for arch, images in NETWORKS.items()}, indent=1))


if __name__ == "__main__":
    main()
