"""The installation in slices: what the core needs, and what is said if a package is missing."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from runtime.errors import BackendUnavailable
from runtime.system.slices import SLICES, install_command, missing_package, missing_requirements, slice_command
from tests.support import ROOT
from tests.support.serving_models import serving_model

PACKAGES = ("advprop", "train", "export", "calib", "runtime")
NOT_ON_PYPI = {"cuda", "tensorrt_bindings", "triton_python_backend_utils"}


@pytest.mark.parametrize(
    ("module", "first", "extra"),
    [
        ("torch", "", "train"),
        ("torch._C", "export", "export"),
        ("onnx.helper", "eval", "eval"),
        ("cv2", "", "eval"),
        ("sklearn.datasets", "eval", "train"),
        ("grpc.aio", "", "serve"),
        ("ray", "", "ray"),
    ],
)
def test_a_missing_package_names_the_slice_of_the_command(module: str, first: str, extra: str) -> None:
    error = missing_package(ModuleNotFoundError(name=module), first)
    assert isinstance(error, BackendUnavailable) and error.fix == slice_command(extra)


def test_an_installation_from_a_clone_is_completed_from_the_clone() -> None:
    command = slice_command("eval")
    assert command == f"pip install -e '{ROOT}[eval]'" or command.endswith("advprop[eval]'")


def test_other_import_errors_are_not_explained_away() -> None:
    assert missing_package(ImportError("libcudart.so.13: cannot open shared object file", name="torch")) is None
    assert missing_package(ModuleNotFoundError(name="photos_of_mine")) is None
    assert missing_package(ModuleNotFoundError("no name")) is None
    assert missing_package(ValueError("onnx")) is None


def test_the_slices_are_those_of_the_project() -> None:
    extras = set(metadata.metadata("advprop").get_all("Provides-Extra") or ())
    assert set(SLICES) == extras - {"all", "dev", "docs", "frost"}
    assert missing_requirements("train") == []


def test_every_imported_package_belongs_to_the_core_or_to_a_slice() -> None:
    core = {"click", "filelock", "numpy", "onnxruntime", "packaging", "PIL", "platformdirs", "rich"}
    unknown = {
        f"{module} in {path}"
        for path, module in _third_party_imports()
        if module not in core | NOT_ON_PYPI and not install_command(module)
    }
    # google.protobuf and ml_dtypes come with onnx, imagecorruptions with the extra `frost`. The server
    # uses OpenTelemetry if it is installed.
    expected = {"google", "ml_dtypes", "imagecorruptions", "opentelemetry"}
    assert {name.split()[0] for name in unknown} <= expected, unknown


def _third_party_imports() -> Iterator[tuple[Path, str]]:
    own = {*PACKAGES, *sys.stdlib_module_names}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names.append(node.module)
                yield from ((path, name.split(".")[0]) for name in names if name.split(".")[0] not in own)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the built wheel of advprop and its core only."""
    folder = tmp_path_factory.mktemp("core")
    source = folder / "source"  # a build writes into the folder of its sources
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheel, check=True, timeout=300, env=environment())
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120, env=environment())
    install = [str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", *map(str, folder.glob("*.whl"))]
    subprocess.run(install, check=True, timeout=600, env=environment())
    return folder / "venv" / "bin"


def environment() -> dict[str, str]:
    """Return the variables of this process without those that add other packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with a model and an image."""
    onnx.save(serving_model(), tmp_path / "model.onnx")
    Image.fromarray(np.full((9, 9, 3), (10, 200, 10), np.uint8)).save(tmp_path / "green.png")
    return tmp_path


def run(core: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(core / command[0]), *command[1:]]
    return subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


ANSWER = """
import sys, runtime
with runtime.load("model.onnx", threads=1, warm_up=(1,)) as session:
    print(session.predict(["green.png"])[0].label, session.submit_predict(["green.png"]).result()[0].label)
assert not {"torch", "onnx", "scipy", "cv2", "matplotlib"} & set(sys.modules)
"""


@pytest.mark.slow
def test_the_core_serves_without_the_other_slices(core: Path, files: Path) -> None:
    installed = run(core, files, "python", "-m", "pip", "list", "--format=freeze").stdout.lower()
    assert not any(name in installed for name in ("torch", "onnx=", "scipy", "matplotlib", "opencv"))
    answer = run(core, files, "python", "-c", ANSWER)
    assert answer.stdout.split() == ["green", "green"], answer.stderr
    for command, expected in (
        (("predict", "model.onnx", "green.png"), "green"),
        (("inspect", "model.onnx"), "unknown without the package onnx"),
        (("doctor",), "ONNX Runtime"),
        (("cache", "ls"), ""),
    ):
        done = run(core, files, "advprop", *command)
        assert done.returncode == 0 and expected in " ".join(done.stdout.split()), (command, done.stdout, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (("train", "--arch", "resnet18"), "torch", "train"),
        (("export", "best.pt"), "onnx", "export"),
        (("calibrate", "model.onnx", "--data", "."), "onnx", "export"),
        (("build", "model.onnx"), "onnx", "export"),
        (("bench", "model.onnx"), "onnx", "eval"),
        (("eval", "model.onnx", "--data", ".", "--suite", "imagenet"), "onnx", "eval"),
    ],
)
def test_a_command_names_its_missing_slice(
    core: Path, files: Path, command: tuple[str, ...], package: str, extra: str
) -> None:
    done = run(core, files, "advprop", *command)
    assert done.stderr == f"error: the package {package} is not installed; pip install 'advprop[{extra}]'\n"
    assert done.returncode == 3
    assert sorted(path.name for path in files.iterdir()) == ["green.png", "model.onnx"]
