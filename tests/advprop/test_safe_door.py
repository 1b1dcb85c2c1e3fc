"""`import advprop`: its names, its weight, and projects with modules that have the names of ours."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import advprop
from runtime.evaluate.results import FORMAT
from tests.support import ROOT
from tests.support.evaluation_sets import labeled_folder, toy_onnx


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_every_name_is_the_object_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "advprop" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module
        for alias in node.names:
            seen[alias.asname or alias.name] = getattr(importlib.import_module(node.module), alias.name, None)
    assert sorted(seen) == sorted(advprop.__all__)
    assert list(advprop.__all__) == sorted(advprop.__all__)
    for name, value in seen.items():
        assert getattr(advprop, name) is (value or importlib.import_module(f"runtime.{name}")), name
    assert set(advprop.__all__) <= set(dir(advprop))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = advprop.nothing


def test_the_import_loads_the_standard_library_only() -> None:
    program = "import sys; before = set(sys.modules); import advprop; print(*sorted(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in python(ROOT, "-c", program).stdout.split()}
    assert loaded - sys.stdlib_module_names == {"advprop"}


def test_load_needs_no_torch() -> None:
    program = "import sys, advprop; advprop.load, advprop.Session; print('torch' in sys.modules)"
    assert python(ROOT, "-c", program).stdout.strip() == "False"


def test_a_script_named_train_can_load_models_and_is_told_what_hides_train(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import advprop\nprint('loaded', advprop.load.__name__, flush=True)\nadvprop.fit\n")
    run = python(tmp_path, str(script))
    assert run.returncode == 1
    assert run.stdout.split() == ["loaded", "load"], "the script must not run twice"
    expected = f"ImportError: {script} hides advprop's package 'train' in {ROOT / 'train'}. Rename your script"
    assert expected in run.stderr


@pytest.mark.parametrize("has_init", [True, False])
def test_a_local_package_that_hides_ours_is_named(tmp_path: Path, has_init: bool) -> None:
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__init__.py" if has_init else tmp_path / "runtime" / "data.txt").write_text("")
    run = python(tmp_path, "-c", "from advprop import load; print(load.__module__)")
    if has_init:
        assert f"ImportError: {tmp_path / 'runtime'} hides advprop's package 'runtime'" in run.stderr
        assert f"keep {tmp_path} off Python's path" in run.stderr
    else:  # a folder without __init__.py hides nothing
        assert run.stdout.strip() == "runtime.loading"


def test_a_module_of_another_project_that_is_already_imported_is_named(tmp_path: Path) -> None:
    (tmp_path / "export.py").write_text("")
    run = python(tmp_path, "-c", "import export, advprop; advprop.load; advprop.export")
    assert f"ImportError: {tmp_path / 'export.py'} hides advprop's package 'export'" in run.stderr


@pytest.mark.parametrize("arguments", [["predict", "-h"], ["export", "-h"], ["train", "-h"], ["--version"]])
def test_commands_work_next_to_local_modules_with_our_names(tmp_path: Path, arguments: list[str]) -> None:
    for name in ("runtime", "calib", "train", "export"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module was imported')")
    for path in (str(ROOT), os.pathsep.join((str(tmp_path), str(ROOT)))):
        run = python(tmp_path, "-m", "advprop", *arguments, PYTHONPATH=path)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(("Usage: python -m advprop", "advprop "))


def test_evaluate_measures_files_given_as_text(tmp_path: Path) -> None:
    labeled_folder(tmp_path / "val", count=3)
    model = toy_onnx(tmp_path / "m.onnx")
    suite = advprop.SuiteConfig(name="imagenet", data=tmp_path / "val")
    run = advprop.RunConfig(out=tmp_path / "out", workers=0)
    (result,) = advprop.evaluate(str(model), suite, run, device="cpu")
    assert (result["format"], result["model"]["name"]) == (FORMAT, "m")
    assert result["metrics"]["cells"]["images"]["images"] == 9
    pair = advprop.evaluate([model, toy_onnx(tmp_path / "n.onnx", scale=2.0)], suite, run, reference=model)
    assert pair[1]["metrics"]["cells"]["images"]["against_reference"]["agreement"] == 1.0
