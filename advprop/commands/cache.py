"""`advprop cache`: list and prune cached engines and calibration histograms."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING

import click

from runtime.errors import OutputError
from runtime.system.command import Command, Group, json_option, with_options
from runtime.system.console import print_json, set_up_logging

if TYPE_CHECKING:
    from runtime.system.cache import CacheEntry

EXAMPLES = """
Examples:
  advprop cache ls
  advprop cache prune                     down to ADVPROP_CACHE_GB, oldest first
  advprop cache prune --max-gb 2
  advprop cache prune --all
  du -sh "$(advprop cache path)"
"""


@click.group("cache", cls=Group, epilog=EXAMPLES)
def main() -> None:
    """List and prune cached engines and calibration histograms.

    The cache is the folder ADVPROP_CACHE (default: advprop in XDG_CACHE_HOME or ~/.cache). Each
    kind of entry may occupy ADVPROP_CACHE_GB gigabytes (default: 10); the least recently used
    entries are removed first. 0 disables the cache.
    """


@main.command(cls=Command, epilog="Examples:\n  advprop cache path")
def path() -> None:
    """Print the cache's folder."""
    from runtime.system.files import cache_folder

    click.echo(cache_folder(""))


@main.command(cls=Command, epilog="Examples:\n  advprop cache ls\n  advprop cache ls --json")
@with_options(json_option("a JSON array with one object per entry"))
def ls(as_json: bool) -> None:
    """List cached entries, most recently used first."""
    found = _entries()
    if as_json:
        rows = [dataclasses.asdict(entry) | {"content": _content(entry)} for entry in found]
        print_json(rows)
        return
    if not found:
        click.echo("the cache is empty")
        return
    console = set_up_logging()
    from rich.table import Table

    table = Table("kind", "key", "content", "MB", "last used")
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_s))
        table.add_row(entry.kind, entry.key[:12], _content(entry), f"{entry.bytes / 1e6:.1f}", used)
    console.print(table)
    console.print(f"{len(found)} entries, {sum(entry.bytes for entry in found) / 1e6:.1f} MB", highlight=False)


@main.command(
    cls=Command,
    epilog="Examples:\n  advprop cache prune\n  advprop cache prune --max-gb 2\n  advprop cache prune --all",
)
@click.option(
    "--max-gb",
    type=click.FloatRange(min=0),
    metavar="GB",
    help="Size to shrink the cache to, in gigabytes (default: ADVPROP_CACHE_GB, or 10).",
)
@click.option("--all", "everything", is_flag=True, help="Remove all entries.")
def prune(max_gb: float | None, everything: bool) -> None:
    """Remove the least recently used entries, and incomplete files."""
    from runtime.system import cache
    from runtime.system.files import cache_folder

    if everything and max_gb is not None:
        raise click.UsageError("--all removes every entry; remove --max-gb")
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
        f"{len(left)} remain, {sum(entry.bytes for entry in left) / 1e6:.1f} MB"
    )


def _entries() -> list[CacheEntry]:
    from runtime.system import cache
    from runtime.system.files import cache_folder

    found = [entry for kind in cache.kinds() for entry in cache.entries(cache_folder(kind))]
    return sorted(found, key=lambda entry: -entry.used_s)


def _content(entry: CacheEntry) -> str:
    """Describe an engine by its sidecar, without checking its bytes."""
    from runtime.engine.flavors import describe_targets

    sidecar = next((file for file in entry.files if file.name.endswith(".engine.json")), None)
    if sidecar is None:
        return "incomplete" if entry.kind == "engines" else ""
    try:
        content = json.loads(sidecar.read_text())
        arch = content["spec"]["arch"] if content["spec"] else "network without a spec"
        targets = describe_targets(content["compute_capabilities"])
        return f"{arch} {content['precision']}, {content['flavor']} {content['version']}, {targets}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "damaged"


if __name__ == "__main__":
    main()
