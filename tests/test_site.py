"""The documentation site: generated tables agree with the code, and links, messages and variables exist."""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest
from mkdocs.exceptions import PluginError

from advprop.cli import COMMANDS
from runtime import errors
from runtime.system.colors import DARK, LIGHT, contrast
from scripts.site_hooks import DRAWINGS, check_page, complete, package_page
from scripts.site_tables import TABLES, command_page
from tests.support import ROOT
from train.config import AttackConfig, DataConfig, OptimConfig, TrainConfig

PACKAGES = ("advprop", "train", "export", "calib", "runtime")
DOCUMENTS = sorted((ROOT / "docs").rglob("*.md"))


def rows(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@functools.cache
def sources() -> dict[Path, list[ast.AST]]:
    """Return the syntax of every file of the packages."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path: list(ast.walk(ast.parse(path.read_text()))) for path in paths}


def test_the_settings_of_training_are_complete() -> None:
    text = TABLES["training settings"]()
    parts = {"": TrainConfig, "data.": DataConfig, "attack.": AttackConfig, "optim.": OptimConfig}
    expected = {
        prefix + field.name
        for prefix, kind in parts.items()
        for field in dataclasses.fields(kind)
        if field.name not in ("data", "attack", "optim")
    }
    assert set(re.findall(r"^\| `([\w.]+)`", text, re.M)) == expected
    assert "| `epochs`<br>`--epochs` | integer from 1 to 1000000 |  | Passes over the training images" in text
    assert "| `amp`<br>`--amp` | `none`, `bf16`, `fp16` | `none` |" in text
    assert "| `data.root`<br>`--data` | path |" in text


def test_the_exit_codes_are_complete() -> None:
    text = TABLES["exit codes"]()
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, errors.AdvPropError):
            (row,) = (row for row in rows(text) if f"`{name}`" in row[1])
            assert int(row[0]) == kind.exit_code


def test_every_command_has_a_page_with_all_of_its_options() -> None:
    for name in COMMANDS:
        page = command_page(name)
        assert page.startswith(f"# advprop {name}\n"), name
        assert "`-h, --help`" in page, name
    page = command_page("eval")
    assert "## Ray" in page or "--ray" in page
    assert "```sh\nadvprop eval model.onnx --suite imagenet --data imagenet/val\n" in page
    assert "# advprop cache" in command_page("cache")
    assert "## advprop cache prune" in command_page("cache")


def test_the_page_of_a_package_documents_each_object_once() -> None:
    assert "::: train.loop.fit\n    options:\n      heading: advprop.fit\n" in package_page("advprop")
    train = package_page("train")
    assert "::: train.loop.fit" not in train
    assert "[`train.fit`][train.loop.fit], the same as `advprop.fit`" in train
    assert "::: train.task.AdvPropTask" in train


def environment_variables() -> set[str]:
    """Return the names of environment variables that the packages read or set."""
    found = set()
    for path, nodes in sources().items():
        for node in nodes:
            name = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                name = node.slice
            elif isinstance(node, ast.Call) and re.match(r"os\.(environ\.\w+|getenv)$", ast.unparse(node.func)):
                name = node.args[0]
            if name is not None:
                assert isinstance(name, ast.Constant), f"{path}: {ast.unparse(node)}"
                found.add(str(name.value))
    return found


def test_the_environment_variables_are_complete() -> None:
    text = (ROOT / "docs" / "reference" / "environment.md").read_text().partition("## Variables of libraries")[0]
    documented = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+|RANK)(?:=\d)?`", text))
    assert documented - {"XDG_CACHE_HOME"} == environment_variables()


def messages_in_code() -> str:
    """Return all texts in the code, with … in place of values."""
    texts = []
    for nodes in sources().values():
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%(\.\d)?[sdf]", "…", node.value).replace("%%", "%"))
    return "\n".join(texts)


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [
        message
        for table in text.split("\n## ")
        if "| message |" in table
        for row in rows(table)
        for message in re.findall(r"`([^`]+)`", row[0])
    ]
    assert len(messages) >= 20
    code = messages_in_code()
    for message in messages:
        for part in message.strip("…").split("…"):
            assert part.strip() in code or part.strip(" ;?") in code, message


def test_schemas_in_the_table_of_files_exist() -> None:
    linked = set(re.findall(r"\.\./schemas/(\w+)\.json", (ROOT / "docs" / "reference" / "files.md").read_text()))
    assert linked == {path.stem for path in (ROOT / "docs" / "schemas").glob("*.json")}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_the_site_hold(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = re.findall(r"(?:\]\(|srcset=\"|src=\")((?!https?:)[^)\"#]+)", text)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_code_refers_to_documents_that_exist() -> None:
    folders = [ROOT / name for name in (*PACKAGES, "benchmarks", "scripts", "examples", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", "")]
    texts = [(path, path.read_text(errors="ignore")) for path in files if path.is_file()]
    named = {(path.name, found) for path, text in texts for found in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg)", text)}
    assert len(named) > 5
    generated = {"docs/ContribOperators.md"}  # of ONNX Runtime
    assert [(path, found) for path, found in named if found not in generated and not (ROOT / found).exists()] == []


def test_every_page_starts_with_its_only_title() -> None:
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
        if "--8<--" not in text:
            assert len(re.findall(r"^# ", text, re.M)) == 1, path


def test_drawings_become_part_of_the_page() -> None:
    for name in DRAWINGS:
        page = complete(f"# A\n\n![A drawing](../images/{name}.svg)\n")
        assert re.search(r'<svg role="(img|group)" aria-label="A drawing"', page)
        assert "<style>" not in page  # the site's own style follows its light or dark mode
    with pytest.raises(AssertionError, match="no such table"):
        complete("<!-- generated: nothing -->")


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://unpkg.com/a.js"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<img src="http://example.com/a.png">',
    ],
)
def test_a_page_that_loads_something_from_another_host_fails_the_build(element: str) -> None:
    check_page('<a href="https://example.com">a link</a><script src="assets/a.js"></script>', "a.html")
    with pytest.raises(PluginError, match=r"a\.html loads"):
        check_page(f"<html>{element}</html>", "a.html")


def test_the_navigation_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"^ +- (?:[^#\n]*: )?([\w/-]+\.md)$", nav, re.M))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in DOCUMENTS}
    assert pages <= listed
    generated = {f"reference/python/{name}.md" for name in PACKAGES}
    assert listed - pages <= generated


def test_the_site_has_the_colors_of_reports() -> None:
    style = (ROOT / "docs" / "style.css").read_text()
    for scheme, palette in (("default", LIGHT), ("slate", DARK)):
        rules = style[style.index(f'[data-md-color-scheme="{scheme}"]') :].partition("}")[0]
        found = dict(re.findall(r"--([\w-]+): (#\w+)", rules))
        assert (found["md-typeset-a-color"], found["main"], found["aux"], found["ink"]) == tuple(
            palette[name] for name in ("link", "s0", "s1", "ink")
        )
        for fill in ("main-fill", "aux-fill", "box"):
            assert contrast(found["ink"], found[fill]) >= 4.5
            assert contrast(found["quiet"], found[fill]) >= 4.5


@pytest.mark.parametrize("section", ["how-to", "tutorials", "explanation", "results"])
def test_every_page_is_two_clicks_from_the_start(section: str) -> None:
    index = (ROOT / "docs" / section / "index.md").read_text()
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", index)}
    assert {path.name for path in (ROOT / "docs" / section).glob("*.md")} - {"index.md"} <= linked
