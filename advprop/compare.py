"""Measure models for a comparison: a test set, and PGD along the gradient of their checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from advprop import checkpoints
from runtime.errors import ConfigError, DataError
from runtime.evaluate.attacks.config import AttackConfig, default_epsilon
from runtime.evaluate.attacks.methods import load_attacker
from runtime.evaluate.attacks.results import ATTACK_FORMAT, AttackResult
from runtime.evaluate.attacks.run import AttackedModel, attack
from runtime.evaluate.cells import CLEAN, SuiteConfig
from runtime.evaluate.comparison import Comparison, compare
from runtime.evaluate.models import Model, load_model, load_models, same_inputs
from runtime.evaluate.names import find_model
from runtime.evaluate.report.inputs import read_json
from runtime.evaluate.results import FORMAT, Result, check_result, is_whole, result_path, write_result
from runtime.evaluate.run import RunConfig, evaluate
from runtime.system.files import output_dir, sha256_file, write_text

__all__ = ["CompareConfig", "Measurements", "measure_models", "read_measurements"]

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
"""Called with a description of each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Settings of `measure_models`."""

    suite: SuiteConfig
    """Test set."""
    out: Path
    """Folder for results."""
    run: RunConfig
    """Batch size and processes of the evaluation."""
    steps: int = 10
    """PGD steps; 0 runs no attack."""
    epsilon: float | None = None
    """Maximum change of a pixel in PGD, in 1/255 (default: 4; 8 for networks up to 64 px)."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    threads: int = 0
    """CPU threads of ONNX Runtime; 0 uses all cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The results of several models on one test set."""

    results: tuple[Result, ...]
    attacks: tuple[AttackResult, ...] = ()
    files: tuple[Path, ...] = ()
    """The files that hold them."""
    notes: tuple[str, ...] = ()
    """What was not measured, and why."""

    def compare(self, baseline: str = "") -> Comparison:
        """Compare the models with a baseline (default: the first).

        Raises:
            DataError: no model has that name, or the images differ.
        """
        return compare(self.results, self.attacks, baseline or str(self.results[0]["model"]["name"]))


def read_measurements(files: Sequence[Path]) -> Measurements:
    """Read results of `advprop eval` and `advprop attack`.

    Args:
        files: FILE or NAME=FILE, where NAME renames the model.

    Raises:
        DataError: a file is no such result, is incomplete, or two models have the same name.
    """
    results: list[Result] = []
    attacks: list[AttackResult] = []
    for text in files:
        source = find_model(text)
        content, _ = read_json(source.path)
        if content["format"] == ATTACK_FORMAT:
            attacks.append(content)
            continue
        if content["format"] != FORMAT:
            raise DataError(f"{source.path}: expected a result of advprop eval or advprop attack")
        result = check_result(content, source.path)
        if not is_whole(result):
            raise DataError(f"{source.path} is one shard; merge all shards with advprop eval-merge")
        name = source.name or str(result["model"]["name"])
        if any(name == other["model"]["name"] for other in results):
            raise DataError(f"two results are of a model named {name}; rename one: NAME={source.path}")
        results.append({**result, "model": {**result["model"], "name": name}})
    if not results:
        raise DataError("expected results of advprop eval to compare; found none")
    paths = tuple(find_model(text).path for text in files)
    return Measurements(results=tuple(results), attacks=tuple(attacks), files=paths)


def measure_models(
    paths: Sequence[Path], baseline: str | None, config: CompareConfig, progress: Progress
) -> tuple[Measurements, str]:
    """Evaluate and attack models. An interrupted run with the same arguments is resumed.

    Args:
        paths: FILE, NAME=FILE, or folders of training runs.
        baseline: the model to compare with, or the name of one of `paths` (default: the first).
        config: test set, attack and output folder.
        progress: called with a description of each step.

    Returns:
        Measurements and the baseline's name.

    Raises:
        AdvPropError: see `load_models`, `evaluate` and `attack`.
    """
    progress("loading models")
    load = partial(
        load_model, device=config.device, threads=config.threads, checkpoint_loader=checkpoints.load_predictor
    )
    named = {find_model(path).default_name(): path for path in reversed(paths)}
    models, first = load_models(load, paths, named.get(baseline, Path(baseline)) if baseline else paths[0])
    assert first is not None
    if all(model is not first for model in models):
        models = [first, *models]
    _check_classes(models)
    output_dir(config.out)
    results, files = _evaluate(models, first, config, progress)
    attacks: list[AttackResult] = []
    notes: list[str] = []
    if config.steps:
        attacks, notes = _attack(models, paths, config, progress)
        for result in attacks:
            files.append(result_path(result["model"], config.out, "attack.json"))
            write_text(files[-1], json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    found = Measurements(results=tuple(results), attacks=tuple(attacks), files=tuple(files), notes=tuple(notes))
    return found, first.name


def _check_classes(models: Sequence[Model]) -> None:
    first = models[0]
    for model in models:
        if set(model.spec.classes) != set(first.spec.classes):
            raise ConfigError(
                f"{model.name} has {len(model.spec.classes)} classes and {first.name} has {len(first.spec.classes)}, "
                "and they are not the same classes, so their accuracies cannot be compared"
            )


def _evaluate(
    models: Sequence[Model], first: Model, config: CompareConfig, progress: Progress
) -> tuple[list[Result], list[Path]]:
    """Evaluate models; those with the baseline's input size are compared with it image by image."""
    results: dict[str, Result] = {}
    similar = [model for model in models if same_inputs(first.spec, model.spec)]
    for group, reference in ((similar, first), ([model for model in models if model not in similar], None)):
        if not group:
            continue

        def show(done: int, total: int) -> None:
            progress(f"{config.suite.name}: {done} of {total} blocks of {config.run.batch_size} images")

        found = evaluate(group, config.suite, config.run, reference=reference, progress=show)
        results |= {model.name: result for model, result in zip(group, found, strict=True)}
    files = []
    for model in models:
        files.append(result_path(results[model.name]["model"], config.out, f"{config.suite.name}.json"))
        write_result(files[-1], results[model.name])
    return [results[model.name] for model in models], files


def _attack(
    models: Sequence[Model], paths: Sequence[Path], config: CompareConfig, progress: Progress
) -> tuple[list[AttackResult], list[str]]:
    """Run PGD on each model along the gradient of its own checkpoint, on the same images."""
    gradients = _gradients(paths)
    attacked: dict[Path, list[Model]] = {}
    missing = []
    for model in models:
        is_checkpoint = model.facts.get("kind") == "checkpoint"
        path = gradients.get(str(model.facts.get("sha256" if is_checkpoint else "checkpoint_sha256")))
        if path is None:
            missing.append(model.name)
        else:
            attacked.setdefault(path, []).append(model)
    epsilon = config.epsilon or default_epsilon(models[0].spec)
    settings = AttackConfig(attacks=("pgd",), epsilons=(epsilon,), steps=config.steps, seed=config.suite.seed)
    data = dataclasses.replace(config.suite, name=CLEAN, only=(), clean=None)
    results = []
    for path, group in attacked.items():
        names = ", ".join(model.name for model in group)
        progress(f"PGD on {names}")
        attacker = load_attacker(path, checkpoint_loader=checkpoints.load_attacker, device=config.device)
        targets = [AttackedModel(model=model, attacks=settings.attacks) for model in group]

        def show(done: float, total: int, names: str = names) -> None:
            progress(f"PGD on {names}: {done / total:.0%}")

        results += attack(targets, data, settings, out=config.out, attacker=attacker, progress=show)
    notes = []
    if missing:
        notes.append(
            f"no PGD for {', '.join(missing)}: it needs the gradient of the checkpoint, best.pt next to the model file "
            "or among the MODELs"
        )
    return results, notes


def _gradients(paths: Sequence[Path]) -> dict[str, Path]:
    """Return hash → path of the checkpoints that were passed or are next to a passed file."""
    found: dict[str, Path] = {}
    for text in paths:
        model = find_model(text)
        nearby = (model.path.parent / name for name in ("best.pt", "last.pt"))
        for path in [model.path] if model.is_checkpoint else [path for path in nearby if path.is_file()]:
            found.setdefault(sha256_file(path), path)
    return found
