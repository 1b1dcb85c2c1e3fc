"""`advprop compare`: several models on the same images, with a verdict, and a gate for CI."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from advprop.commands.report import report_date
from runtime.errors import ConfigError, GateFailed
from runtime.system.command import (
    Command,
    Option,
    batch_size_option,
    data_option,
    device_option,
    json_option,
    limit_option,
    out_option,
    seed_option,
    threads_option,
    with_options,
    workers_option,
)
from runtime.system.console import print_json, print_lines, set_up_logging, status

if TYPE_CHECKING:
    from advprop.compare import Measurements
    from runtime.evaluate.comparison import Comparison
    from runtime.evaluate.gate import Outcome

EXAMPLES = """
Examples:
  advprop compare runs/vanilla runs/advprop --data photos/val
  advprop compare runs/advprop runs/advprop/model.int8.onnx --data photos/val --suite clean
  advprop compare old=released.onnx new=model.onnx --data photos/val --limit 500 -o compare
  advprop compare evaluation/vanilla.corruptions.json evaluation/advprop.corruptions.json
  advprop compare runs/old runs/new --data photos/val --fail-if 'top1 < baseline - 0.5' --junit gate.xml

MODELs are folders of training runs, checkpoints, ONNX files or engines, or results of advprop eval and
advprop attack (.json). NAME=MODEL sets the name in tables, files and pages.

Conditions: METRIC < baseline - NUMBER, or METRIC < NUMBER, with <, <=, > or >=. Metrics are top1, mean_error, pgd and
the error under a corruption such as fog, in percent; mce; and ece, from 0 to 1. A condition fails only if its whole
95% interval is beyond the limit. If the interval contains the limit, the outcome is inconclusive, and passes unless
--inconclusive fail is set. A failed condition ends the command with exit code 5.
"""


@click.command("compare", cls=Command, epilog=EXAMPLES)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@with_options(
    data_option(help="Folder of the test set; not used for results."),
    Option(["--suite"], default="corruptions", show_default=True, metavar="NAME", help="Test set, as in advprop eval."),
    Option(["--baseline"], metavar="MODEL", help="Model to compare with, or its name (default: the first MODEL)."),
    limit_option("images per cell"),
    seed_option("sampling, corruptions and PGD"),
    out_option("Folder for results.", default=Path("comparison")),
    json_option("the comparison as JSON instead of a table"),
    Option(
        ["--report", "reports"],
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Report to write (.html, .md or .csv). Repeatable.",
    ),
    Option(
        ["--steps"],
        default=10,
        show_default=True,
        type=click.IntRange(min=0),
        group="Attack",
        help="PGD steps; 0 runs no attack.",
    ),
    Option(
        ["--eps", "epsilon"],
        type=click.FloatRange(min=0, min_open=True),
        group="Attack",
        help="Maximum change of a pixel in PGD, in 1/255 (default: 4; 8 for networks up to 64 px).",
    ),
    Option(
        ["--fail-if", "fail_if"],
        multiple=True,
        metavar="CONDITION",
        group="Gate",
        help="Condition that fails the command, such as 'top1 < baseline - 0.5'. Repeatable.",
    ),
    Option(
        ["--inconclusive"],
        default="pass",
        show_default=True,
        type=click.Choice(["pass", "fail"]),
        group="Gate",
        help="Result if the images are too few to decide a condition.",
    ),
    Option(
        ["--junit"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        group="Gate",
        help="JUnit XML file of the conditions to write.",
    ),
    Option(
        ["--summary"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        group="Gate",
        help="Markdown summary to write (default: append to $GITHUB_STEP_SUMMARY if it is set).",
    ),
    batch_size_option(8, group="Execution"),
    workers_option(group="Execution"),
    threads_option(group="Execution"),
    device_option(group="Execution"),
)
def main(
    models: tuple[Path, ...],
    baseline: str | None,
    fail_if: tuple[str, ...],
    inconclusive: str,
    junit: Path | None,
    summary: Path | None,
    reports: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Compare MODELs with a baseline on the same images, and state what the images show.

    Prints clean accuracy, error under corruptions, accuracy under PGD and calibration, each with the
    paired difference from the baseline. Writes a result per model, which advprop report reads.
    """
    console = set_up_logging()
    from runtime.evaluate.comparison_text import comparison_json, comparison_table, verdict_lines
    from runtime.evaluate.gate import check, parse_condition
    from runtime.evaluate.report import check_outputs, write_report

    conditions = [parse_condition(text) for text in fail_if]
    if junit is not None and not conditions:
        raise ConfigError("--junit reports conditions; add --fail-if CONDITION")
    check_outputs(reports)
    measurements, comparison = _measure(models, baseline, options)
    outcomes = check(conditions, comparison)
    if as_json:
        print_json(comparison_json(comparison, outcomes))
    else:
        console.print(comparison_table(comparison))
        print_lines(console, (*verdict_lines(comparison), "", *measurements.notes))
        print_lines(console, (f"{_sign(outcome)}: {_outcome_text(outcome)}" for outcome in outcomes))
    if reports:
        write_report(measurements.files, reports, date=report_date())
    _write_gate_files(comparison, outcomes, junit, summary)
    _raise_if_failed(outcomes, inconclusive)


def _measure(models: Sequence[Path], baseline: str | None, options: dict[str, Any]) -> tuple[Measurements, Comparison]:
    """Read results, or evaluate models."""
    from runtime.evaluate import RunConfig, SuiteConfig

    are_results = [str(path).endswith(".json") for path in models]
    if all(are_results):
        from advprop.compare import read_measurements

        measurements = read_measurements(models)
        return measurements, measurements.compare(baseline or "")
    if any(are_results):
        raise ConfigError("expected only models or only results (.json); evaluate the models first with advprop eval")
    if options["data"] is None:
        raise ConfigError("comparing models requires --data DIR, a folder of labeled images (CLASS/IMAGE)")
    with status("importing torch") as spinner:
        from advprop.compare import CompareConfig, measure_models

        workers = {} if options["workers"] is None else {"workers": options["workers"]}
        config = CompareConfig(
            suite=SuiteConfig(
                name=options["suite"], data=options["data"], limit=options["limit"], seed=options["seed"]
            ),
            out=options["out"],
            run=RunConfig(out=options["out"], batch_size=options["batch_size"], **workers),
            **{name: options[name] for name in ("steps", "epsilon", "device", "threads")},
        )
        measurements, name = measure_models(models, baseline, config, spinner.update)
    return measurements, measurements.compare(name)


def _sign(outcome: Outcome) -> str:
    return outcome.status.value.upper()


def _outcome_text(outcome: Outcome) -> str:
    return f"{outcome.model}, fails if {outcome.condition.text}: {outcome.explanation}"


def _write_gate_files(
    comparison: Comparison, outcomes: Sequence[Outcome], junit: Path | None, summary: Path | None
) -> None:
    from runtime.evaluate.comparison_text import summary_markdown
    from runtime.evaluate.gate import to_junit
    from runtime.system.files import output_dir, write_text

    for path in filter(None, (junit, summary)):
        output_dir(path.parent)
    if junit is not None:
        write_text(junit, to_junit(comparison, outcomes))
    shared = os.environ.get("GITHUB_STEP_SUMMARY")
    text = summary_markdown(comparison, outcomes)
    if shared and (summary is None or str(summary) == shared):
        with Path(shared).open("a", encoding="utf-8") as file:  # other steps write to this file too
            file.write(f"{text}\n")
    elif summary is not None:
        write_text(summary, text)


def _raise_if_failed(outcomes: Sequence[Outcome], inconclusive: str) -> None:
    """Raise GateFailed if a condition failed, or if inconclusive ones count as failures."""
    from runtime.evaluate.gate import Status

    failing = (Status.FAILED, Status.INCONCLUSIVE) if inconclusive == "fail" else (Status.FAILED,)
    failed = [outcome for outcome in outcomes if outcome.status in failing]
    if failed:
        raise GateFailed("; ".join(_outcome_text(outcome) for outcome in failed))


if __name__ == "__main__":
    main()
