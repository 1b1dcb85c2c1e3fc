"""`advprop-export`: export a checkpoint to ONNX and TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from calib.options import CALIBRATION_OPTIONS, calibration_options
from runtime.engine.command_line import ENGINE_OPTIONS, build_arguments
from runtime.system.command import Command, Option, as_config, image_size_option, out_option, with_options
from runtime.system.console import engine_bar, print_lines, set_up_logging, status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from calib.config import CalibrationConfig
    from calib.precision import Decision
    from export.config import ExportConfig
    from export.pipeline import ExportResult
    from runtime.spec import ImageSizes

EXAMPLES = """
Examples:
  advprop-export runs/resnet50/best.pt                       model.onnx
  advprop-export runs/resnet50/best.pt --trt fp16            + model.fp16.onnx and an engine
  advprop-export best.pt --trt fp16 --sm 86 --sm 89          for these GPU generations
  advprop-export best.pt --trt int8 --calib-data photos/     INT8, the rest FP16
  advprop-export best.pt --trt int8 --calib-data photos/ --budget 0.5 --calib-mix clean,adversarial
  advprop-export weights.pth --arch resnet50 --data photos/  a plain timm state dict
  advprop-export timm:tf_efficientnet_b3.ap_in1k --data photos/    published AdvProp weights
  advprop-export best.pt --input uint8-nhwc --output probs   pixels in, probabilities out
  advprop-export best.pt --img-size 160:224:320 --trt fp16   any image size, and an engine for that range
  advprop-export best.pt --hub hub/                          a folder for the Hugging Face Hub and timm
  advprop-export best.pt --route adv --out adv/              an auxiliary BatchNorm route, for research

Exit codes: 0 success; 2 bad input; 3 no engine (the ONNX files are written);
            4 a file does not agree with the previous one.
"""

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_INPUT_FORMS = {"float32": "float32 NCHW", "uint8": "uint8 NCHW", "uint8-nhwc": "uint8 NHWC"}


def _option(group: str, *names: str, **attributes: Any) -> Option:
    return Option(list(names), group=group, **attributes)


_MODEL_OPTIONS = (
    _option("Model", "--arch", metavar="NAME", help="timm name of the architecture, for a plain state dict."),
    _option(
        "Model",
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Weights of timm:NAME (default: download them).",
    ),
    _option("Model", "--route", default="main", show_default=True, metavar="NAME", help="BatchNorm route to export."),
    _option(
        "Model",
        "--ema/--no-ema",
        default=True,
        help="Export the moving average of the weights, if the checkpoint has one.",
    ),
    _option(
        "Verification",
        "--data",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder of images to verify on (default: the sample in the checkpoint, or images of --calib-data that "
        "do not calibrate).",
    ),
    _option(
        "Verification",
        "--bisect/--no-bisect",
        default=True,
        show_default=True,
        help="Find the first layer that differs, if a file does not agree with the previous one.",
    ),
)
_HUB_OPTIONS = (
    _option(
        "Hugging Face Hub",
        "--hub",
        "folder",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Folder to write for the Hub: weights and configuration for timm, and a model card. No ONNX file is "
        "written unless --trt or --precision is given.",
    ),
    _option(
        "Hugging Face Hub",
        "--results",
        type=click.Path(path_type=Path),
        multiple=True,
        metavar="PATH",
        help="Result of advprop eval for the model card, or a folder of them (default: those next to the checkpoint). "
        "Repeatable.",
    ),
)
_FORM_OPTIONS = (
    _option(
        "Input and output format",
        "--input",
        "input_form",
        default="float32",
        show_default=True,
        type=click.Choice(list(_INPUT_FORMS)),
        help="Input of the model: normalized floats, or pixels at the network's size that it normalizes itself.",
    ),
    _option(
        "Input and output format",
        "--output",
        "output_form",
        default="logits",
        show_default=True,
        type=click.Choice(["logits", "probs", "topk"]),
        help="Output of the model; topk is the five largest probabilities and their classes.",
    ),
    _option(
        "Input and output format",
        "--io",
        default="fp32",
        show_default=True,
        type=click.Choice(["fp32", "fp16"]),
        help="Data type of the FP16 model's inputs and outputs.",
    ),
)


_HINTS = {
    "--model": "CHECKPOINT has no option name: advprop-export best.pt",
    "--checkpoint": "CHECKPOINT has no option name: advprop-export best.pt",
    "--format": "an ONNX file is always written; --trt fp16 also builds an engine",
    "--half": "write FP16 with --precision fp16, or build an engine with --trt fp16",
    "--int8": "write INT8 with --precision int8 --calib-data DIR, or build an engine with --trt int8 --calib-data DIR",
    "--imgsz": "did you mean --img-size?",
    "--dynamic": "the batch size is always dynamic; --img-size MIN:OPT:MAX makes the image size dynamic",
    "--opset": "the opset is fixed",
}
"""Options of other exporters → how to get the same here."""


@click.command("export", cls=Command, epilog=EXAMPLES, hints=_HINTS)
@click.argument("checkpoint")
@with_options(
    _option("Output", "--trt", type=click.Choice(_PRECISIONS), help="Build an engine of this precision."),
    _option(
        "Output",
        "--precision",
        type=click.Choice(_PRECISIONS),
        help="Write an ONNX file of this precision, but no engine (default: fp32).",
    ),
    out_option("Output folder (default: the checkpoint's folder).", group="Output"),
)
@as_config("model", _MODEL_OPTIONS, dict)
@as_config("hub", _HUB_OPTIONS, dict)
@as_config("forms", _FORM_OPTIONS, dict)
@with_options(
    image_size_option(
        "Image size, N or HxW (default: the checkpoint's); MIN:OPT:MAX writes a file that accepts any size.",
        group="Input and output format",
    )
)
@as_config("engine", ENGINE_OPTIONS, build_arguments)
@with_options(
    _option(
        "INT8 calibration",
        "--calib-data",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Calibration images (a folder, tar or NumPy file), or the NAME.calib.json of an earlier run.",
    )
)
@calibration_options
def main(
    checkpoint: str,
    trt: str | None,
    precision: str | None,
    out: Path | None,
    model: dict[str, Any],
    hub: dict[str, Any],
    forms: dict[str, Any],
    image_sizes: ImageSizes | None,
    engine: dict[str, Any],
    calib_data: Path | None,
    calibration: CalibrationConfig,
) -> None:
    """Export CHECKPOINT to ONNX and, with --trt, to a TensorRT engine.

    Auxiliary BatchNorms are removed and the main ones folded into the convolutions. Each ONNX file
    contains its preprocessing and class names, and is verified on real images.
    """
    console = set_up_logging()
    _validate_options(trt, precision, forms["io"])
    if hub["results"] and not hub["folder"]:
        raise click.UsageError("--results requires --hub")
    with status("importing torch") as spinner:
        from export.config import EngineConfig, ExportConfig
        from export.pipeline import export_checkpoint

        forms["input_form"] = _INPUT_FORMS[forms["input_form"]]
        config = ExportConfig(
            out=out,
            precision=trt or precision or "fp32",
            engine=EngineConfig(**engine) if trt else None,
            sizes=image_sizes,
            calib_data=calib_data,
            calibration=calibration,
            **model,
            **forms,
        )
        if hub["folder"]:
            _export_hub(console, checkpoint, config, **hub)
            if not (trt or precision):
                return
        result = export_checkpoint(checkpoint, config, progress=spinner.update, build_progress=engine_bar(spinner))
    _print_result(console, result)


def _export_hub(
    console: Console, checkpoint: str, config: ExportConfig, folder: Path, results: tuple[Path, ...]
) -> None:
    from export.hub import export_hub

    written = export_hub(checkpoint, folder, config, results=results)
    sources = ", ".join(str(result.file) for result in written.results) or "none found; add --results PATH"
    lines = [
        f"wrote {folder}: model.safetensors, config.json" + ("" if written.card_kept else ", README.md"),
        f'timm.create_model("local-dir:{folder}", pretrained=True) computes the same logits',
        f"results in the model card: {sources}",
        f"upload it: hf upload USER/NAME {folder}",
    ]
    print_lines(console, lines)


def _validate_options(trt: str | None, precision: str | None, io: str) -> None:
    """Reject contradictory options, and options that have no effect without another one."""
    if trt and precision and trt != precision:
        raise click.UsageError(f"--trt {trt} and --precision {precision} contradict each other; remove --precision")
    made = trt or precision or "fp32"
    if not trt:
        _reject(ENGINE_OPTIONS, "only applies together with --trt")
    if io == "fp16" and made != "fp16":
        raise click.UsageError("--io fp16 requires --trt fp16 or --precision fp16")
    if made != "int8":
        _reject(CALIBRATION_OPTIONS, "requires --trt int8 or --precision int8")


def _reject(options: Sequence[Option], reason: str) -> None:
    context = click.get_current_context()
    for option in options:
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} {reason}")


def _print_result(console: Console, result: ExportResult) -> None:
    from rich.table import Table

    from runtime.engine.flavors import describe_targets

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for heading in ("MB", "compared with", "max |Δlogit|", "agreement", "KL"):
        table.add_column(heading, justify="right", overflow="fold")
    rows = (
        (result.onnx, "checkpoint", result.onnx_parity),
        (result.reduced_onnx, result.onnx.name, result.reduced_parity),
        (result.engine, "", None),
    )
    for path, against, parity in rows:
        if path is None:
            continue
        size = f"{_size_bytes(path) / 1e6:.1f}"
        if parity is None:
            table.add_row(path.name, size, "built", "", "", "")
        else:
            table.add_row(
                path.name, size, against, f"{parity.max_abs:.1e}", f"{parity.agreement:.1%}", f"{parity.kl:.1e}"
            )
    console.print(table)
    lines = [f"verified on {result.onnx_parity.images} real images; files are in {result.onnx.parent}"]
    lines += [f"kept in FP32: {decision.op} {decision.node}: {_reason(decision)}" for decision in result.kept_fp32]
    if result.engine_info:
        info = result.engine_info
        targets = describe_targets(info.compute_capabilities)
        lines.append(f"engine: {info.flavor} {info.version}, {info.precision}, for {targets}")
    if result.calibrated and result.reduced_onnx:
        from calib.report import print_calibration

        print_calibration(console, result.onnx.name, result.reduced_onnx, result.calibrated)
    print_lines(console, lines)


def _size_bytes(path: Path) -> int:
    """Return the size of a file in bytes, including external weights."""
    weights = path.with_name(path.name + ".data")
    return path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def _reason(decision: Decision) -> str:
    if decision.reason == "overflow":
        return f"{decision.tensor} reaches {decision.amax:.3g}"
    return f"{decision.tensor} would have an error of {decision.error:.1%}"


if __name__ == "__main__":
    main()
