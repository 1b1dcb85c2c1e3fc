"""The report of a study: a Markdown page from the results so far. It states what is not measured yet."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity.measure import PRECISIONS
from benchmarks.fidelity.picture import draw
from benchmarks.fidelity.plan import LONG, MAIN_RECIPES, OTHER_RECIPES, REPEATED, TUNED, Plan, Settings, trials
from benchmarks.fidelity.results import METRICS, Difference, Results, Verdict, paired, spread, subtract
from benchmarks.fidelity.verdict import STATEMENTS, advice
from runtime.system.files import write_text
from train.recipes import MAIN

__all__ = ["write_report"]

GPU_COMMAND = """python -m benchmarks.fidelity --data cifar10 --device cuda --arch cifar_resnet18 --images 50000 \\
    --epochs 100 --tuning-epochs 20 --amp bf16 --main-only --out runs/fidelity-gpu
python -m benchmarks.fidelity --out runs/fidelity-gpu --report runs/fidelity-gpu/fidelity.md"""


def write_report(out: Path, page: Path, note: str = "") -> Results:
    """Write the page and its picture, which has the same name with the suffix `.svg`.

    Args:
        out: output folder of a study.
        page: Markdown file.
        note: paragraph for the introduction.

    Raises:
        DataError: `out` holds no study.
    """
    results = Results.read(out)
    picture = draw(results, page.with_suffix(".svg"))
    sections = [
        _introduction(results, note),
        "## Should you use it?\n\n" + "\n\n".join(advice(results)),
        f"![Clean accuracy against corruption error by recipe, and AdvProp's gain by data size]({page.stem}.svg)"
        if picture
        else "",
        "## Statements of the slides\n\n" + _statements(results),
        "## Recipes\n\n" + _recipes(results),
        "## Corruptions\n\n" + _corruptions(results),
        "## BatchNorm routes\n\n" + _routes(results),
        "## Exported files\n\n" + _files(results),
        "## Data size and width\n\n" + _sizes(results),
        "## How it was measured\n\n" + _method(results, page),
        "## Full size on a GPU\n\n" + _gpu(results),
    ]
    write_text(page, "\n\n".join(map(_wrapped, filter(None, sections))) + "\n")
    return results


def _wrapped(section: str) -> str:
    """Wrap the prose of a section to 100 characters."""
    blocks = []
    for block in section.split("\n\n"):
        if not block.startswith(("|", "#", "!", "```")):
            lines = block.split("\n") if block.startswith("- ") else [block]
            block = "\n".join(
                textwrap.fill(line, 100, subsequent_indent="  " if line[0] == "-" else "", break_on_hyphens=False)
                for line in lines
            )
        blocks.append(block)
    return "\n\n".join(blocks)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _introduction(results: Results, note: str) -> str:
    plan = results.plan
    lines = [
        "# AdvProp at CIFAR scale" + (", on a GPU" if _on_gpu(results) else ""),
        f"This page trains `{plan.arch}` on {plan.images:,} images of CIFAR-10 with every recipe, and follows the "
        "difference that AdvProp makes through export, FP16 and INT8. The paper reports ImageNet only; no published "
        "figure for CIFAR was found.",
    ]
    done = {recipe: len(found) for recipe, found in results.tried.items()}
    if results.chosen is None:
        lines.append(
            f"**Unfinished.** Of {plan.levels**2} trials each, {done['vanilla']} of vanilla and {done['advprop']} of "
            "AdvProp are finished. No recipe is trained with the chosen settings yet."
        )
    elif missing := _missing(results):
        lines.append(f"**Unfinished.** Not run yet: {', '.join(missing)}.")
    if note:
        lines.append(note)
    if diverged := results.diverged():
        lines.append(f"The training of {', '.join(diverged)} diverged; it is not in the tables.")
    return "\n\n".join(lines)


def _on_gpu(results: Results) -> bool:
    return bool(results.description["device"] != "cpu")


def _missing(results: Results) -> list[str]:
    plan, missing = results.plan, []
    for recipe in (*MAIN_RECIPES, *OTHER_RECIPES):
        seeds, expected = len(results.of(recipe)), plan.seeds if recipe in REPEATED else 1
        if seeds < expected:
            missing.append(recipe if not seeds else f"{expected - seeds} of {expected} seeds of {recipe}")
    exported = sum(run.files is not None for recipe in TUNED for run in results.of(recipe))
    if exported < len(TUNED) * plan.seeds:
        missing.append(f"{len(TUNED) * plan.seeds - exported} of {len(TUNED) * plan.seeds} exports")
    missing += [f"{images:,} images" for images, _ in plan.sizes if any(not results.of(name, images) for name in TUNED)]
    if plan.wide and any(not results.of(name, arch=plan.wide) for name in TUNED):
        missing.append(f"`{plan.wide}`")
    return missing


def _statements(results: Results) -> str:
    rows = []
    for statement in STATEMENTS:
        found = statement.measure(results)
        verdict = Verdict.NOT_RUN if found is None else found.verdict(statement.sign)
        rows.append([statement.text, statement.quantity, _shown(found), f"**{verdict}**"])
    return (
        table(["statement", "measured difference", "points, 95 % interval", ""], rows)
        + "\n\nA statement is *reproduced* if the whole interval is on its side of zero, and *not reproduced* if the "
        "whole interval is on the other side. Otherwise these seeds do not decide it."
    )


def _recipes(results: Results) -> str:
    if not results.recipes():
        return "Not run yet."
    header = ["recipe", "seeds", *METRICS]
    rows = [
        [recipe, str(len(results.of(recipe))), *(spread(results.values(recipe, metric)) for metric in METRICS)]
        for recipe in results.recipes()
    ]
    text = "Main route, in percent: mean ± standard deviation over seeds.\n\n" + table(header, rows)
    others = [recipe for recipe in results.recipes() if recipe != "vanilla"]
    if results.of("vanilla") and others:
        rows = [
            [recipe, *(_shown(paired(results.values(recipe, m), results.values("vanilla", m))) for m in METRICS)]
            for recipe in others
        ]
        text += "\n\nDifference from vanilla, in points, with the 95 % interval over seeds:\n\n"
        text += table(["recipe", *METRICS], rows)
    if results.of(LONG):
        text += f"\n\n`{LONG}` is vanilla with as many passes over the images as AdvProp makes."
    return text


def _corruptions(results: Results) -> str:
    found = {
        recipe: {run.cell.seed: run.routes[MAIN]["errors"] for run in results.of(recipe) if run.routes}
        for recipe in TUNED
    }
    if not all(found.values()):
        return "Not run yet."
    rows = []
    for corruption in next(iter(found["vanilla"].values())):
        by_seed = {
            recipe: {
                run.cell.seed: 100 * run.routes[MAIN]["errors"][corruption] for run in results.of(recipe) if run.routes
            }
            for recipe in TUNED
        }
        difference = paired(by_seed["advprop"], by_seed["vanilla"])
        rows.append([corruption.replace("_", " "), *(spread(by_seed[recipe]) for recipe in TUNED), _shown(difference)])
    return "Error in percent, mean of five severities.\n\n" + table(["corruption", *TUNED, "difference"], rows)


def _routes(results: Results) -> str:
    first = [run for recipe in results.recipes() for run in results.of(recipe) if run.cell.seed == 0]
    rows = [
        [run.cell.recipe, route, *(f"{value(measured):.1f}" for value in METRICS.values())]
        for run in first
        for route, measured in (run.routes or {}).items()
        if len(run.routes or {}) > 1
    ]
    if not rows:
        return "Not run yet."
    return "Percent of the first seed. Each route is attacked through itself.\n\n" + table(
        ["recipe", "route", *METRICS], rows
    )


def _files(results: Results) -> str:
    metric = "corruption error"
    by_precision = {
        precision: {recipe: results.file_values(recipe, precision, metric) for recipe in TUNED}
        for precision in PRECISIONS
    }
    by_seed = {name: subtract(found["vanilla"], found["advprop"]) for name, found in by_precision.items()}
    gains = {name: paired(found["vanilla"], found["advprop"]) for name, found in by_precision.items()}
    full = gains["fp32"]
    if full is None:
        return "Not run yet."
    rows = []
    for precision, found in by_precision.items():
        gain = gains[precision]
        clean = [spread(results.file_values(recipe, precision, "clean accuracy")) for recipe in TUNED]
        errors = [spread(found[recipe]) for recipe in TUNED]
        share = f"{100 * gain.mean / full.mean:.0f} %" if gain is not None and full.mean > 0 else "–"
        change = "" if precision == "fp32" else _shown(paired(by_seed[precision], by_seed["fp32"]))
        rows.append([precision.upper(), *clean, *errors, _shown(gain), share, change])
    header = ["file", *(f"{recipe}, clean" for recipe in TUNED), *(f"{recipe}, corruption error" for recipe in TUNED)]
    images = next(run.files["fp32"]["images"] for run in results.of("vanilla") if run.files)
    return (
        f"Percent on {images:,} test images per corruption and severity, computed on a CPU with every rounding of a "
        "GPU. The gain is the corruption error of vanilla minus that of AdvProp, in points; its change is the "
        "difference from FP32.\n\n" + table([*header, "gain", "share of FP32's", "change of the gain"], rows)
    )


def _sizes(results: Results) -> str:
    plan, rows = results.plan, []
    sizes = sorted({plan.images, *(images for images, _ in plan.sizes)})
    variants: list[tuple[str, dict[str, Any]]] = [(f"{images:,} images", {"images": images}) for images in sizes]
    if plan.wide:
        variants.append((f"`{plan.wide}`", {"arch": plan.wide}))
    for name, where in variants:
        cells = []
        for metric in ("clean accuracy", "corruption error"):
            values = [results.values(recipe, metric, **where) for recipe in TUNED]
            cells += [*map(spread, values), _shown(paired(values[1], values[0]))]
        if any(results.of(recipe, **where) for recipe in TUNED):
            rows.append([name, str(len(results.of("advprop", **where))), *cells])
    if not rows:
        return "Not run yet."
    header = ["", "seeds"]
    for metric in ("clean", "corruption error"):
        header += [*(f"{recipe}, {metric}" for recipe in TUNED), "difference"]
    return (
        "Percent on the main route. Learning rate, weight decay and ε are those chosen at "
        f"{plan.images:,} images.\n\n" + table(header, rows)
    )


def _shown(difference: Difference | None) -> str:
    return "–" if difference is None else str(difference)


def _method(results: Results, page: Path) -> str:
    plan, description = results.plan, results.description
    versions = ", ".join(f"{name} {version}" for name, version in description["versions"].items())
    precision = "float32" if plan.amp == "none" else f"{plan.amp} autocast (evaluation in float32)"
    sizes = f"; {'; '.join(f'{epochs} for {images:,} images' for images, epochs in plan.sizes)}" if plan.sizes else ""
    options = _options(plan, description)
    hours = f"Training took {results.cpu_s / 3600:.1f} hours of CPU time so far"
    lines = [
        f"```sh\npython -m benchmarks.fidelity --data cifar10 {options}\n"
        f"python -m benchmarks.fidelity --report docs/results/{page.name}\n```",
        f"{'Training ran' if _on_gpu(results) else hours + ','} in {precision} ({description['device']}; "
        f"{description['machine']}; {versions}). Measuring is not counted.",
        "- **Data**: CIFAR-10 as JPEG files. 5,000 training images are held out to choose settings. Subsets are "
        "stratified, and smaller ones are parts of larger ones.",
        f"- **Training**: batch size 128, AdamW, cosine schedule, label smoothing 0.1, random crops of 50 to 100 % of "
        f"the area, flips. Vanilla trains for {plan.epochs} epochs{sizes}. The other recipes make as many epochs; "
        f"`finetune` adds half as many to `adversarial` at a third of the learning rate, and `{LONG}` makes as many "
        "passes as AdvProp. The last checkpoint is measured, not the best one.",
        f"- **Settings**: {_chosen(results)}",
        f"- **Test**: 5,000 images; fifteen corruptions at five severities with CIFAR's table of severities, on "
        f"{description['corrupted']:,} of them; untargeted PGD-10 with a step of ε/4 on 1,000 images, ε in 1/255; ECE "
        "with 15 bins on clean images.",
        "- **Intervals**: a seed fixes initial weights, order, augmentation and attack, and is common to all recipes. "
        "An interval is Student's t of the differences between runs with the same seed. It covers the randomness of "
        "training, not that of the test images.",
        "- **Repeat a run**: `--run RECIPE:SEED` trains one run of the plan and prints a hash of its weights. On the "
        "same model of CPU, with the same versions and number of threads, the hash is the same.",
    ]
    return "\n\n".join([*lines[:2], "\n".join(lines[2:])])


def _options(plan: Plan, description: dict[str, Any]) -> str:
    """Return the options of the command, four per line."""
    tuning_images = f"--tuning-images {plan.tuning_images}" if plan.tuning_images else ""
    words = [
        f"--images {plan.images}",
        f"--epochs {plan.epochs}",
        f"--tuning-epochs {plan.tuning_epochs}",
        tuning_images,
        f"--seeds {plan.seeds}",
        f"--arch {plan.arch}",
        f"--amp {plan.amp}",
        "" if plan.sizes else "--main-only",
        f"--corrupted {description['corrupted']}",
        "" if description["device"] == "cpu" else f"--device {description['device']}",
    ]
    words = list(filter(None, words))
    lines = [" ".join(words[start : start + 4]) for start in range(0, len(words), 4)]
    return "".join(f" \\\n    {line}" for line in lines).lstrip()


def _chosen(results: Results) -> str:
    best = {recipe: max(found, key=lambda trial: trial["top1"]) for recipe, found in results.tried.items() if found}
    if results.chosen is None or len(best) < len(TUNED):
        return "not chosen yet."
    settings = " and ".join(
        f"{recipe}: {_settings(results.chosen[recipe], attacks=recipe != 'vanilla')} "
        f"({100 * best[recipe]['top1']:.1f} % of the held-out images)"
        for recipe in TUNED
    )
    kinds = [trial["amp"] for found in results.tried.values() for trial in found]
    other = [kind for kind in kinds if kind != results.plan.amp]
    names = ", ".join("float32" if kind == "none" else kind for kind in sorted(set(other)))
    note = f" {len(other)} of the {len(kinds)} trials ran in {names}." if other else ""
    images = trials(results.plan, "vanilla")[0].images
    spread_of = {
        recipe: statistics.stdev(trial["top1"] for trial in found) * 100 for recipe, found in results.tried.items()
    }
    return (
        f"{results.plan.levels**2} trials of {results.plan.tuning_epochs} epochs on {images:,} images per recipe, with "
        "one seed, on a grid of learning rate and weight decay, and of ε for AdvProp (Taguchi's L9). Chosen for "
        f"{settings}. The standard deviation of the trials is {spread_of['vanilla']:.1f} and "
        f"{spread_of['advprop']:.1f} points. Clean recipes use the settings of vanilla, the others those of AdvProp; "
        "`fast` has its own attack." + note
    )


def _settings(settings: Settings, *, attacks: bool) -> str:
    strength = f", ε {settings.epsilon:g}" if attacks else ""
    return f"learning rate {settings.lr:g}, weight decay {settings.weight_decay:g}{strength}"


def _gpu(results: Results) -> str:
    done = "" if _on_gpu(results) else " `docs/results/fidelity_gpu.md` shows a run of 8 epochs."
    return (
        "The same program trains ResNet-18 with a stem for 32 px on all 50,000 images, with three seeds. **Training "
        f"for 100 epochs was not run.**{done}\n\n```sh\n{GPU_COMMAND}\n```"
    )
