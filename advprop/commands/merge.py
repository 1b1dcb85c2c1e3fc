"""`advprop eval-merge`: merge the shards of an evaluation."""

from __future__ import annotations

from pathlib import Path

import click

from advprop.commands.evaluate import show_results
from runtime.system.command import Command, json_option, out_option, with_options
from runtime.system.console import set_up_logging

EXAMPLES = """
Examples:
  advprop eval-merge evaluation/model.corruptions.*of4.json --out evaluation/model.corruptions.json
"""


@click.command("eval-merge", cls=Command, epilog=EXAMPLES)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT...")
@with_options(
    out_option("Merged result to write.", "FILE", required=True),
    json_option(),
)
def main(results: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Merge RESULTs of one model and suite: shards, or cells that were measured separately.

    The merged file is identical, byte for byte, to the result of a single run.
    """
    console = set_up_logging()
    from runtime.evaluate import merge, read_result, write_result

    whole = merge([read_result(path) for path in results])
    write_result(out, whole)
    show_results(console, [whole], [out], as_json)


if __name__ == "__main__":
    main()
