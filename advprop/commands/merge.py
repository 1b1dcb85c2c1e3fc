"""`advprop eval-merge`: shards of an evaluation put together."""

from __future__ import annotations

from pathlib import Path

import click

from runtime.system.console import cli_errors, set_up_logging

EXAMPLES = """\b
Examples:
  advprop eval-merge evaluation/model.corruptions.*of4.json --out evaluation/model.corruptions.json
"""


@click.command("eval-merge", epilog=EXAMPLES)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT...")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The whole result.")
@cli_errors
def main(results: tuple[Path, ...], out: Path) -> None:
    """Put RESULTs of the same model and suite together: shards, or cells that were measured apart.

    The whole has the very bytes that one run would have written.
    """
    console = set_up_logging()
    from runtime.evaluate import merge, read_result, result_notes, result_table, write_result

    whole = merge([read_result(path) for path in results])
    write_result(out, whole)
    console.print(result_table([whole]))
    for line in (*result_notes([whole]), f"wrote {out}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
