"""Write results as a report: a self-contained HTML page, Markdown, or the raw cells as CSV.

inputs      reads the files, rows groups what can be compared, numbers computes
html, text  write; details and robustness are sections of the page; charts and markup draw them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import ConfigError
from runtime.evaluate.report.html import to_html
from runtime.evaluate.report.inputs import read_inputs
from runtime.evaluate.report.rows import Report, report_of
from runtime.evaluate.report.text import to_csv, to_markdown
from runtime.system.files import output_dir, write_text

__all__ = ["check_outputs", "write_report"]

_WRITERS: dict[str, Callable[[Report, str, str], str]] = {
    ".html": to_html,
    ".htm": to_html,
    ".md": to_markdown,
    ".csv": lambda report, title, date: to_csv(report),
}


def check_outputs(outputs: Sequence[Path]) -> None:
    """Check the suffixes of reports, and create their folders.

    Raises:
        ConfigError: a file has a suffix other than `.html`, `.md` or `.csv`.
        OutputError: a folder cannot be created or written.
    """
    for path in outputs:
        if path.suffix.lower() not in _WRITERS:
            raise ConfigError(f"expected a .html, .md or .csv file for the report; found {path}")
    for path in outputs:
        output_dir(path.parent)


def write_report(inputs: Sequence[Path], outputs: Sequence[Path], *, title: str = "", date: str = "") -> Report:
    """Write a report of results. The same inputs produce the same bytes.

    Args:
        inputs: results of `advprop eval`, and files with latencies and attacks, whose formats are
            described in `runtime.evaluate.report.inputs`.
        outputs: `.html`, `.md` (Markdown) or `.csv` (the raw cells).
        title: title of the page (default: the models and datasets).
        date: date in the title, such as "26 November 2026" (default: none).

    Raises:
        ConfigError: an output has an unsupported suffix.
        DataError: an input has an unsupported format or is damaged, or results contradict each
            other.
        OutputError: an output cannot be written.
    """
    check_outputs(outputs)
    report = report_of(read_inputs(inputs))
    for path in outputs:
        write_text(path, _WRITERS[path.suffix.lower()](report, title, date))
    return report
