"""`advprop doctor`: what works on this machine."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

from runtime.system.console import cli_errors, set_up_logging

EXAMPLES = """\b
Examples:
  advprop doctor
  advprop doctor --json

\b
Exit codes: 0 models can be run here; 3 they cannot.
"""


@click.command("doctor", epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="A JSON array, one object a part.")
@cli_errors
def main(as_json: bool) -> None:
    """Say which backends work on this machine, why the others do not, and what mends it."""
    console = set_up_logging()
    from advprop.doctor import run_checks

    findings = run_checks()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings.values()], indent=1))
    else:
        from rich.markup import escape
        from rich.table import Table

        table = Table("part", "state", "found", "what mends it")
        colors = {"ok": "green", "missing": "yellow", "broken": "red"}
        for finding in findings.values():
            state = f"[{colors[finding.state]}]{finding.state}[/]"
            table.add_row(finding.part, state, escape(finding.found), escape(finding.fix))
        console.print(table)
    sys.exit(0 if findings["onnxruntime"].state == "ok" else 3)


if __name__ == "__main__":
    main()
