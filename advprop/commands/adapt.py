"""`advprop adapt`: adapt a model file to the images of the place where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.errors import AdaptationRefused
from runtime.system.command import Command, Option, data_option, json_option, out_option, threads_option, with_options
from runtime.system.console import print_json, print_lines, set_up_logging, status

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.adapt.adapt import Adaptation, CleanImages

EXAMPLES = """
Examples:
  advprop adapt model.onnx --data field/                       writes model.field.onnx
  advprop adapt model.onnx --data field/ --clean photos/val    accepts at most 0.5 points of loss on clean images
  advprop adapt model.onnx --data field/ --prior 64 --force    a prior of 64 training images, in any case
  advprop calibrate model.field.onnx --data field/             INT8 of the adapted file
  advprop convert model.field.onnx --precision fp16 --data field/

Exit code 5: the images do not show that the adapted model would be better, and no file is written.
"""


class _Prior(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """`auto`, or a number of images."""

    name = "prior"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value in (None, "auto"):
            return None
        try:
            return float(value)
        except ValueError:
            self.fail(f"expected auto, or a number of training images such as 256; found {value!r}", param, ctx)


@click.command("adapt", cls=Command, epilog=EXAMPLES)
@click.argument("onnx", type=click.Path(path_type=Path))
@with_options(
    data_option(
        required=True,
        metavar="PATH",
        help="Unlabeled images of the place where the model runs: a folder, a tar or NumPy file.",
    ),
    out_option("File to write (default: NAME.DATA.onnx, with the name of the images).", "FILE"),
    Option(["--images"], default=128, show_default=True, type=click.IntRange(min=1), help="Maximum number of images."),
    Option(
        ["--prior"],
        type=_Prior(),
        metavar="auto|N",
        help="Number of training images that the statistics of the training images count for; auto chooses it by "
        "the shift of each layer (default: auto).",
    ),
    Option(
        ["--clean"],
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of labeled images, CLASS/IMAGE, on which the adapted model must not lose accuracy.",
    ),
    Option(
        ["--max-clean-loss"],
        default=0.5,
        show_default=True,
        type=click.FloatRange(0, 100),
        metavar="POINTS",
        help="Maximum loss of top-1 accuracy on --clean, in percentage points.",
    ),
    Option(["--force"], is_flag=True, help="Write the file even if it is not expected to be better."),
    threads_option(),
    json_option("the report as a JSON object"),
)
def main(
    onnx: Path,
    data: Path,
    out: Path | None,
    images: int,
    prior: float | None,
    clean: Path | None,
    max_clean_loss: float,
    force: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Adapt the float32 classifier ONNX to unlabeled images of the place where it runs.

    The statistics of its BatchNorms are estimated again, and mixed with those of the training
    images. The command reports how far the statistics moved and whether the adapted model can be
    expected to be better. It also writes the report NAME.json.
    """
    console = set_up_logging()
    from runtime.adapt.adapt import AdaptConfig
    from runtime.adapt.file import adapt_file

    config = AdaptConfig(images=images, prior=prior, max_clean_loss=max_clean_loss, threads=threads)
    target = out or onnx.with_suffix(f".{data.name.split('.')[0] or 'field'}.onnx")
    checked = None if clean is None else _clean_images(onnx, clean)
    with status("reading images") as spinner:
        result = adapt_file(onnx, data, target, config, clean=checked, force=force, progress=spinner.update)
    if as_json:
        print_json(result.report)
    else:
        console.print(_table(onnx, result.adaptation))
    if result.path is None:
        raise AdaptationRefused(_reason(result.adaptation, config.max_clean_loss), fix="--force writes the file anyway")
    if not as_json:
        print_lines(console, [f"wrote {result.path} and {result.path.with_suffix('.json').name}"])


def _clean_images(onnx: Path, folder: Path) -> CleanImages:
    """Read labeled images; their class folders are found as in `advprop eval`."""
    import numpy as np

    from runtime.adapt.adapt import CleanImages
    from runtime.adapt.file import adaptable_spec
    from runtime.evaluate.cells import SuiteConfig
    from runtime.evaluate.image_workers import load_block
    from runtime.evaluate.suites import open_suite

    spec = adaptable_spec(onnx)
    found = open_suite(SuiteConfig(name="folder", data=folder), spec).cells[0].images
    pixels = load_block(found.source, found.names, spec.preprocessing, "fit")
    return CleanImages(images_NHWC=pixels, labels_N=np.asarray(found.labels))


def _table(onnx: Path, result: Adaptation) -> Table:
    from rich.table import Table

    table = Table(box=None)
    for title in (f"{onnx.name}, {result.images} images", "before", "after"):
        table.add_column(title, justify="left" if title.startswith(onnx.name) else "right")
    before, after = result.before, result.after
    table.add_row("mean confidence", f"{before.confidence:.1%}", f"{after.confidence:.1%}")
    table.add_row("mean entropy", f"{before.entropy:.2f}", f"{after.entropy:.2f}")
    table.add_row("share of the top class", f"{before.top_share:.1%}", f"{after.top_share:.1%}")
    table.add_row("same top-1 class", "", f"{result.agreement:.1%}")
    if result.expected_accuracy is not None:
        table.add_row("expected accuracy", *(f"{value:.0%}" for value in result.expected_accuracy))
    if result.clean is not None:
        clean = result.clean
        title = f"accuracy on {clean.before.images} clean images"
        table.add_row(title, f"{clean.before.top1:.1%}", f"{clean.after.top1:.1%}")
    table.add_row("evidence of a shift", "", f"{result.evidence:.0%}")
    table.add_row("weight of the field images", "", f"{result.weight:.0%}")
    largest = max(result.layers, key=lambda layer: layer.evidence * layer.distance)
    table.add_row("most shifted layer", "", f"{largest.tensor}: {largest.distance:.2g}, noise {largest.noise:.2g}")
    table.add_row("verdict", "", result.verdict.value)
    return table


def _reason(result: Adaptation, max_clean_loss: float) -> str:
    from runtime.adapt.verdict import MIN_EVIDENCE, MIN_IMAGES, Verdict

    if result.verdict is Verdict.TOO_FEW:
        return f"found {result.images} images, expected at least {MIN_IMAGES}; no file was written"
    if result.verdict is Verdict.ONE_CLASS:
        share = f"{min(result.before.top_share, result.after.top_share):.0%}"
        return (
            f"{share} of the images are predicted as the same class; expected images of many classes, because the "
            "statistics of one class are not those of the place. No file was written"
        )
    if result.verdict is Verdict.CLEAN_LOSS and result.clean is not None:
        return (
            f"the adapted model loses {result.clean.loss:.1f} points of accuracy on clean images; expected at most "
            f"{max_clean_loss:g}. No file was written"
        )
    return (
        f"the evidence of a shift is {result.evidence:.0%}, expected at least {MIN_EVIDENCE:.0%}: the images differ no "
        "more from clean images than chance explains. No file was written"
    )


if __name__ == "__main__":
    main()
