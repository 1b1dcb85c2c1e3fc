"""`advprop attack`: measure accuracy under adversarial attack."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.system.command import (
    CommaList,
    Command,
    Option,
    as_config,
    batch_size_option,
    data_option,
    device_option,
    json_option,
    kernels_option,
    limit_option,
    out_option,
    seed_option,
    threads_option,
    with_options,
)
from runtime.system.console import print_json, print_lines, progress_bars, set_up_logging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from runtime.evaluate import AttackConfig, AttackedModel, Attacker, SuiteConfig
    from runtime.evaluate.attacks.results import AttackResult

log = logging.getLogger(__name__)

EXAMPLES = """
Examples:
  advprop attack best.pt --data photos/val --limit 200
  advprop attack model.onnx model.int8.onnx --checkpoint best.pt --data photos/val --limit 200
  advprop attack model.int8.onnx --data photos/val --attacks square,noise --eps 1,2,4 --queries 500 --limit 100
  advprop report evaluation/*.json -o report.html      with the results of advprop eval: accuracy against ε

Attacks:
  pgd, apgd  use the gradient of --checkpoint; every MODEL is then evaluated on the same images (transfer)
  square     uses each MODEL's own logits
  noise      is the control: random noise with the same ε

To resume an interrupted run, repeat its command.
"""


def _count_option(name: str, default: int, help_text: str) -> Option:
    at_least_one = click.IntRange(min=1)
    return Option([name], default=default, show_default=True, type=at_least_one, group="Attacks", help=help_text)


_ATTACKS = (
    Option(
        ["--attacks"],
        type=CommaList(str),
        metavar="NAMES",
        group="Attacks",
        help="Attacks to run: pgd, apgd, square, noise (default: all; pgd and apgd need a checkpoint).",
    ),
    Option(
        ["--eps", "epsilons"],
        type=CommaList(float, "numbers such as 1,2,4"),
        metavar="E,...",
        group="Attacks",
        help="Maximum change of a pixel, in 1/255 (default: 4; 8 for networks up to 64 px).",
    ),
    _count_option("--queries", 1000, "Square attack: queries per image."),
    Option(
        ["--initial-share"],
        default=0.8,
        show_default=True,
        group="Attacks",
        help="Square attack: share of the image that the first square covers, 0 to 1.",
    ),
    _count_option("--draws", 10, "Noise draws per image; the worst is reported."),
    _count_option("--steps", 20, "PGD and APGD: number of steps."),
    _count_option("--restarts", 1, "PGD and APGD: number of random restarts."),
)


@click.command("attack", cls=Command, epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@with_options(
    data_option(required=True),
    Option(
        ["--checkpoint"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Checkpoint whose gradients PGD and APGD use (default: the first MODEL that is a checkpoint).",
    ),
    limit_option(),
    seed_option("sampling and attacks"),
    out_option("Folder for results.", default=Path("evaluation")),
    json_option("the results as JSON instead of a table"),
)
@as_config("attacks", _ATTACKS, dict)
@with_options(
    batch_size_option(16, group="Execution"),
    threads_option(group="Execution"),
    device_option(group="Execution"),
    kernels_option("attack", group="Execution"),
)
def main(
    models: tuple[Path, ...],
    data: Path,
    checkpoint: Path | None,
    limit: int | None,
    seed: int,
    out: Path,
    as_json: bool,
    attacks: dict[str, Any],
    **execution: Any,
) -> None:
    """Attack MODELs (ONNX files, engines, checkpoints): change each pixel by at most ε.

    Prints a table and writes OUT/MODEL.attack.json, which advprop report plots as accuracy against
    ε.
    """
    console = set_up_logging()
    from advprop import checkpoints
    from runtime.backends.open import CHECKPOINT_SUFFIXES
    from runtime.evaluate import SuiteConfig, load_attacker, load_model, load_models
    from runtime.system.files import output_dir

    given = checkpoint is not None
    if checkpoint is None:
        checkpoint = next((model for model in models if model.suffix in CHECKPOINT_SUFFIXES), None)
    asked = _attack_config(attacks, seed, checkpoint)  # reports bad options before models are loaded
    output_dir(out)
    attacker = None
    if checkpoint is not None and asked.gradient:
        attacker = load_attacker(checkpoint, checkpoint_loader=checkpoints.load_attacker, device=execution["device"])
    elif given:
        log.warning("--checkpoint has no effect: neither pgd nor apgd was requested")
    load = partial(
        load_model,
        device=execution["device"],
        threads=execution["threads"],
        exact=execution["gpu_kernels"],
        checkpoint_loader=checkpoints.load_predictor,
    )
    loaded, white_box = load_models(load, models, checkpoint if attacker else None)
    if attacks["epsilons"] is None:
        from runtime.evaluate.attacks.config import default_epsilon

        asked = dataclasses.replace(asked, epsilons=(default_epsilon(loaded[0].spec),))
    suite = SuiteConfig(name="imagenet", data=data, limit=limit, seed=seed)
    targets = _targets(loaded, white_box, asked)
    results = _attack(targets, suite, asked, out, attacker, execution["batch_size"])
    _print_results(console, results, out, as_json)


def _attack_config(attacks: dict[str, Any], seed: int, checkpoint: Path | None) -> AttackConfig:
    """Return the attack settings."""
    from runtime.evaluate.attacks.config import AttackConfig, default_attacks

    values = dict(attacks)
    if values["attacks"] is None:
        values["attacks"] = default_attacks(checkpoint is not None)
    if values["epsilons"] is None:
        values["epsilons"] = (1.0,)
    config = AttackConfig(seed=seed, **values)
    config.check_gradient(checkpoint is not None)
    return config


def _targets(models: Sequence[Any], white_box: Any, config: AttackConfig) -> list[AttackedModel]:
    from runtime.evaluate import AttackedModel
    from runtime.evaluate.attacks.config import SQUARE

    targets = [AttackedModel(model=model, attacks=config.attacks) for model in models]
    if white_box is not None and all(white_box is not model for model in models):
        # Square attack is the most expensive one. It attacks the checkpoint only if that is a MODEL
        # too.
        cheap = tuple(name for name in config.attacks if name != SQUARE)
        targets.append(AttackedModel(model=white_box, attacks=cheap))
    return targets


def _attack(
    targets: Sequence[AttackedModel],
    data: SuiteConfig,
    config: AttackConfig,
    out: Path,
    attacker: Attacker | None,
    batch_size: int,
) -> list[AttackResult]:
    from runtime.evaluate import attack

    with progress_bars(counts=False) as bars:
        task = bars.add_task(", ".join(config.attacks), total=None)

        def show(done: float, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return attack(targets, data, config, out=out, attacker=attacker, batch_size=batch_size, progress=show)


def _print_results(console: Console, results: list[AttackResult], out: Path, as_json: bool) -> None:
    from runtime.evaluate import attack_notes, attack_table, result_path
    from runtime.system.files import write_text

    written = []
    for result in results:
        path = result_path(result["model"], out, "attack.json")
        write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        written.append(str(path))
    if as_json:
        print_json(results)
        return
    console.print(attack_table(results))
    print_lines(console, (*attack_notes(results), f"wrote {', '.join(written)}"))


if __name__ == "__main__":
    main()
