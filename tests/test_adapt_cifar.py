"""Mixtures of BatchNorm routes, and the page of `benchmarks.adapt_cifar`."""

import json
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.adapt_cifar import COUNTS, SHARES, mixture
from benchmarks.adapt_cifar_report import write_page
from runtime.errors import DataError
from train.dual_bn import add_auxiliary_bns, route, select_route, strip_auxiliary


def routed_network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = add_auxiliary_bns(timm.create_model("test_resnet", num_classes=4), ("adv",))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return model.eval()


def test_a_mixture_lies_between_the_routes() -> None:
    model = routed_network()
    state_dict = model.state_dict()
    main, auxiliary = strip_auxiliary(state_dict), select_route(state_dict, "adv")
    assert not main.keys() ^ mixture(state_dict, 0.5).keys()
    for key, value in mixture(state_dict, 0.25).items():
        torch.testing.assert_close(value, torch.lerp(main[key].double(), auxiliary[key].double(), 0.25).to(value.dtype))

    stock = timm.create_model("test_resnet", num_classes=4).eval()
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for share, name in ((0.0, "main"), (1.0, "adv")):
        stock.load_state_dict(mixture(state_dict, share))
        with torch.no_grad(), route(model, name):
            outputs.append(stock(images))
            torch.testing.assert_close(outputs[-1], model(images))
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def write_cells(out: Path, name: str, counts: tuple[str, ...], gain: float) -> None:
    """Write cells in which a model has 50 % accuracy plus `gain`, and 10 points more if it is adapted."""
    folder = out / "cells" / name
    folder.mkdir(parents=True)
    for cell in ("clean-0", "fog-5", "contrast-5", "gaussian_noise-5", "defocus_blur-5"):
        adapts = cell != "clean-0"
        before = 0.5 + gain
        adapted = {
            "verdict": "ADAPT" if adapts else "NOT_SHIFTED",
            "forced": before + 0.1,
            "accuracy": before + 0.1 * adapts,
            "shift": 1 - gain,
            "entropy_after": 1 + gain,
        }
        (folder / f"{cell}.json").write_text(json.dumps({"before": before} | dict.fromkeys(counts, adapted)))


def test_the_page_compares_recipes_by_seed_and_chooses_mixtures_without_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no results"):
        write_page(tmp_path, tmp_path / "page.md")
    for seed in range(3):
        write_cells(tmp_path, f"vanilla-{seed}", tuple(map(str, COUNTS)), 0.0)
        write_cells(tmp_path, f"advprop-{seed}", tuple(map(str, COUNTS)), 0.02 + 0.01 * seed)
        for share in SHARES:
            write_cells(tmp_path, f"mixture-{seed}-{100 * share:.0f}", ("128",), share / 10)
    write_page(tmp_path, tmp_path / "page.md")
    lines = (tmp_path / "page.md").read_text().splitlines()
    gain = next(line for line in lines if line.startswith("| gain of AdvProp, corruption error"))
    assert gain == "| gain of AdvProp, corruption error | " + " | ".join(["+3.0 [+0.5, +5.5]"] * 4) + " |"
    assert "| vanilla, corruption error | 50.0 ± 0.0 | 40.0 ± 0.0 | 40.0 ± 0.0 | 40.0 ± 0.0 |" in lines
    assert "| vanilla, clean error | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in lines
    assert "| vanilla | 32 | adapt | 12 | 12 | 0 | 0 | +10.0 |" in lines
    assert "| chosen in each cell by the smallest shift | – | – | 30.0 ± 0.0 |" in lines  # the auxiliary route
    assert "| chosen by the lowest entropy | – | – | 40.0 ± 0.0 |" in lines  # the main route
    assert all(len(line) <= 100 for line in lines if not line.startswith("|"))
