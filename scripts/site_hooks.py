"""MkDocs hooks of the documentation site: generated pages, generated tables, and drawings inside the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs imports this file by its path

from advprop.cli import COMMANDS  # noqa: E402
from scripts.site_tables import TABLES, command_page  # noqa: E402

PACKAGES = ("advprop", "runtime", "train", "export", "calib")
DRAWINGS = ("attack", "choose", "pipeline", "routed_bn")
"""SVG files in docs/images/ that become part of the page, so they follow its light or dark mode."""

SEARCH_BOOSTS = {
    "troubleshooting.md": 4,
    "how-to/": 3,
    "tutorials/": 2,
    "start/": 2,
    "results/": 0.5,
    "reference/python/": 0.5,
    "changelog.md": 0.2,
    "contributing.md": 0.2,
}
"""Start of a page's path → its weight in the search: answers before numbers and signatures."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put one entry per command into the navigation."""
    pages = ["reference/commands/index.md"]
    pages += [f"reference/commands/{name}.md" for name in COMMANDS]
    config.nav = _replaced(config.nav, "COMMANDS", pages)
    return config


def _replaced(item: Any, marker: str, value: Any) -> Any:
    """Return a copy of nested lists and dicts in which `value` replaces `marker`."""
    if isinstance(item, list):
        return [_replaced(part, marker, value) for part in item]
    if isinstance(item, dict):
        return {name: _replaced(part, marker, value) for name, part in item.items()}
    return value if item == marker else item


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the commands and of the Python packages."""
    pages = {f"reference/commands/{name}.md": command_page(name) for name in COMMANDS}
    pages["reference/commands/index.md"] = f"# Commands\n\n{TABLES['commands']()}".replace("](commands/", "](")
    pages |= {f"reference/python/{name}.md": package_page(name) for name in PACKAGES}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def package_page(name: str) -> str:
    """Return the page of a package: its public names, each documented once, on the first page that has it."""
    package = griffe.load(name, search_paths=[str(ROOT)])
    assert isinstance(package, griffe.Module)
    known = {} if name == "advprop" else {path: public for public, path in public_names("advprop").items()}
    entries, links = [], []
    for public, path in public_names(name).items():
        if path == "runtime.errors":
            links.append(f"- `{name}.errors`: the errors of [exit codes](../exit_codes.md)")
        elif path in known:
            links.append(f"- [`{name}.{public}`][{path}], the same as `advprop.{known[path]}`")
        else:
            entries.append(f"::: {path}\n    options:\n      heading: {name}.{public}\n      toc_label: {public}\n")
    also = ["## Also in this package\n", *links, ""] if links else []
    return "\n".join([f"# {name}\n", package.docstring.value if package.docstring else "", "", *also, *entries])


def public_names(name: str) -> dict[str, str]:
    """Return the public names of a package → the paths where they are defined."""
    package = griffe.load(name, search_paths=[str(ROOT)])
    assert isinstance(package, griffe.Module)
    objects = {str(public): package[str(public)] for public in package.exports or ()}
    return {
        public: target.target_path if isinstance(target, griffe.Alias) else target.path
        for public, target in sorted(objects.items())
    }


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Set the weight of a page in the search, and complete its text."""
    found = [boost for start, boost in SEARCH_BOOSTS.items() if page.file.src_uri.startswith(start)]
    page.meta.setdefault("search", {"boost": found[0] if found else 1})
    return complete(markdown)


def complete(markdown: str) -> str:
    """Insert the generated tables and the drawings."""
    for name, table in TABLES.items():
        marker = f"<!-- generated: {name} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, table())
    left = re.findall(r"<!-- generated: .*? -->", markdown)
    assert not left, f"no such table: {left[0]}"
    return re.sub(r"^!\[(.*?)\]\([./]*images/(\w+)\.svg\)$", _drawing, markdown, flags=re.M)


def _drawing(image: re.Match[str]) -> str:
    alternative, name = image[1], image[2]
    if name not in DRAWINGS:
        return image[0]
    svg = (ROOT / "docs" / "images" / f"{name}.svg").read_text()
    svg = re.sub(r"<style>.*?</style>\s*", "", svg, flags=re.S)
    svg = re.sub(r"\n\s*\n", "\n", svg).strip()
    role = "group" if "<a " in svg else "img"  # links in a picture can be reached with the keyboard
    figure = svg.replace("<svg ", f'<svg role="{role}" aria-label="{alternative}" ', 1)
    return f'<div class="drawing" tabindex="0">\n{figure}\n</div>'


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Check that a page loads nothing from other hosts, and complete its labels for screen readers."""
    check_page(output, page.file.dest_uri)
    return with_labels(output)


def with_labels(output: str) -> str:
    """Add the names that the theme's search dialog and the parts of its navigation lack."""
    output = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    title = r'<label class="md-nav__title" for="{}">\s*<span class="md-nav__icon md-icon"></span>\s*(.*?)\s*</label>'

    def labeled(nav: re.Match[str]) -> str:
        found = re.search(title.format(nav[1]), output, re.S)
        return f'aria-label="{found[1]}"' if found else nav[0]

    return re.sub(r'aria-labelledby="(__nav_[\d_]+)_label"', labeled, output)


def check_page(output: str, name: str) -> None:
    """Raise PluginError if a page loads a script, style, font or picture from another host."""
    found = re.search(r"<(?:script|img|source|iframe)\b[^>]*\bsrc=\"?(https?:[^\s\">]+)", output)
    found = found or re.search(r"<link\b(?=[^>]*stylesheet|[^>]*preconnect)[^>]*\bhref=\"?(https?:[^\s\">]+)", output)
    if found:
        raise PluginError(f"{name} loads {found[1]}; the site must not load anything from other hosts")
