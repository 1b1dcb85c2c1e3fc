"""`advprop cache`: what is kept from earlier builds and calibrations, and making room."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from runtime.errors import OutputError
from runtime.system.console import cli_errors, set_up_logging

if TYPE_CHECKING:
    from runtime.system.cache import CacheEntry

EXAMPLES = """\b
Examples:
  advprop cache ls
  advprop cache prune                     down to ADVPROP_CACHE_GB, the oldest first
  advprop cache prune --max-gb 2
  advprop cache prune --all
  du -sh "$(advprop cache path)"
"""


@click.group("cache", epilog=EXAMPLES)
def main() -> None:
    """List what is cached (engines, calibration histograms), and make room.

    The folder is ADVPROP_CACHE, else advprop below XDG_CACHE_HOME or ~/.cache. Each kind is kept up to ADVPROP_CACHE_GB
    gigabytes (10), what was used longest ago going first; 0 keeps nothing.
    """


@main.command(epilog="\b\nExamples:\n  advprop cache path")
def path() -> None:
    """Print the cache's folder."""
    from runtime.system.files import cache_folder

    click.echo(cache_folder(""))


@main.command(epilog="\b\nExamples:\n  advprop cache ls")
@cli_errors
def ls() -> None:
    """List what is kept, the last used first."""
    found = _entries()
    if not found:
        click.echo("nothing is cached")
        return
    console = set_up_logging()
    from rich.table import Table

    table = Table("kind", "key", "what", "MB", "last used")
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_s))
        table.add_row(entry.kind, entry.key[:12], _what(entry), f"{entry.bytes / 1e6:.1f}", used)
    console.print(table)
    console.print(f"{len(found)} entries, {sum(entry.bytes for entry in found) / 1e6:.1f} MB", highlight=False)


@main.command(
    epilog="\b\nExamples:\n  advprop cache prune\n  advprop cache prune --max-gb 2\n  advprop cache prune --all"
)
@click.option(
    "--max-gb",
    type=click.FloatRange(min=0),
    metavar="GB",
    help="Size of the whole cache that may stay.  [default: ADVPROP_CACHE_GB, or 10]",
)
@click.option("--all", "everything", is_flag=True, help="Leave nothing.")
@cli_errors
def prune(max_gb: float | None, everything: bool) -> None:
    """Remove what was used longest ago, and what killed processes left behind."""
    from runtime.system import cache
    from runtime.system.files import cache_folder

    if everything and max_gb is not None:
        raise click.UsageError("--all leaves nothing; leave --max-gb out")
    limit = 0 if everything else cache.limit_bytes() if max_gb is None else int(max_gb * 1e9)
    try:
        for kind in cache.kinds():
            cache.remove_leftovers(cache_folder(kind))
        removed = cache.prune(_entries(), limit)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from error
    left = _entries()
    click.echo(
        f"removed {len(removed)} entries, {sum(entry.bytes for entry in removed) / 1e6:.1f} MB; "
        f"{len(left)} are left, {sum(entry.bytes for entry in left) / 1e6:.1f} MB"
    )


def _entries() -> list[CacheEntry]:
    from runtime.system import cache
    from runtime.system.files import cache_folder

    found = [entry for kind in cache.kinds() for entry in cache.entries(cache_folder(kind))]
    return sorted(found, key=lambda entry: -entry.used_s)


def _what(entry: CacheEntry) -> str:
    """An engine in a few words; its bytes are not checked."""
    sidecar = next((file for file in entry.files if file.name.endswith(".engine.json")), None)
    if sidecar is None:
        return "unfinished" if entry.kind == "engines" else ""
    try:
        content = json.loads(sidecar.read_text())
        arch = content["spec"]["arch"] if content["spec"] else "a network"
        targets = ", ".join(content["compute_capabilities"])
        return f"{arch} {content['precision']}, {content['flavor']} {content['version']}, {targets}"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"


if __name__ == "__main__":
    main()
