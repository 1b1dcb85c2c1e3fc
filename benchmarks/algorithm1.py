"""Verify that joint training steps equal separate ones, for one network of each timm module.

    python -m benchmarks.algorithm1 --all               67 networks, about 15 minutes on two cores
    python -m benchmarks.algorithm1 --nets resnet18 nextvit_small
    python -m benchmarks.algorithm1 --all --json results.jsonl     resumes an interrupted run

A training step of Algorithm 1 passes clean and adversarial images through the network together;
only the BatchNorms separate them. This script compares the step with two separate networks that run
the layers' own forward methods: logits, gradients of all parameters and running statistics, in both
memory layouts, in float32 and under bfloat16 autocast. It also compares the logits and the input
gradient of an attack with those of the network in evaluation mode. Dropout and stochastic depth are
off, weights are random, and 3 clean and 2 adversarial images have at least 64 px.

Each value is the largest difference of a tensor, relative to the tensor's largest magnitude. The
float32 limit is 1e-4. A network above it is compared again in float64: rounding errors shrink,
wrong values do not. The limit there is 1e-8, or four times the change of the separate steps when
each pixel changes by two units in its last place. The limit under autocast is 4 units of bfloat16
rounding (4 · 2^-8 = 1.6e-2), or twice the difference between the separate steps in bfloat16 and in
float32. The script exits with 1 if a value is above its limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from runtime.system.console import progress_bars, set_up_logging
from tests.support.algorithm1 import Comparison, Networks, compare_steps
from tests.support.batch_norm_networks import MORE, SMALLEST, image_size

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
HEADER = (
    "network",
    "px",
    "layout",
    "BN calls",
    "own forward",
    "logits",
    "gradients",
    "statistics",
    "attack",
    "AMP",
    "AMP rounding",
    "float64",
    "float64 rounding",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One network in one memory layout."""

    arch: str
    size: int
    layout: str
    comparison: Comparison

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(line: str) -> Row:
        content = json.loads(line)
        return Row(**content | {"comparison": Comparison(**content["comparison"])})

    def cells(self) -> Iterable[str]:
        found = self.comparison
        yield from (self.arch, str(self.size), self.layout, str(found.calls), str(found.calls - found.fast))
        yield from (f"{value:.1e}" for value in found.float32.values())
        yield f"{max(found.attack.values()):.1e}"
        yield f"{max(found.amp.values()):.1e}" + (f" ({found.broken} skipped)" if found.broken else "")
        yield f"{max(found.amp_rounding.values()):.1e}"
        for values in (found.float64, found.float64_rounding):
            yield "" if values is None else f"{max(values.values()):.1e}"


def measure(arch: str) -> list[Row]:
    size, networks = image_size(arch), Networks(arch)
    return [
        Row(arch=arch, size=size, layout=name, comparison=compare_steps(networks, size, layout))
        for name, layout in LAYOUTS.items()
    ]


def print_table(rows: Iterable[Row]) -> None:
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for row in rows:
        print(f"| {' | '.join(row.cells())} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet18", "nextvit_small"], help="networks, by timm's names")
    parser.add_argument("--all", action="store_true", help="one network of each module of timm, and eight more")
    parser.add_argument("--json", type=Path, help="file of JSON lines; networks in it are not measured again")
    arguments = parser.parse_args()
    set_up_logging()
    nets = [*SMALLEST.values(), *MORE] if arguments.all else arguments.nets
    known = arguments.json.read_text().splitlines() if arguments.json and arguments.json.exists() else []
    rows = [row for row in map(Row.from_json, known) if row.arch in nets]
    missing = [arch for arch in nets if arch not in {row.arch for row in rows}]
    with progress_bars() as bars:
        bar = bars.add_task("networks", total=len(missing))
        for arch in missing:
            bars.update(bar, description=arch)
            added = measure(arch)
            rows += added
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write("".join(row.to_json() + "\n" for row in added))
            bars.advance(bar)
    print_table(sorted(rows, key=lambda row: nets.index(row.arch)))
    faults = [f"{row.arch}, {row.layout}: {fault}" for row in rows for fault in row.comparison.faults]
    print("\n".join(["", *faults]) if faults else f"\nAll {len(rows)} comparisons are within their limits.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
