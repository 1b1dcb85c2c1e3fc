"""What a calibration did, for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from calib.pipeline import CalibratedFile

__all__ = ["print_calibration"]


def print_calibration(console: Console, source: str, target: Path, result: CalibratedFile) -> None:
    """Prints every layer, where it computes and why, and what that costs.

    Args:
        console: where to.
        source: what the float32 file is called.
        target: the INT8 file.
        result: what was written.
    """

    calibrated = result.calibrated
    noise = {layer.node: f"{layer.noise:.1e}" for layer in calibrated.layers}
    total = max(sum(point.macs for point in calibrated.points), 1)
    table = Table(box=None)
    for heading in ("layer", "operator", "MACs", "in", "noise", "why"):
        table.add_column(heading, justify="right" if heading in ("MACs", "noise") else "left", overflow="fold")
    for point in calibrated.points:
        share, where = f"{point.macs / total:.1%}", "INT8" if point.int8 else "float"
        why = "" if point.int8 else point.reason
        table.add_row(point.node, point.op, share, where, noise.get(point.node, ""), why)
    console.print(table)
    counts = Counter(point.int8 for point in calibrated.points)
    lines = [
        f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB): {counts[True]} of {counts.total()} layers in INT8, "
        f"{calibrated.int8_share:.1%} of the MACs; top-1 agreement with {source} on {result.parity_images} images "
        f"{result.agreement:.1%}"
    ]
    fallback = calibrated.fallback
    if fallback:
        losses = ", ".join(f"{100 * loss:.2f} ({kind})" for kind, loss in fallback.chosen.losses.items())
        verdict = "met" if fallback.met else "NOT met"
        lines.append(
            f"budget of {100 * fallback.budget:.2f} points {verdict}: expected loss {losses} "
            f"on {len(result.images.held)} held-out images; {len(fallback.chosen.floating)} layers given back"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
