"""The fidelity study at toy size: trials, runs, measurements, exports and the report."""

import multiprocessing
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.fidelity import network  # noqa: F401  # registers the architectures
from benchmarks.fidelity.__main__ import parser, study_config
from benchmarks.fidelity.data import prepare
from benchmarks.fidelity.plan import MAIN_RECIPES, OTHER_RECIPES, TUNED, Cell, Plan, Settings, cost, trials
from benchmarks.fidelity.report import write_report
from benchmarks.fidelity.results import Difference, Results, Run, Verdict, paired, subtract
from benchmarks.fidelity.study import TRAINED, Study, StudyConfig, read
from benchmarks.fidelity.verdict import STATEMENTS, advice
from runtime.errors import ConfigError, DataError
from train.recipes import RECIPES

CLASSES = ("circle", "cross", "line", "square")


@pytest.fixture(scope="module")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 4 classes of 12 training and 5 test images."""
    root = tmp_path_factory.mktemp("toy")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 5)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (32, 32, 3))
                pixels[:, 8 * label : 8 * label + 8] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:04}.png")
    return root


def toy_study(data: Path, out: Path, hours: float = float("inf")) -> Study:
    plan = Plan(
        images=20, epochs=1, tuning_epochs=1, arch="test_resnet", amp="none", seeds=1, sizes=((12, 1),), levels=2
    )
    return Study(
        StudyConfig(
            data=data,
            out=out,
            plan=plan,
            hours=hours,
            held_out=8,
            attacked=4,
            corrupted=4,
            per_file=4,
            corruptions=("contrast", "pixelate"),
        )
    )


def run_toy_study(data: Path, out: Path) -> bool:
    return toy_study(data, out).run()


@pytest.mark.slow
def test_a_whole_study_and_its_report(toy_data: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "study", tmp_path / "page.md"
    assert not toy_study(toy_data, out, hours=0).run()
    write_report(out, page)
    text = page.read_text()
    assert "**Unfinished.** Of 4 trials each, 0 of vanilla and 0 of AdvProp are finished." in " ".join(text.split())
    assert [f"**{Verdict.NOT_RUN}**" in line for line in text.splitlines() if line.startswith("| 4")] == [True, True]
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith(("|", "!")))

    study = toy_study(toy_data, out)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as processes:
        assert list(processes.map(run_toy_study, [toy_data] * 2, [out] * 2)) == [True, True]
    trained = [line.split()[2] for line in (out / "progress.log").read_text().splitlines() if "top-1" in line]
    assert len(trained) == len(set(trained)) == 5 + 4 + 2  # no run was made by both processes
    results = write_report(out, page)
    text = page.read_text()
    assert results.recipes() == [*MAIN_RECIPES, *OTHER_RECIPES]
    assert "Unfinished" not in text
    assert "Not run yet" not in text
    assert Verdict.NOT_RUN not in text
    assert page.with_suffix(".svg").read_text().startswith("<?xml")
    for recipe in (*MAIN_RECIPES, *OTHER_RECIPES):
        assert f"| {recipe} | 1 |" in text
    for route in ("| advprop | adv |", "| shared-statistics | adv |", "| fine-grained | aug |", "| INT8 |"):
        assert route in text

    chosen = study.chosen()
    before = {path: path.stat().st_mtime_ns for path in out.glob(f"*/{TRAINED}")}
    assert len(before) == 8 + 5 + 4 + 2
    assert toy_study(toy_data, out).run()  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before

    again = toy_study(toy_data, tmp_path / "again")
    cell, other = (study.plan.cell("advprop", seed, chosen) for seed in (0, 1))
    for each in (cell, other):
        again.train(each)
    first, second, different = (
        read(one.folder(each) / TRAINED)["weights_sha256"]
        for one, each in ((study, cell), (again, cell), (again, other))
    )
    assert first == second
    assert first != different


def test_a_report_without_a_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no study: expected the file study\.json$"):
        write_report(tmp_path, tmp_path / "page.md")


def test_subsets_are_stratified_nested_and_without_held_out_images(toy_data: Path, tmp_path: Path) -> None:
    def names(root: Path, part: str) -> dict[str, set[str]]:
        return {name: {path.name for path in (root / part / name).iterdir()} for name in CLASSES}

    small, large = (prepare(toy_data, tmp_path, images, held_out=8) for images in (12, 40))
    held = names(small, "held")
    for name in CLASSES:
        assert len(names(small, "train")[name]) == 3
        assert names(small, "train")[name] < names(large, "train")[name]
        assert len(held[name]) == 2
        assert not held[name] & names(large, "train")[name]
    whole = prepare(toy_data, tmp_path, 48, held_out=8)
    assert all(len(files) == 12 for files in names(whole, "train").values())
    with pytest.raises(DataError, match=r"has 12 images of the class circle; expected 13$"):
        prepare(toy_data, tmp_path, 52, held_out=8)


def test_several_processes_may_prepare_the_same_subset(toy_data: Path, tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def call(_: int) -> Path:
        start.wait()
        return prepare(toy_data, tmp_path, 40, held_out=8)

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            (folder,) = set(pool.map(call, range(8)))
        assert len(list((folder / "train").glob("*/*"))) == 40
        shutil.rmtree(folder)


def test_every_pair_of_levels_occurs_once_in_the_trials_of_advprop() -> None:
    plan = Plan(images=5_000, epochs=40, tuning_epochs=12, arch="cifar_resnet20", amp="none")
    for recipe in TUNED:
        settings = [cell.settings for cell in trials(plan, recipe)]
        assert len({(each.lr, each.weight_decay) for each in settings}) == 9
    assert len({(each.lr, each.epsilon) for each in settings}) == 9
    assert len({(each.weight_decay, each.epsilon) for each in settings}) == 9


def test_equal_computing_time_and_the_attack_of_each_recipe(tmp_path: Path) -> None:
    settings = Settings(lr=1e-3, weight_decay=0.1, epsilon=2.0)
    assert cost("advprop", 1.0) == pytest.approx(8 / 3)
    assert cost("advprop", 2.0) == pytest.approx(4)

    def cell(recipe: str) -> Cell:
        return Cell(recipe=recipe, seed=0, images=5_000, arch="cifar_resnet20", epochs=40, settings=settings)

    configs = {
        recipe: cell(recipe).config(tmp_path, tmp_path, device="cpu") for recipe in (*MAIN_RECIPES, *OTHER_RECIPES)
    }
    assert configs["vanilla-long"].recipe == "vanilla"
    assert {recipe: config.resolved_epochs for recipe, config in configs.items() if config.resolved_epochs != 40} == {
        "vanilla-long": 160,
        "finetune": 20,
    }
    assert {config.data.workers for config in configs.values()} == {0}
    assert cell("fast").config(tmp_path, tmp_path, device="cuda").data.workers is None  # the trainer's default
    assert cell("fast").config(tmp_path, tmp_path, device="cuda", workers=2).data.workers == 2
    assert configs["fast"].resolved_attack(RECIPES["fast"]).epsilon == 1
    assert configs["advprop"].resolved_attack(RECIPES["advprop"]).epsilon == 2


@pytest.mark.parametrize(
    ("arch", "millions"), [("cifar_resnet20", 0.27), ("cifar_resnet20_x2", 1.08), ("cifar_resnet18", 11.17)]
)
def test_networks_keep_the_resolution_of_their_first_layer(arch: str, millions: float) -> None:
    model: Any = timm.create_model(arch, num_classes=10).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    shapes: list[tuple[int, ...]] = []
    first = model.layer1 if arch == "cifar_resnet18" else model.layers
    first.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape[2:]))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert shapes == [(32, 32)]


def test_the_command_for_a_gpu_trains_the_main_comparison_on_all_images() -> None:
    words = "--data cifar10 --device cuda --arch cifar_resnet18 --images 50000 --epochs 100 --amp bf16 --main-only"
    config = study_config(parser().parse_args(words.split()))
    assert (config.device, config.plan.images, config.plan.sizes, config.plan.wide) == ("cuda", 50_000, (), "")
    assert {cell.images for cell in trials(config.plan, "advprop")} == {45_000}  # without the held-out images
    words = "--data cifar10 --images 50000 --tuning-images 10000 --device cuda --workers 2"
    config = study_config(parser().parse_args(words.split()))
    assert {cell.images for cell in trials(config.plan, "vanilla")} == {10_000}
    assert config.workers == 2
    on_cpu = study_config(parser().parse_args(["--data", "cifar10", "--images", "5000"]))
    assert on_cpu.plan.sizes == ((2_500, 80), (10_000, 40), (45_000, 40))
    assert on_cpu.plan.wide == "cifar_resnet20_x2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images 5000", "found no images to train on; add --data DIR"),
        ("--data cifar10", "found no size; add --images"),
    ],
)
def test_a_missing_option_is_reported(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_config(parser().parse_args(words.split()))


def test_paired_differences_and_their_verdict() -> None:
    found = paired({0: 3.0, 1: 5.0, 2: 7.0, 4: 99.0}, {0: 2.0, 1: 3.0, 2: 4.0, 3: 0.0})
    assert found is not None
    assert (found.mean, found.seeds) == (2, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5)  # Student's t with two degrees of freedom
    assert str(found) == "+2.0 [−0.5, +4.5]"
    assert found.verdict(1) is Verdict.UNDECIDED
    assert Difference(2.0, 1.0, 3).verdict(1) is Verdict.REPRODUCED
    assert Difference(2.0, 1.0, 3).verdict(-1) is Verdict.NOT_REPRODUCED
    assert Difference(2.0, None, 1).verdict(1) is Verdict.UNDECIDED
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert subtract({0: 3.0, 1: 5.0}, {1: 2.0, 2: 1.0}) == {1: 3.0}
    assert [statement.sign for statement in STATEMENTS] == [-1, 1, -1, 1, -1]


def test_advice_names_recipes_that_are_better_than_advprop() -> None:
    settings = Settings(lr=1e-3, weight_decay=0.1)

    def run(recipe: str, seed: int, top1: float, error: float) -> Run:
        measured = {"top1": top1, "corruption_error": error, "pgd": {"4": 0.1}}
        cell = Cell(recipe=recipe, seed=seed, images=100, arch="resnet", epochs=1, settings=settings)
        return Run(cell=cell, trained={"diverged": False}, routes={"main": measured}, files=None)

    rows = {
        "vanilla": [(0.60, 0.45), (0.62, 0.43)],
        "advprop": [(0.64, 0.40), (0.65, 0.40)],
        "finetune": [(0.66, 0.39), (0.68, 0.37)],
        "shared-bn": [(0.66, 0.41), (0.68, 0.42)],  # better on clean images only
        "vanilla-long": [(0.70, 0.35)],
    }
    runs = [run(recipe, seed, *values) for recipe, found in rows.items() for seed, values in enumerate(found)]
    plan = Plan(images=100, epochs=1, tuning_epochs=1, arch="resnet", amp="none")
    results = Results(description={}, plan=plan, tried={}, chosen=None, runs=runs, cpu_s=0.0)
    changes = "corruption error by +5.0 points (1 seed) and the clean accuracy by −6.0 points (1 seed). So longer"
    assert changes in advice(results)[1]
    sentences = [paragraph for paragraph in advice(results) if paragraph.startswith("The means of")]
    assert [sentence.split(",")[0] for sentence in sentences] == [
        "The means of `finetune` are better than those of AdvProp: clean accuracy by +2.5 points [−3.9"
    ]
