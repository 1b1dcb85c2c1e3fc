"""Names from files reach the terminal without escape sequences, and are not parsed as markup."""

import io
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from rich.table import Table

from advprop.cli import main
from runtime.engine.sidecar import write_sidecar
from runtime.evaluate.table import result_table
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from runtime.system.console import clean, engine_bar, print_json, progress_bars, set_up_logging, status
from tests.support.fuzz_models import INFO

HOSTILE = "cat\x1b[2J\x1b]0;title\x07[/] [bold red]dog[/bold] \x9b31m\u202etxt.exe\x7f\r"
"""Clears the screen, sets its title, closes and opens markup, colors, and reverses text."""
CLEANED = "cat[2J]0;title[/] [bold red]dog[/bold] 31mtxt.exe"
SPEC = ModelSpec(
    arch=HOSTILE,
    classes=(HOSTILE, "other"),
    dataset=HOSTILE,
    preprocessing=Preprocessing(
        height=4, width=4, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest", crop_pct=1.0
    ),
)


def is_harmless(text: str) -> bool:
    return not any(character in text for character in "\x1b\x07\x9b\u202e\x7f\r")


def test_clean_removes_control_characters_and_keeps_text() -> None:
    assert clean(HOSTILE) == CLEANED
    for text in ("Katze 犬 ε=1 [0.1, 0.2]", "two\nlines\tand a tab", ""):
        assert clean(text) == text
    assert clean(os.fsdecode(b"fig\xe9.jpg")).encode() == b"fig.jpg"


def test_consoles_print_foreign_text_without_parsing_or_obeying_it(capsys: pytest.CaptureFixture[str]) -> None:
    console = set_up_logging()
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    console.print(HOSTILE, soft_wrap=True)
    logging.getLogger("runtime").warning("skipped %s", HOSTILE)
    with status(HOSTILE) as spinner, progress_bars() as bars:
        spinner.update(HOSTILE)
        engine_bar(spinner)(HOSTILE, 0.5)
        bars.add_task(HOSTILE)
        bars.refresh()
    printed = capsys.readouterr()
    assert CLEANED in printed.out.splitlines()
    assert "[bold red]" in printed.err
    assert is_harmless(printed.out + printed.err)


def test_json_escapes_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"class": HOSTILE, "file": os.fsdecode(b"\xe9"), "word": "犬"}
    print_json(content)
    printed = capsys.readouterr().out
    assert json.loads(printed) == content
    assert is_harmless(printed)
    assert "犬" in printed


def write_model(path: Path) -> Path:
    text = """<ir_version: 9, opset_import: ["" : 20]> g (float[n, 3, 4, 4] input) => (float[n, 2] logits)
        { z = Constant<value_ints=[0]>() t = Constant<value_ints=[2]>() a = Constant<value_ints=[1]>()
          p = GlobalAveragePool(input) f = Flatten(p) logits = Slice(f, z, t, a) }"""
    model = onnx.parser.parse_model(text)
    onnx.helper.set_model_props(model, {METADATA_KEY: SPEC.to_json()})
    onnx.save(model, path)
    return path


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert is_harmless(result.output)
    return result.output


def test_commands_survive_hostile_names_in_a_model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    model = write_model(tmp_path / "[bold]m.onnx")
    image = tmp_path / "[red]\x1b[31m.png"
    Image.fromarray(np.full((4, 4, 3), (250, 0, 0), np.uint8)).save(image)
    assert CLEANED in invoke("inspect", model)
    assert json.loads(invoke("inspect", model, "--json"))["spec"]["classes"][0] == HOSTILE
    assert CLEANED in invoke("predict", model, image)
    assert json.loads(invoke("predict", model, image, "--json"))["classes"][0]["label"] == HOSTILE
    missing = CliRunner().invoke(main, ["predict", str(tmp_path / "\x1b[31m[bold].onnx"), str(image)])
    assert missing.exit_code == 2
    assert "[31m[bold].onnx" in missing.output
    assert is_harmless(missing.output)


def test_the_list_of_cached_engines_survives_a_hostile_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "engines").mkdir(mode=0o700)
    write_sidecar(tmp_path / "engines" / "abc.engine", replace(INFO, spec=SPEC, version=HOSTILE))
    assert CLEANED in invoke("cache", "ls")


def test_public_tables_hold_no_markup_for_other_consoles() -> None:
    result: Any = {"suite": "[/]", "model": {"name": "[/] m"}, "cells": {"images": {}}, "metrics": None}
    file = io.StringIO()
    Console(file=file, width=200).print(result_table([result]))
    assert "[/] m" in file.getvalue()
