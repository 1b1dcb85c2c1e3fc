"""`advprop doctor`: check what works on this machine."""

from __future__ import annotations

import dataclasses
import sys

import click

from runtime.system.command import Command, json_option, with_options
from runtime.system.console import print_json, print_lines, set_up_logging

EXAMPLES = """
Examples:
  advprop doctor
  advprop doctor --json

Exit codes: 0 models can run here; 3 they cannot.
"""

_COLORS = {"ok": "green", "missing": "yellow", "broken": "red"}


@click.command("doctor", cls=Command, epilog=EXAMPLES)
@with_options(json_option("a JSON array with one object per check"))
def main(as_json: bool) -> None:
    """Check which backends work on this machine, why the others do not, and how to fix them."""
    console = set_up_logging()
    from advprop.doctor import run_checks, summarize

    findings = run_checks()
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings.values()])
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in findings.values():
            state = Text(finding.state, _COLORS[finding.state])
            table.add_row(state, finding.part, finding.found)
        console.print(summarize(findings), "", table, sep="\n", highlight=False)
        fixes = [f"{finding.part}: {finding.fix}" for finding in findings.values() if finding.fix]
        if fixes:
            print_lines(console, ["", "To fix what is missing or broken:", *fixes])
    sys.exit(0 if findings["onnxruntime"].state == "ok" else 3)


if __name__ == "__main__":
    main()
