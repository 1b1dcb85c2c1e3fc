"""`advprop attack`: how accurate model files are on images that were changed to fool them."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.engine.command_line import cpu_kernels_option, device_option
from runtime.system.console import cli_errors, counting_bars, set_up_logging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from runtime.evaluate import AttackConfig, AttackedModel, Attacker, SuiteConfig
    from runtime.evaluate.attacks.results import AttackResult

log = logging.getLogger(__name__)

EXAMPLES = """\b
Examples:
  advprop attack model.onnx model.int8.onnx --checkpoint best.pt --data photos/val --limit 200
  advprop attack model.int8.onnx --data photos/val --attacks square,noise --eps 1,2,4 --queries 500 --limit 100
  advprop report evaluation/*.json -o report.html      with the results of advprop eval: accuracy against ε

\b
pgd, apgd  by the gradient of --checkpoint, then shown to every MODEL (transfer)
square     by each MODEL's own logits
noise      the control: random noise of the same size
A run that was stopped goes on when the same command is given again.
"""


class _Several(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Values with commas between them."""

    def __init__(self, name: str, of: type) -> None:
        self.name, self._of = name, of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._of(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            return self.fail(f"expected {self.name} such as 1,2,4; found {value!r}", param, ctx)


@click.command("attack", epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Labeled images, CLASS/IMAGE."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), metavar="FILE", help="Whose gradient PGD and APGD use.")
@click.option("--attacks", type=_Several("names", str), metavar="NAMES", help="pgd,apgd,square,noise.  [default: all]")
@click.option(
    "--eps",
    "epsilons",
    type=_Several("numbers", float),
    metavar="E,E,…",
    help="Largest change of a pixel, in 1/255.  [default: 4; up to 64 px: 8]",
)
@click.option("--queries", default=1000, show_default=True, type=click.IntRange(min=1), help="Of Square, an image.")
@click.option("--initial-share", default=0.8, show_default=True, help="Share of the pixels in Square's first squares.")
@click.option("--draws", default=10, show_default=True, type=click.IntRange(min=1), help="Noises; the worst counts.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=1), help="Of PGD and APGD.")
@click.option("--restarts", default=1, show_default=True, type=click.IntRange(min=1), help="Of PGD and APGD.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Images, from all classes in proportion.")
@click.option("--seed", default=0, show_default=True, help="Of the limit and of the attacks.")
@click.option("--out", default=Path("evaluation"), show_default=True, type=click.Path(path_type=Path), metavar="DIR")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1), help="Images at once.")
@click.option("--threads", default=0, show_default=True, help="CPU threads of ONNX Runtime; 0: all cores.")
@device_option("Where models run.")
@cpu_kernels_option
@cli_errors
def main(
    models: tuple[Path, ...],
    data: Path,
    checkpoint: Path | None,
    attacks: tuple[str, ...] | None,
    epsilons: tuple[float, ...] | None,
    queries: int,
    initial_share: float,
    draws: int,
    steps: int,
    restarts: int,
    limit: int | None,
    seed: int,
    out: Path,
    batch_size: int,
    threads: int,
    device: str,
    cpu_kernels: bool,
) -> None:
    """Attack MODELs: ONNX files, engines and checkpoints, in the L-inf ball, with images rounded to uint8.

    Prints a table, and writes OUT/MODEL.attack.json, which advprop report draws as accuracy against ε.
    """
    console = set_up_logging()
    from advprop import checkpoints
    from runtime.evaluate import AttackConfig, AttackedModel, SuiteConfig, load_attacker, load_model, load_models
    from runtime.evaluate.attacks.config import default_attacks, default_epsilon
    from runtime.system.files import output_dir

    def config(width: float) -> AttackConfig:
        return AttackConfig(
            attacks=default_attacks(checkpoint is not None) if attacks is None else attacks,
            epsilons=(width,) if epsilons is None else epsilons,
            queries=queries,
            initial_share=initial_share,
            draws=draws,
            steps=steps,
            restarts=restarts,
            seed=seed,
        )

    asked = config(1)  # what is wrong with the options is said before models are loaded
    asked.check_gradient(checkpoint is not None)
    output_dir(out)
    attacker = None
    if checkpoint is not None and asked.gradient:
        attacker = load_attacker(checkpoint, checkpoint_loader=checkpoints.load_attacker, device=device)
    elif checkpoint is not None:
        log.warning("--checkpoint has no effect: neither pgd nor apgd is asked for")
    load = partial(
        load_model,
        device=device,
        threads=threads,
        exact=not cpu_kernels,
        checkpoint_loader=checkpoints.load_predictor,
    )
    loaded, white_box = load_models(load, models, checkpoint if attacker else None)
    asked = config(default_epsilon(loaded[0].spec))
    targets = [AttackedModel(model=model, attacks=asked.attacks) for model in loaded]
    if white_box is not None and all(white_box is not model for model in loaded):
        # Square attack costs most, and is on the files' logits: those of the checkpoint too where it is a MODEL.
        cheap = tuple(name for name in asked.attacks if name != "square")
        targets.append(AttackedModel(model=white_box, attacks=cheap))
    results = _attack(
        console,
        targets,
        SuiteConfig(name="imagenet", data=data, limit=limit, seed=seed),
        asked,
        out,
        attacker,
        batch_size,
    )
    _write(console, results, out)


def _attack(
    console: Console,
    targets: Sequence[AttackedModel],
    data: SuiteConfig,
    config: AttackConfig,
    out: Path,
    attacker: Attacker | None,
    batch_size: int,
) -> list[AttackResult]:
    from runtime.evaluate import attack

    with counting_bars(console, counts=False) as bars:
        task = bars.add_task(", ".join(config.attacks), total=None)

        def show(done: float, total: int) -> None:
            bars.update(task, completed=done, total=total)

        return attack(targets, data, config, out=out, attacker=attacker, batch_size=batch_size, progress=show)


def _write(console: Console, results: list[AttackResult], out: Path) -> None:
    import json

    from runtime.evaluate import attack_notes, attack_table, result_path
    from runtime.system.files import write_text

    written = []
    for result in results:
        path = result_path(result["model"], out, "attack.json")
        write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        written.append(str(path))
    console.print(attack_table(results))
    for line in (*attack_notes(results), f"wrote {', '.join(written)}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
