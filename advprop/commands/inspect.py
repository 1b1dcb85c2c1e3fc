"""`advprop inspect`: describe a model file, checkpoint or engine."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.graph.foreign import convert_command
from runtime.system.command import Command, json_option, with_options
from runtime.system.console import print_json, set_up_logging

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from runtime.engine.int8 import LayerReport
    from runtime.spec import ModelSpec

EXAMPLES = """
Examples:
  advprop inspect model.fp16.onnx
  advprop inspect model.fp16.engine
  advprop inspect runs/resnet50/best.pt --json
"""


@click.command("inspect", cls=Command, epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@with_options(json_option("the facts as a JSON object"))
def main(file: Path, as_json: bool) -> None:
    """Describe FILE: a checkpoint, ONNX file or engine, which is checked against its sidecar."""
    console = set_up_logging()
    if file.suffix in (".engine", ".plan"):
        facts = _engine_facts(file)
    elif file.suffix in (".pt", ".pth"):
        from advprop.checkpoints import describe_checkpoint

        facts = describe_checkpoint(file)
    else:
        facts = _onnx_facts(file)
    spec, layers = facts.pop("spec"), facts.pop("layers", ())
    if as_json:
        content = {
            "file": str(file),
            **facts,
            "spec": json.loads(spec.to_json()) if spec else None,
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
        print_json(content)
        return
    console.print(_table(file, {**facts, **_spec_facts(spec, file)}))
    if layers:
        console.print(_layer_table(layers))


def _engine_facts(file: Path) -> dict[str, Any]:
    from advprop.support import engine_support
    from export.record import verification
    from runtime.engine.flavors import describe_targets
    from runtime.engine.int8 import summary_of
    from runtime.engine.sidecar import read_sidecar

    info = read_sidecar(file)
    facts = {
        "kind": f"TensorRT engine, {file.stat().st_size / 1e6:.1f} MB, bytes match the sidecar",
        "built by": f"{info.flavor} {info.version}" + (f" on {info.gpu}" if info.gpu else ""),
        "GPU generations": describe_targets(info.compute_capabilities),
        "flags": ", ".join(info.flags) or "none",
        "weights": _percentages(info.precision_shares) + (" in the ONNX file" if info.layers else ""),
    }
    if info.has_host_code:
        facts["host code"] = "yes: loading it requires engine_host_code_allowed"
    if info.layers:
        facts["computed in INT8"] = summary_of(info.layers)
    for number, profile in enumerate(info.profiles):
        for name, shapes in profile.items():
            sizes = ", ".join(f"{key} {shapes[key]}" for key in ("min", "opt", "max"))
            facts["input" if number == 0 else f"input, profile {number}"] = f"{name}: {sizes}"
    parity = verification(file.parent, info.onnx_sha256)
    if parity:
        facts["verified"] = f"its ONNX file, {parity}"
    return {**facts, "runs here": "\n".join(engine_support(info)), "spec": info.spec, "layers": info.layers}


def _onnx_facts(file: Path) -> dict[str, Any]:
    from advprop.support import onnx_support

    if find_spec("onnx") is None:
        return _session_facts(file)
    from export.record import verification
    from runtime.adapt.record import describe_adaptation
    from runtime.graph.summary import summarize, work_of

    summary = summarize(file)
    shape = ", ".join("any" if size < 0 else str(size) for size in summary.input_shape)
    facts = {
        "kind": f"ONNX classifier, {summary.size_bytes / 1e6:.1f} MB",
        "weights": f"{_percentages(summary.shares)} of {sum(summary.weights.values()):,}",
        "input": f"{summary.input_name}: ({shape})",
        "operators": ", ".join(f"{count} {name}" for name, count in sorted(summary.ops.items())),
    }
    nodes, macs = work_of(file)
    if nodes:
        total = sum(nodes.values())
        facts["nodes computed in"] = _percentages({name: count / total for name, count in nodes.items()})
    if macs:
        facts["work per image"] = f"{_scaled(macs)}MACs"
    if summary.adaptation:
        facts["adapted"] = describe_adaptation(summary.adaptation)
    parity = verification(file.parent, summary.sha256)
    if parity:
        facts["verified"] = parity
    return {**facts, "runs here": "\n".join(onnx_support(summary)), "spec": summary.spec}


def _session_facts(file: Path) -> dict[str, Any]:
    """Return what ONNX Runtime knows about the file, on a machine without the package `onnx`."""
    import runtime
    from runtime.system.slices import install_command

    with runtime.load(str(file), device="cpu") as session:
        backend = session.backend
        return {
            "kind": f"ONNX classifier, {file.stat().st_size / 1e6:.1f} MB",
            "weights": f"unknown without the package onnx: {install_command('onnx')}",
            "input": str(backend.input),
            "outputs": ", ".join(map(str, backend.outputs)),
            "runs here": "ONNX Runtime on the CPU: yes",
            "spec": backend.spec,
        }


def _table(file: Path, facts: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table("", show_header=True)
    table.add_column(str(file), overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def _layer_table(layers: tuple[LayerReport, ...]) -> Table:
    from rich.table import Table

    table = Table("layer", "operator", "MACs", "quantized", "computed in", "reason", title="Layers of the engine")
    for layer in layers:
        macs = _scaled(layer.macs) if layer.macs else "unknown"
        quantized = "yes" if layer.quantized else "no"
        table.add_row(layer.node, layer.op, macs, quantized, layer.computes, layer.why)
    return table


def _scaled(number: int) -> str:
    power = 3 if number >= 10**9 else 2
    return f"{number / 1000**power:.2f} {'M' if power == 2 else 'G'}"


def _percentages(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} {name}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))


def _spec_facts(spec: ModelSpec | None, file: Path) -> dict[str, str]:
    if spec is None:
        return {"spec": f"none: advprop did not write this file. Describe it with {convert_command(file)}"}
    size = spec.preprocessing
    classes = "; ".join(spec.classes[:5]) + ("; …" if len(spec.classes) > 5 else "")
    recipe, dataset = spec.recipe or "unknown recipe", spec.dataset or "unknown data"
    return {
        "architecture": spec.arch,
        "training": f"{recipe} on {dataset}, route {spec.route}",
        "classes": f"{len(spec.classes)}: {classes}",
        "preprocessing": f"{size.height}×{size.width}, {size.interpolation}, {size.crop_mode} crop {size.crop_pct:g}, "
        f"mean {size.mean}, std {size.std}",
        "checkpoint": f"sha256 {spec.checkpoint_sha256 or 'unknown'}",
    }


if __name__ == "__main__":
    main()
