"""A run as a table: on the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["csv_of", "markdown_of", "notes_of", "table_of"]

_TIMES = ("count", "min_ms", "mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms", "cov_percent")
_HEADS = (
    "model",
    "batch",
    "callers",
    "compute p50",
    "p50",
    "p90",
    "p95",
    "p99",
    "CoV",
    "images/s",
    "time ÷ first's",
)
_PREDICT = ("predict", "decode", "transform", "run")


def table_of(result: Mapping[str, Any]) -> Table:
    """Returns the times end to end, with the network's own beside them."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), collapse_padding=True, caption="milliseconds, end to end")
    table.add_column("model", min_width=12, overflow="fold")
    for head in ("batch ×\ncallers", "compute\np50", *_HEADS[4:9], "images/s", "time ÷\nfirst's"):
        table.add_column(head, justify="right", overflow="fold")  # in a narrow terminal; no digit is lost
    for name, batch, callers, *cells in _rows(result):
        narrow = (cell.replace(" [", "\n[").replace(" %", "%") for cell in cells)
        table.add_row(escape(name), f"{batch}×{callers}", *map(escape, narrow))
    return table


def markdown_of(result: Mapping[str, Any]) -> str:
    """Returns a page: what took part, the table, the parts of `predict`, GPU times, and what to know."""
    machine, settings = result["machine"], result["settings"]
    place = f"{machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores; GPU: {machine['gpu'] or 'none'}"
    how = (
        f"{settings['rounds']} interleaved rounds, {settings['duration_s']:g} s and {settings['iterations']} calls at "
        f"the least, after {settings['warm_up_ms']:g} ms"
    )
    parts = [
        "# Latency and throughput",
        f"{place}. {how}. {result['began']}.",
        _models(result),
        "## End to end",
        "Milliseconds from host tensors in to host logits out; `compute` is the network alone. The ratio is of times "
        "in the same round, to the first model's; 95 % interval in brackets.",
        _markdown(_HEADS, _rows(result)),
        *_section(result, "## predict", "Encoded images to labels, p50 in milliseconds, and its parts.", _PREDICT),
        *_section(
            result, "## On the GPU", "p50 in milliseconds.", ("h2d", "compute", "d2h", "latency", "enqueue"), "h2d"
        ),
        "## To know",
        "\n".join(f"- {line}" for line in notes_of(result)) or "- nothing",
    ]
    return "\n\n".join(parts) + "\n"


def csv_of(result: Mapping[str, Any]) -> str:
    """Returns a row a model, batch size, number of callers and quantity."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ratio = ("ratio", "ratio_low", "ratio_high")
    writer.writerow(["model", "sha256", "batch_size", "concurrency", "quantity", "clock", *_TIMES, *ratio, "images_s"])
    hashes = {model["name"]: model.get("sha256", "") for model in result["models"]}
    for point in result["points"]:
        head = [point["model"], hashes[point["model"]], point["batch_size"], point["concurrency"]]
        for name, found in point["quantities"].items():
            compared = found.get("ratio", {})
            ratios = [compared.get(key, "") for key in ("median", "low", "high")]
            images = point["images_s"] if name == "end_to_end" else ""
            writer.writerow([*head, name, found["clock"], *(found[key] for key in _TIMES), *ratios, images])
    return file.getvalue()


def notes_of(result: Mapping[str, Any]) -> list[str]:
    """Returns what is said below the table: what is unknown, peers, warnings."""
    machine = result["machine"]
    frequency = [state["frequency_mhz"] for state in (machine["before"], machine["after"])]
    words = [f"{mhz:.0f}" if mhz else "unknown" for mhz in frequency]
    nominal = ", perhaps only nominal" if machine["before"]["frequency_source"] == "cpuinfo" else ""
    others = machine["others_share"]
    clocks = f"the CPU's clock, MHz: {words[0]} before, {words[1]} after{nominal}"
    load = ["other work on the cores is unknown"] if others is None else []
    peers = [f"{model['name']}: {model['peer']}" for model in result["models"] if "peer" in model]
    compute = {model["clock"] for model in result["models"]}
    return [*peers, f"compute is measured by {' or '.join(sorted(compute))}", clocks, *load, *result["warnings"]]


def _rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for point in result["points"]:
        found = point["quantities"]["end_to_end"]
        compute = point["quantities"].get("compute")
        times = (found[key] for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms"))
        rows.append(
            (
                str(point["model"]),
                str(point["batch_size"]),
                str(point["concurrency"]),
                _ms(compute["p50_ms"]) if compute else "",
                *map(_ms, times),
                f"{found['cov_percent']:.1f} %",
                f"{point['images_s']:.4g}" if point["images_s"] < 1000 else f"{point['images_s']:,.0f}",
                _ratio(found.get("ratio")),
            )
        )
    return rows


def _models(result: Mapping[str, Any]) -> str:
    heads = ("model", "SHA-256", "backend", "device", "precision", "settings")
    known = ("threads", "spin", "contexts", "cuda_graphs", "mode")
    rows = [
        (
            str(model["name"]),
            f"`{model['sha256'][:16]}`" if "sha256" in model else "",
            str(model["backend"]),
            str(model["device"]),
            str(model.get("precision", "")),
            ", ".join(f"{key} {model[key]}" for key in known if key in model),
        )
        for model in result["models"]
    ]
    return _markdown(heads, rows)


def _section(
    result: Mapping[str, Any], title: str, words: str, quantities: Sequence[str], needs: str = ""
) -> list[str]:
    """A table of some quantities' medians, where there are any."""
    rows = [
        (
            str(point["model"]),
            str(point["batch_size"]),
            *(_ms(point["quantities"][name]["p50_ms"]) for name in quantities),
        )
        for point in result["points"]
        if (needs or quantities[0]) in point["quantities"]
    ]
    return [title, words, _markdown(("model", "batch", *quantities), rows)] if rows else []


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(found: Mapping[str, float] | None) -> str:
    return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else ""
