"""A run as a table for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["csv_of", "markdown_of", "notes_of", "table_of"]

_STATISTICS = ("count", "min_ms", "mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms", "cov_percent")
_PREDICT = ("predict", "decode", "transform", "run")
_ON_GPU = ("h2d", "compute", "d2h", "latency", "enqueue")


class _Row(NamedTuple):
    """A row of the table, as text."""

    model: str
    batch: str
    callers: str
    compute: str
    p50: str
    p90: str
    p95: str
    p99: str
    cov: str
    throughput: str
    ratio: str
    ratio_interval: str


def table_of(result: Mapping[str, Any]) -> Table:
    """Return a table of the end-to-end times, and the network's own time."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), collapse_padding=True, caption="milliseconds, end to end")
    table.add_column("model", min_width=12, overflow="fold")
    heads = ("batch ×\ncallers", "compute\np50", "p50", "p90", "p95", "p99", "CoV, %", "images/s", "time ÷\nfirst")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")  # a narrow terminal must not hide digits
    for row in _rows(result):
        times = (row.compute, row.p50, row.p90, row.p95, row.p99, row.cov, row.throughput)
        ratio = f"{row.ratio}\n{row.ratio_interval}".rstrip()
        table.add_row(*map(Text, (row.model, f"{row.batch}×{row.callers}", *times, ratio)))
    return table


def markdown_of(result: Mapping[str, Any]) -> str:
    """Return a page with the models, the table, the parts of `predict`, GPU times and notes."""
    machine, settings = result["machine"], result["settings"]
    place = f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores; GPU: {machine['gpu'] or 'none'}"
    how = (
        f"{settings['rounds']} interleaved rounds, at least {settings['duration_s']:g} s and {settings['iterations']} "
        f"calls per quantity, after {settings['warm_up_ms']:g} ms of warm-up"
    )
    heads = (
        "model",
        "batch",
        "callers",
        "compute p50",
        "p50",
        "p90",
        "p95",
        "p99",
        "CoV, %",
        "images/s",
        "time ÷ first",
    )
    rows = [[*row[:-2], f"{row.ratio} {row.ratio_interval}".rstrip()] for row in _rows(result)]
    parts = [
        "# Latency and throughput",
        f"{place}. {how}. {result['began']}.",
        _models(result),
        "## End to end",
        "Milliseconds from host tensors to host logits; `compute` is the network alone. The last column is the time "
        "relative to the first model in the same round, with its 95% interval in brackets.",
        _markdown(heads, rows),
        *_section(result, "## predict", "Encoded images to labels and its parts, p50 in milliseconds.", _PREDICT),
        *_section(result, "## On the GPU", "p50 in milliseconds.", _ON_GPU),
        "## Notes",
        "\n".join(f"- {line}" for line in notes_of(result)),
    ]
    return "\n\n".join(parts) + "\n"


def csv_of(result: Mapping[str, Any]) -> str:
    """Return one row per model, batch size, number of callers and quantity."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ratio = ("ratio", "ratio_low", "ratio_high")
    writer.writerow(
        ["model", "sha256", "batch_size", "concurrency", "quantity", "clock", *_STATISTICS, *ratio, "images_s"]
    )
    hashes = {model["name"]: model.get("sha256", "") for model in result["models"]}
    for point in result["points"]:
        head = [point["model"], hashes[point["model"]], point["batch_size"], point["concurrency"]]
        for name, found in point["quantities"].items():
            compared = found.get("ratio", {})
            ratios = [compared.get(key, "") for key in ("median", "low", "high")]
            images = point["images_s"] if name == "end_to_end" else ""
            writer.writerow([*head, name, found["clock"], *(found[key] for key in _STATISTICS), *ratios, images])
    return file.getvalue()


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Return the notes below the table: peers, clocks, unknown values, and warnings."""
    machine = result["machine"]
    frequency = [state["frequency_mhz"] for state in (machine["before"], machine["after"])]
    before, after = (f"{mhz:.0f}" if mhz else "unknown" for mhz in frequency)
    nominal = " (may be nominal)" if machine["before"]["frequency_source"] == "cpuinfo" else ""
    clocks = f"CPU clock in MHz: {before} before the run, {after} after it{nominal}"
    load = ["the CPU usage of other processes is unknown"] if machine["others_share"] is None else []
    peers = [f"{model['name']}: {model['peer']}" for model in result["models"] if "peer" in model]
    compute = sorted({model["clock"] for model in result["models"]})
    return [*peers, f"compute is measured with {' or '.join(compute)}", clocks, *load, *result["warnings"]]


def _rows(result: Mapping[str, Any]) -> list[_Row]:
    rows = []
    for point in result["points"]:
        found = point["quantities"]["end_to_end"]
        compute, ratio = point["quantities"].get("compute"), found.get("ratio")
        rows.append(
            _Row(
                str(point["model"]),
                str(point["batch_size"]),
                str(point["concurrency"]),
                _ms(compute["p50_ms"]) if compute else "",
                _ms(found["p50_ms"]),
                _ms(found["p90_ms"]),
                _ms(found["p95_ms"]),
                _ms(found["p99_ms"]),
                f"{found['cov_percent']:.1f}",
                f"{point['images_s']:.4g}" if point["images_s"] < 1000 else f"{point['images_s']:,.0f}",
                f"{ratio['median']:.3f}" if ratio else "",
                f"[{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else "",
            )
        )
    return rows


def _models(result: Mapping[str, Any]) -> str:
    heads = ("model", "SHA-256", "backend", "device", "precision", "settings")
    settings = ("threads", "spin", "contexts", "cuda_graphs", "mode")
    rows = [
        (
            str(model["name"]),
            f"`{model['sha256'][:16]}`" if "sha256" in model else "",
            str(model["backend"]),
            str(model["device"]),
            str(model.get("precision", "")),
            ", ".join(f"{key} {model[key]}" for key in settings if key in model),
        )
        for model in result["models"]
    ]
    return _markdown(heads, rows)


def _section(result: Mapping[str, Any], title: str, text: str, quantities: Sequence[str]) -> list[str]:
    """Return a table of the medians of quantities, if any point has all of them."""
    rows = [
        (
            str(point["model"]),
            str(point["batch_size"]),
            *(_ms(point["quantities"][name]["p50_ms"]) for name in quantities),
        )
        for point in result["points"]
        if all(name in point["quantities"] for name in quantities)
    ]
    return [title, text, _markdown(("model", "batch", *quantities), rows)] if rows else []


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
