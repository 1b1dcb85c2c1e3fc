"""Damaged results, logs, manifests, settings and checkpoints, and what reads them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from calib.images import calibration_set
from runtime.errors import AdvPropError
from runtime.evaluate.counts import Counts
from runtime.evaluate.progress_log import ProgressLog
from runtime.evaluate.report import write_report
from runtime.evaluate.results import merge, read_result
from tests.support.fuzz_datasets import images
from tests.support.fuzz_models import SPEC, make_spec
from tests.support.mutations import damaged, hostile_json, tampered


@functools.cache
def results() -> tuple[Any, ...]:
    """Return a result of an evaluation, a latency and an attack."""
    counts = Counts(
        images=30, top1=20, top5=30, not_finite=0, bin_images=(2,) * 15, bin_right=(1,) * 15,
        bin_confidence_nano=(10**9,) * 15, group_images=(2,) * 10 + (1,) * 10, group_right=(1,) * 20,
    ).to_dict()  # fmt: skip
    cell = {"images": 30, "names_sha256": "ab", "resize": "fit", "parts": ["1/1"], "counts": counts}
    settings = {"seed": 0, "limit": None, "table": None, "classes_asked": 4, "imagenet_classes": False, "batch_size": 8}
    result: dict[str, Any] = {
        "format": "advprop.evaluation/1", "suite": "imagenet-c", "reference": None,
        "model": {"name": "m", "classes": 4, "sha256": "ab"}, "data": {"path": "d", "clean": None, "skipped": []},
        "settings": settings | {"preprocessing": {"height": 8, "width": 8}}, "versions": {"advprop": "0"},
        "cells": {"clean": cell, "fog/1": cell}, "metrics": None,
    }  # fmt: skip
    latency = {
        "format": "advprop.bench/1", "model": {"name": "m", "sha256": "ab"}, "device": "L4", "backend": "b",
        "batch_size": 1, "p50_ms": 1.5, "p99_ms": 2.5,
    }  # fmt: skip
    points = [{"epsilon": 0.0, "right": 20}, {"epsilon": 0.01, "right": 10}]
    attack = {
        "format": "advprop.attack/1", "model": {"name": "m", "sha256": "ab"}, "images": 30, "names_sha256": "ab",
        "seed": 0, "curves": [{"attack": name, "queries": 9, "points": points} for name in ("square", "noise")],
    }  # fmt: skip
    return result, latency, attack


def make_results(random: Random) -> tuple[bytes, ...]:
    place = random.randrange(3)
    whole = [json.dumps(content).encode() for content in results()]
    whole[place] = hostile_json(random, results()[place])
    return tuple(whole)


def read_results(contents: tuple[bytes, ...], folder: Path) -> None:
    paths = [folder / f"{place}.json" for place in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    failed = None
    try:
        merge([read_result(paths[0])])
    except AdvPropError as error:
        failed = error
    write_report(paths, [folder / "report.md", folder / "report.html", folder / "report.csv"])
    if failed:
        raise failed


def make_progress_log(random: Random) -> bytes:
    entry = {"cell": "clean", "block": 1, "counts": [results()[0]["cells"]["clean"]["counts"]]}
    lines = [hostile_json(random, entry) if random.random() < 0.5 else json.dumps(entry).encode() for _ in range(3)]
    return damaged(random, b"\n".join(lines)) if random.random() < 0.3 else b"\n".join(lines) + b"\n"


def read_progress_log(content: bytes, folder: Path) -> None:
    totals: list[Counts] = []

    def restore(entry: Any) -> None:
        counts = [Counts.from_dict(item) for item in entry["counts"]]
        totals.extend(counts)
        (str(entry["cell"]), int(entry["block"]))

    with ProgressLog(folder, {}, restore) as log:
        path = log.path
    path.write_bytes(content)
    with ProgressLog(folder, {}, restore) as log:
        log.remove()


def make_manifest(random: Random) -> bytes:
    return hostile_json(random, MANIFEST)


def read_manifest(content: bytes, folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / "1.png").write_bytes(images()[0])
    (folder / "calib.json").write_bytes(content.replace(b"SOURCE", str(folder / "images").encode()))
    calibration_set(folder / "calib.json")


MANIFEST = {
    "format": "advprop.calib/1", "source": "SOURCE", "sha256": "", "mix": ["clean"], "seed": 0,
    "images": [["1.png", hashlib.sha256(images()[0]).hexdigest()]], "held": [],
}  # fmt: skip


def make_config(random: Random) -> bytes:
    from train.config import TrainConfig
    from train.config_file import to_mapping

    content = to_mapping(TrainConfig(arch="resnet10t"))
    if random.random() < 0.4:
        return damaged(random, tomli_w.dumps(content).encode())
    try:
        return tomli_w.dumps(tampered(random, content)).encode(errors="surrogatepass")
    except (TypeError, AttributeError):  # TOML has no null, and its top level is a table
        return b"arch = [[" * random.randrange(3000)


def read_config(content: bytes, folder: Path) -> None:
    from train.config_file import from_mapping, parse_setting, read_toml, to_toml

    (folder / "config.toml").write_bytes(content)
    parse_setting("data.img_size=" + content[:200].decode(errors="replace"))
    to_toml(from_mapping(read_toml(folder / "config.toml")))


@functools.cache
def checkpoint() -> dict[str, Any]:
    import timm
    import torch

    return {
        "format": "advprop.checkpoint/1", "arch": "test_efficientnet", "model_kwargs": {"num_classes": 4},
        "recipe": "vanilla", "spec": SPEC.to_json(), "ema_state_dict": None, "epoch": 1, "step": 2, "metrics": [],
        "state_dict": timm.create_model("test_efficientnet", num_classes=4).state_dict(), "config": "",
        "sample": {"images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "labels": torch.zeros(2)},
    }  # fmt: skip


def make_checkpoint(random: Random) -> bytes:
    import torch

    content = checkpoint()
    few = {name: value for name, value in content.items() if name != "state_dict"}
    kind = random.randrange(4)
    if kind == 0:  # the values, next to valid weights
        weights = content["state_dict"]
        content = {name: tampered(random, value) if random.random() < 0.3 else value for name, value in few.items()}
        content["state_dict"] = weights
    elif kind == 1:
        weights = dict(content["state_dict"])
        for name in random.sample(list(weights), 3):
            weights[name] = random.choice([None, torch.zeros(3), torch.zeros(()), "text", weights["classifier.bias"]])
        content = {**content, "state_dict": weights}
    elif kind == 2:
        content = {**few, "spec": make_spec(random), "state_dict": {}}
    file = io.BytesIO()
    torch.save(content, file)
    return damaged(random, file.getvalue()) if kind == 3 else file.getvalue()


def read_checkpoint(content: bytes, folder: Path) -> None:
    from advprop.checkpoints import describe_checkpoint
    from export.source import load_source

    (folder / "a.pt").write_bytes(content)
    failed = None
    try:
        describe_checkpoint(folder / "a.pt")
    except AdvPropError as error:
        failed = error
    load_source(folder / "a.pt")
    if failed:
        raise failed
