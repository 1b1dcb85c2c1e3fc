"""The page: well-formed, self-contained, safe, readable, and showing a planted fault."""

import base64
import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from advprop.cli import main
from runtime.evaluate.models import load_model
from runtime.evaluate.report import write_report
from runtime.evaluate.report.markup import Markup, tag
from runtime.system.colors import DARK, LEVELS, LIGHT, contrast, heat
from tests.support.evaluation_sets import labeled_folder, one_pixel, toy
from tests.support.report_sets import (
    attack_file,
    bench_file,
    digit_folder,
    digit_net,
    quantized,
    results_of,
    with_fault,
)

EVIL = "=<script src=//x.example/a.js>alert(1)</script>\"'|`[a](http://x.example)\u202e\n& b"
VOID = {"br", "meta"}


class Parser(HTMLParser):
    """Checks that every element is closed in order, and collects tags and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a network in FP32, in INT8, and in INT8 with one layer's scale ×0.1."""
    folder = tmp_path_factory.mktemp("faulty")
    net = digit_net(folder / "net.onnx")
    int8 = quantized(net, digit_folder(folder / "calib", range(0, 480, 10)), folder / "net.int8.onnx")
    paths = [net, int8, with_fault(int8, folder / "net.fault.onnx")]
    models = [load_model(path, device="cpu", threads=1) for path in paths]
    data = digit_folder(folder / "val", range(1500, 1660))
    results = results_of(models, data, folder, only=("clean", "gaussian_noise", "contrast", "pixelate"))
    extra = []
    for place, (model, time) in enumerate(zip(models, (2.5, 1.2, 1.3), strict=True)):
        sha256 = str(model.facts["sha256"])
        extra.append(bench_file(folder / f"bench{place}.json", sha256, time))
        extra.append(attack_file(folder / f"attack{place}.json", sha256))
    outputs = ["-o", folder / "report.html", "-o", folder / "report.md", "-o", folder / "report.csv"]
    run = CliRunner().invoke(main, ["report", *map(str, [*results, *extra, *outputs])])
    assert run.exit_code == 0, run.output
    assert "imagenet-a" not in run.output  # the digits are not ImageNet's classes
    return folder / "report.html"


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_a_planted_fault_is_shown_with_an_interval_that_excludes_zero(faulty: Path) -> None:
    text = faulty.with_suffix(".md").read_text().replace("\\", "")
    found: dict[str, list[tuple[float, float, str]]] = {}
    for name in ("net.int8", "net.fault"):
        (line,) = [
            line for line in text.splitlines() if line.startswith(f"- **{name}** compared with net on corruptions")
        ]
        top1 = re.search(r"top-1 \S+ points \[([−+\d.]+), ([−+\d.]+)\] – \*\*([a-z ]+)\*\*", line)
        error = re.search(r"mean error \S+ points \[([−+\d.]+), ([−+\d.]+)\] – \*\*([a-z ]+)\*\*", line)
        assert top1 and error, line
        found[name] = [(number(match[1]), number(match[2]), match[3]) for match in (top1, error)]
    (low, high, word), (error_low, error_high, error_word) = found["net.fault"]
    assert low <= high < 0
    assert word == "worse"
    assert 0 < error_low <= error_high
    assert error_word == "worse"
    low, high, word = found["net.int8"][0]  # an INT8 model without a fault is not reported
    assert low <= 0 <= high
    assert word == "no difference shown"
    page = faulty.read_text()
    assert re.search(r"Δ −\d+\.\d \[−\d+\.\d, −\d+\.\d\]", page)


def test_the_page_is_well_formed_and_self_contained(faulty: Path) -> None:
    page = faulty.read_text()
    parser = parsed(page)
    names = [name for name, _ in parser.tags]
    for anchor in ("headline", "corruptions", "calibration", "trade-offs", "attacks", "provenance"):
        assert any(attributes.get("id") == anchor for _, attributes in parser.tags), anchor
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(names)
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page
    for name, attributes in parser.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("href", "src"):
            assert (attributes.get(key) or "#").startswith(("#", "data:text/csv")), (name, attributes)
        if name == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden")
        if name == "th":
            assert attributes.get("scope") in ("row", "col")
        if name == "section":
            assert attributes.get("aria-labelledby") == f"{attributes['id']}-heading"
    assert next(attributes for name, attributes in parser.tags if name == "html") == {"lang": "en"}
    anchors = {attributes.get("id") for _, attributes in parser.tags}
    links = [attributes["href"] for name, attributes in parser.tags if name == "a"]
    assert all(link[1:] in anchors for link in links if link and link.startswith("#"))
    assert "prefers-color-scheme:dark" in page
    text = "".join(parser.text)
    assert "ECE" in text
    assert "mCE (reference = 100)" in text
    assert "mCE (AlexNet" not in text
    assert "on faulty0/val" in text  # the title names the dataset, not its path
    assert str(faulty.parent) not in page
    assert "too few images to tell about accuracy" in text or "no accuracy lost that 160 images can show" in text
    assert {"0% wrong", "100% wrong", "confidence", "severity"} <= set(parser.text)


def test_the_page_contains_the_csv_file(faulty: Path) -> None:
    written = faulty.with_suffix(".csv").read_text()
    link = re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', faulty.read_text())
    assert link
    assert base64.b64decode(link[1]).decode() == written
    rows = list(csv.DictReader(io.StringIO(written)))
    assert len(rows) == 3 * 16
    for row in rows:
        assert float(row["error"]) == pytest.approx(1 - int(row["top1"]) / int(row["images"]), abs=1e-6)
        assert float(row["error_low"]) <= float(row["error"]) <= float(row["error_high"])
    assert {row["precision"] for row in rows} == {"fp32", "int8"}


def test_names_of_models_cannot_change_the_page(tmp_path: Path) -> None:
    models = [toy(EVIL), toy("b|c", predict=one_pixel)]
    data = labeled_folder(tmp_path / "set", count=4)
    results = results_of(models, data, tmp_path, only=("clean", "fog"))
    extra = [bench_file(tmp_path / "b.json", "b|c", 1.0, device=EVIL), attack_file(tmp_path / "a.json", EVIL, EVIL)]
    outputs = [tmp_path / f"r.{ending}" for ending in ("html", "md", "csv")]
    write_report([*results, *extra], outputs)
    page, markdown, cells = (path.read_text() for path in outputs)
    parser = parsed(page)
    assert not {"script", "img"} & {name for name, _ in parser.tags}
    assert "<script" not in page
    assert "\u202e" not in page + markdown + cells
    assert "=<script src=//x.example/a.js>alert(1)</script>" in "".join(parser.text)  # shown unchanged
    assert not re.search(r"(?<!\\)<script", markdown)
    assert not re.search(r"(?<!\\)\]\(", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tables[:4]}) == 1
    names = {row["model"] for row in csv.DictReader(io.StringIO(cells))}
    assert all(not name.startswith("=") for name in names)
    assert len(names) == 2


def test_equal_results_produce_equal_bytes(tmp_path: Path) -> None:
    results = results_of([toy("a")], labeled_folder(tmp_path / "set", count=2), tmp_path, "imagenet", compared=False)
    for name in ("one", "two"):
        write_report(results, [tmp_path / f"{name}.html"], title="Shop", date="1 May 2026")
    assert "<h1>Shop</h1>" in (tmp_path / "one.html").read_text()
    assert "1 May 2026" in (tmp_path / "one.html").read_text()
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_everything_except_markup_is_escaped() -> None:
    assert tag("p", "<&>", Markup("<br>"), class_='a"b', hidden=None) == '<p class="a&quot;b">&lt;&amp;&gt;<br></p>'
    assert tag("p", "a\x00\u202eb") == "<p>a��b</p>"
    assert tag("rect", x=1.50001, y=2) == '<rect x="1.5" y="2"></rect>'


def test_colors_have_enough_contrast() -> None:
    for palette in (LIGHT, DARK):
        for ground in ("page", "card"):
            for text in ("ink", "quiet", "link", "good", "bad"):
                assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
            for place in range(6):
                assert contrast(palette[f"s{place}"], palette[ground]) >= 3, (place, ground)
        for level in range(LEVELS):
            assert contrast(palette["ink"], heat(palette, level)) >= 4.5, level
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_errors_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    run = CliRunner().invoke(main, ["report", str(tmp_path / "x.json"), "-o", str(tmp_path / "r.html")])
    assert run.exit_code == 2
    assert "error: " in run.stderr
    assert "found None" in run.stderr
    assert not (tmp_path / "r.html").exists()
    for arguments, message in (
        (["-o", "r.html"], "expected results of advprop eval, or --from"),
        (["x.json", "-o", "r.html", "--limit", "3"], "--limit requires --from CHECKPOINT"),
        (["--from", "x.pt", "-o", "r.html"], "--from requires --data DIR"),
    ):
        run = CliRunner().invoke(main, ["report", *arguments])
        assert run.exit_code == 2
        assert message in run.stderr


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium browser")
@pytest.mark.parametrize(("name", "width", "scheme"), [("light", 1200, 1), ("dark", 1200, 0), ("phone", 500, 1)])
def test_a_browser_shows_the_page(faulty: Path, tmp_path: Path, name: str, width: int, scheme: int) -> None:
    assert BROWSER
    shot = tmp_path / f"{name}.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'u'}"]
    options += [f"--window-size={width},1400", f"--blink-settings=preferredColorScheme={scheme}"]
    command = [BROWSER, *options, f"--screenshot={shot}", faulty.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (1400, width)
    dark = scheme == 0
    assert (np.median(pixels) < 60) == dark  # the page's background
    ink = np.abs(pixels.astype(int) - int(np.median(pixels))) > 60
    rows = ink.any(1)
    assert 0.01 < ink.mean() < 0.3
    assert rows[:700].mean() > 0.4  # there is content from top to bottom
    assert rows[700:].mean() > 0.4
