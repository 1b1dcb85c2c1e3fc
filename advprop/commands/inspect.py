"""`advprop inspect`: what a model file is, by its own account."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export.record import verification
from runtime.errors import BackendUnavailable, ModelFileError, first_line
from runtime.spec import ModelSpec
from runtime.system.console import cli_errors, set_up_logging

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.engine.sidecar import EngineInfo

EXAMPLES = """\b
Examples:
  advprop inspect model.fp16.onnx
  advprop inspect model.fp16.engine
  advprop inspect runs/resnet50/best.pt
"""


@click.command("inspect", epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@cli_errors
def main(file: Path) -> None:
    """Say what FILE (checkpoint, ONNX or engine) is; an engine's bytes are checked against its sidecar."""
    console = set_up_logging()
    from rich.table import Table

    table = Table("", show_header=True)
    table.add_column(str(file), overflow="fold")
    tables = [table]
    if file.suffix in (".engine", ".plan"):
        info = _engine(table, file)
        if info.layers:
            tables.append(_layers(info))
    elif file.suffix in (".pt", ".pth"):
        _checkpoint(table, file)
    else:
        _onnx(table, file)
    console.print(*tables)


def _engine(table: Table, file: Path) -> EngineInfo:
    from runtime.engine.int8 import summary_of
    from runtime.engine.sidecar import read_sidecar

    info = read_sidecar(file)
    table.add_row("kind", f"TensorRT engine, {file.stat().st_size / 1e6:.1f} MB, bytes as built")
    table.add_row("built by", f"{info.flavor} {info.version}" + (f" on {info.gpu}" if info.gpu else ""))
    table.add_row("runs on", ", ".join(info.compute_capabilities))
    table.add_row("flags", ", ".join(info.flags) or "none")
    if info.has_host_code:
        table.add_row("host code", "yes: it loads only where engine_host_code_allowed is set")
    table.add_row("weights", _shares(info.precision_shares) + (" in the ONNX file" if info.layers else ""))
    if info.layers:
        table.add_row("computes in INT8", summary_of(info.layers))
    for profile in info.profiles:
        for name, shapes in profile.items():
            table.add_row("input", f"{name}: " + ", ".join(f"{key} {shapes[key]}" for key in ("min", "opt", "max")))
    _verified(table, file, info.onnx_sha256, "its ONNX file ")
    from advprop.support import engine_support

    table.add_row("runs", "\n".join(engine_support(info)))
    _spec(table, info.spec)
    return info


def _layers(info: EngineInfo) -> Table:
    from rich.table import Table

    table = Table("layer", "", "MACs", "quantized", "computes in", "", title="Layers, as the builder made them")
    for layer in info.layers:
        macs = _scaled(layer.macs) if layer.macs else "unknown"
        table.add_row(layer.node, layer.op, macs, "yes" if layer.quantized else "no", layer.computes, layer.why)
    return table


def _onnx(table: Table, file: Path) -> None:
    from runtime.graph.summary import summarize, work_of

    summary = summarize(file)
    shape = ", ".join("any" if size < 0 else str(size) for size in summary.input_shape)
    table.add_row("kind", f"ONNX classifier, {summary.size_bytes / 1e6:.1f} MB")
    table.add_row("weights", f"{_shares(summary.shares)} of {sum(summary.weights.values()):,}")
    table.add_row("input", f"{summary.input_name}: ({shape})")
    table.add_row("operators", ", ".join(f"{count} {name}" for name, count in sorted(summary.ops.items())))
    nodes, macs = work_of(file)
    if nodes:
        table.add_row("nodes compute in", _shares(_fractions(nodes)))
    if macs:
        table.add_row("work", f"{_scaled(macs)}MACs an image")
    _verified(table, file, summary.sha256)
    from advprop.support import onnx_support

    table.add_row("runs", "\n".join(onnx_support(summary)))
    _spec(table, summary.spec)


def _verified(table: Table, file: Path, sha256: str, what: str = "") -> None:
    text = verification(file.parent, sha256)
    if text:
        table.add_row("verified", what + text)


def _fractions(counts: dict[str, int]) -> dict[str, float]:
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def _scaled(number: int) -> str:
    power = 3 if number >= 10**9 else 2
    return f"{number / 1000**power:.2f} {'M' if power == 2 else 'G'}"


def _checkpoint(table: Table, file: Path) -> None:
    content = _read_checkpoint(file)
    weights = content["state_dict"]
    main = sum(value.numel() for name, value in weights.items() if ".aux." not in name)
    routes = sorted({name.split(".aux.")[1].split(".")[0] for name in weights if ".aux." in name})
    table.add_row("kind", f"advprop checkpoint, {file.stat().st_size / 1e6:.1f} MB")
    table.add_row(
        "weights", f"{main:,} at inference, {sum(value.numel() for value in weights.values()) - main:,} auxiliary"
    )
    table.add_row("BatchNorm routes", ", ".join(["main", *routes]))
    table.add_row("moving average", "yes" if content.get("ema_state_dict") else "none")
    table.add_row("trained for", f"{content['epoch']} epochs, {content['step']} steps")
    rows = content.get("metrics") or []
    if rows:
        best = max(rows, key=lambda row: row["top1"])
        table.add_row(
            "best epoch", f"{best['epoch']}: clean {best['top1']:.1%}, under attack {best['top1_attacked']:.1%}"
        )
    _spec(table, ModelSpec.from_json(content["spec"], where=str(file)))


def _read_checkpoint(file: Path) -> dict[str, Any]:
    """The checkpoint's plain values and the shapes of its tensors; no tensor's bytes are read."""
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(f"reading checkpoints needs torch ({error}); pip install torch") from error
    if not file.is_file():
        raise ModelFileError(f"no such file: {file}")
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises whatever its reader ran into
        raise ModelFileError(f"{file} is no checkpoint, or is damaged: {first_line(error)[:200]}") from error
    if not (isinstance(content, dict) and str(content.get("format", "")).startswith("advprop.checkpoint/")):
        raise ModelFileError(f"{file} is not an advprop checkpoint; advprop-export takes it with --arch NAME")
    return content


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} {name}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))


def _spec(table: Table, spec: ModelSpec | None) -> None:
    if spec is None:
        table.add_row("spec", "none: advprop did not write this file")
        return
    size = spec.preprocessing
    table.add_row("architecture", spec.arch)
    table.add_row(
        "trained", f"{spec.recipe or 'unknown recipe'} on {spec.dataset or 'unknown data'}, route {spec.route}"
    )
    table.add_row(
        "classes", f"{len(spec.classes)}: {'; '.join(spec.classes[:5])}{'; …' if len(spec.classes) > 5 else ''}"
    )
    table.add_row(
        "preprocessing",
        f"{size.height}×{size.width}, {size.interpolation}, {size.crop_mode} crop {size.crop_pct:g}, "
        f"mean {size.mean}, std {size.std}",
    )
    table.add_row("checkpoint", f"sha256 {spec.checkpoint_sha256 or 'unknown'}")


if __name__ == "__main__":
    main()
