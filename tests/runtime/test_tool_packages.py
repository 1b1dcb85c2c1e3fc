"""The public names of the tools: `runtime.evaluate`, `runtime.bench` and `runtime.serve`."""

import importlib
import itertools
import subprocess
import sys

import pytest

from tests.support import ROOT

PACKAGES = ["runtime.evaluate", "runtime.bench", "runtime.serve"]


@pytest.mark.parametrize("name", PACKAGES)
def test_all_public_names_can_be_imported(name: str) -> None:
    package = importlib.import_module(name)
    assert len(set(package.__all__)) == len(package.__all__) > 0
    for public in package.__all__:
        assert getattr(package, public) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", PACKAGES)
def test_importing_a_package_loads_nothing_heavy(name: str) -> None:
    heavy = (
        "PIL",
        "cv2",
        "grpc",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "psutil",
        "pynvml",
        "ray",
        "rich",
        "scipy",
        "starlette",
        "torch",
    )
    program = f"import sys, {name}; print([module for module in {heavy} if module in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_the_packages_do_not_import_each_other() -> None:
    for package, other in itertools.permutations(PACKAGES, 2):
        for path in (ROOT / package.replace(".", "/")).rglob("*.py"):
            imports = [line for line in path.read_text().splitlines() if "import" in line and other in line]
            assert imports == [], path
