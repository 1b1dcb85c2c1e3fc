"""Reports as files: what they are is told by the ending of the name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import ConfigError
from runtime.evaluate.report.html import to_html
from runtime.evaluate.report.inputs import read_inputs
from runtime.evaluate.report.markdown import to_markdown
from runtime.evaluate.report.raw import to_csv
from runtime.evaluate.report.rows import Report, report_of
from runtime.system.files import output_dir, write_text

__all__ = ["check_outputs", "write_report"]

_WRITERS: dict[str, Callable[[Report], str]] = {
    ".html": to_html,
    ".htm": to_html,
    ".md": to_markdown,
    ".csv": to_csv,
}


def check_outputs(outputs: Sequence[Path]) -> None:
    """Makes the folders of files to write. Raises ConfigError of another ending, OutputError where none can be made."""
    for path in outputs:
        if path.suffix.lower() not in _WRITERS:
            raise ConfigError(f"a report is a .html, .md or .csv file; found {path}")
    for path in outputs:
        output_dir(path.parent)


def write_report(inputs: Sequence[Path], outputs: Sequence[Path]) -> Report:
    """Makes a report of results and writes it.

    The same inputs make the same bytes.

    Args:
        inputs: results of `advprop eval`, and files of latency and attacks; see `runtime.evaluate.report.measured`.
        outputs: `.html`, `.md` (Markdown) or `.csv` (the raw cells).

    Raises:
        ConfigError: an output of another kind.
        DataError: an input that is none of these or damaged, or results that contradict each other.
        OutputError: a place that cannot be written.
    """
    check_outputs(outputs)
    report = report_of(read_inputs(inputs))
    for path in outputs:
        write_text(path, _WRITERS[path.suffix.lower()](report))
    return report
