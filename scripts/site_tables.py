"""Write the generated parts of the documentation site as Markdown: commands, settings, exit codes, columns.

Everything is read from the code, so the site cannot contradict it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import click

from advprop.cli import COMMANDS
from advprop.cli import main as group
from runtime import errors
from train import config, reporting
from train.limits import limits_of
from train.run import OPTIONS
from train.run import main as train_command

__all__ = ["TABLES", "command_page"]

_GAP = re.compile(r"(?<=\S) {2,}(?=\S)")


def command_page(name: str) -> str:
    """Return the page of one command of `advprop`."""
    root = click.Context(group, info_name="advprop")
    command = group.get_command(root, name)
    assert command is not None
    return "\n".join(_command(command, _context(command, name, root), 1))


def _context(command: click.Command, name: str, parent: click.Context) -> click.Context:
    return click.Context(command, info_name=name, parent=parent, **command.context_settings)


def _command(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    yield f"{'#' * level} {context.command_path}\n"
    yield _markdown_text(inspect.cleandoc(command.help or "")) + "\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```console\n{context.command_path} {usage}\n```\n"
    yield from _notes(command.epilog or "", level + 1)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _command(child, _context(child, name, context), level + 1)
    for title, records in _option_groups(command, context).items():
        yield f"{'#' * (level + 1)} {title}\n"
        yield "| option | effect |\n|---|---|"
        yield from (f"| `{_cell(option)}` | {_cell(_markdown_text(text))} |" for option, text in records)
        yield ""


def _option_groups(command: click.Command, context: click.Context) -> dict[str, list[tuple[str, str]]]:
    """Return (option, help) pairs by the headings of the help page; general options are last."""
    general = ("--quiet", "--verbose", "--version", "--help")
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(context):
        record = param.get_help_record(context) if isinstance(param, click.Option) else None
        if record:
            title = "General" if param.opts[-1] in general else getattr(param, "group", "") or "Options"
            groups.setdefault(title, []).append(record)
    last = groups.pop("General", None)
    return groups | ({"General options": last} if last else {})


def _notes(notes: str, level: int) -> Iterator[str]:
    """Yield the notes at the end of a help page: examples as commands, lists as tables, prose."""
    for paragraph in notes.strip().split("\n\n"):
        title, *rows = paragraph.splitlines()
        if title == "Examples:":
            yield f"{'#' * level} Examples\n\n```sh"
            for row in rows:
                text, *comment = _GAP.split(row.strip(), maxsplit=1)
                yield from (f"# {line}" for line in comment)
                yield text
            yield "```\n"
        elif rows and all(_GAP.search(row.strip()) for row in rows):
            yield f"{'#' * level} {title.removesuffix(':')}\n\n| | |\n|---|---|"
            for row in rows:
                term, text = _GAP.split(row.strip(), maxsplit=1)
                yield f"| `{_cell(term)}` | {_cell(_markdown_text(text))} |"
            yield ""
        else:
            yield _markdown_text(" ".join(line.strip() for line in (title, *rows))) + "\n"


def _markdown_text(text: str) -> str:
    """Return a help text as Markdown: options and file names as code, nothing as markup."""
    text = re.sub(r"[*_<>\[\]]", lambda found: f"\\{found[0]}", text)
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*", lambda found: f"`{found[0]}`", text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, as one line."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for item, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[ast.unparse(item.target)] = " ".join(inspect.cleandoc(str(after.value.value)).split())
    return found


def training_settings() -> str:
    """Return one table per group of `TrainConfig`: setting, option, type and range, default, effect."""
    options = _option_names()
    parts = []
    for title, prefix, kind in (
        ("The run", "", config.TrainConfig),
        ("The images", "data.", config.DataConfig),
        ("The attack", "attack.", config.AttackConfig),
        ("The optimization", "optim.", config.OptimConfig),
    ):
        parts.append(f"## {title}\n\n| setting | values | default | effect |\n|---|---|---|---|")
        docs, limits, hints = field_docs(kind), limits_of(kind), typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[item.name]):
                continue  # a group of its own
            values = _values(hints[item.name], str(limits.get(item.name, "")), limits.get(item.name))
            name = prefix + item.name
            option = f"<br>`{options[name]}`" if name in options else ""
            parts.append(f"| `{name}`{option} | {values} | {_default(item)} | {_cell(docs[item.name])} |")
        parts.append("")
    return "\n".join(parts)


def _option_names() -> dict[str, str]:
    """Return the option of `advprop train` for each setting that has one."""
    by_parameter = {param.name: max(param.opts, key=len) for param in train_command.params}
    return {field: by_parameter[name] for name, field in OPTIONS.items()}


def _values(hint: Any, bounds: str, limits: Any) -> str:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = {
        "bool": "true or false",
        "str": "text",
        "int": "integer",
        "float": "number",
        "Path": "path",
        "dict": "table",
    }
    shown = [getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None)]
    if limits is not None and limits.one_of:
        return ", ".join(f"`{value}`" for value in limits.one_of)
    text = " or ".join("two numbers" if name == "tuple" else names.get(name, name) for name in shown)
    return f"{text} {bounds}".strip()


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required" if item.default_factory is dataclasses.MISSING else ""
    if item.default is None or item.default == "":
        return ""
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


def exit_codes() -> str:
    """Return a table of exit codes and the errors of `runtime.errors` that cause them."""
    rows: dict[int, list[str]] = {}
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, errors.AdvPropError):
            line = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
            rows.setdefault(kind.exit_code, []).append(f"`{name}`: {_cell(line)}")
    table = ["| code | errors |\n|---|---|", "| 0 | Success. |"]
    table += [f"| {code} | {'<br>'.join(lines)} |" for code, lines in sorted(rows.items())]
    return "\n".join(table) + "\n"


def metrics_columns() -> str:
    """Return a table of the columns of `metrics.csv`."""
    docs = field_docs(reporting.EpochMetrics)
    names = {"branch_losses": "loss_BRANCH"}
    rows = [f"| `{names.get(name, name)}` | {_cell(text)} |" for name, text in docs.items()]
    return "\n".join(["| column | content |\n|---|---|", *rows]) + "\n"


def commands() -> str:
    """Return a table of all commands, with links to their pages."""
    rows = [
        f"| [`{name}`](commands/{name}.md) | {_markdown_text(text)} | {f'`{extra}`' if extra else '–'} |"
        for name, (_, extra, text) in COMMANDS.items()
    ]
    return "\n".join(["| command | does | extra |\n|---|---|---|", *rows]) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "training settings": training_settings,
    "exit codes": exit_codes,
    "columns of metrics.csv": metrics_columns,
    "commands": commands,
}
"""Name in a marker `<!-- generated: NAME -->` → function that returns its Markdown."""
