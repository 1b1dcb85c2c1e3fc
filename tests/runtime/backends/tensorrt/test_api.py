"""The names that our code uses exist in TensorRT-RTX, 10.16 and 11.4, or are guarded.

The names of TensorRT 10 and 11 are in `tensorrt_names.json`. `scripts/tensorrt_names.py` extracted
them from the text of the wheels, which cannot be imported without TensorRT's libraries.
"""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.engine.flavors import Flavor
from runtime.engine.options import HARDWARE_LEVELS, BuildOptions, check_options, flag_names
from runtime.errors import ConfigError
from tests.support import ROOT

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")

RELEASES = {
    version: set(names)
    for version, names in json.loads(Path(__file__).with_name("tensorrt_names.json").read_text()).items()
}
MODULES = ("trt", "module")
"""Names of the library in our code: `trt.Builder`, `flavor.module.Builder`."""
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "timings": "ITimingCache",
    "error": "ParserError",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
}
"""Name of an object in the files below → its TensorRT class."""
NATIVE = ("engine/plan.py", "engine/options.py", "engine/layers.py")

RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
"""Used only if `flavor.name` is `tensorrt_rtx`."""


def chains() -> set[tuple[str, ...]]:
    """Return the names after the module: `trt.MemoryPoolType.WORKSPACE` → (MemoryPoolType, WORKSPACE)."""
    found = set()
    for path in (ROOT / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            while isinstance(node, ast.Attribute):
                names.insert(0, node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                names.insert(0, node.id)
            for place, name in enumerate(names[:-1]):
                if name in MODULES and names[place + 1][0].isalpha():
                    found.add(tuple(names[place + 1 :]))
    return found


def members() -> set[tuple[str, str]]:
    """Return (class, member) for every member of the library's objects that our code uses."""
    found = set()
    for file in NATIVE:
        for node in ast.walk(ast.parse((ROOT / "runtime" / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OBJECTS:
                found.add((OBJECTS[node.value.id], node.attr))
    return found


def by_name() -> set[tuple[str, str]]:
    """Return the enumerators that our code looks up by name."""
    options = BuildOptions(version_compatible=True, refit=True, strip_weights=True)
    flags = {("BuilderFlag", name) for name in flag_names(trt, options) if name != "STRONGLY_TYPED"}
    levels = {("HardwareCompatibilityLevel", level.upper()) for level in HARDWARE_LEVELS}
    return flags | levels | {("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")}


def test_the_search_finds_names_in_our_code() -> None:
    assert ("MemoryPoolType", "WORKSPACE") in chains()
    assert {("Builder", "build_serialized_network"), ("IBuilderConfig", "progress_monitor")} <= members()
    assert ("ParserError", "node_operator") in members()
    assert ("BuilderFlag", "STRIP_PLAN") in by_name()
    assert len(chains()) > 15
    assert len(members()) > 20


@pytest.mark.parametrize("chain", sorted(chains() | members() | by_name()), ids=".".join)
def test_tensorrt_rtx_has_the_name(chain: tuple[str, ...]) -> None:
    found = trt
    for name in chain:
        assert hasattr(found, name), f"{name} of {'.'.join(chain)}"
        found = getattr(found, name)


@pytest.mark.parametrize("version", RELEASES)
def test_full_tensorrt_has_the_names(version: str) -> None:
    used = {name for chain in chains() | members() | by_name() for name in chain if not name.startswith("_")}
    missing = used - RELEASES[version] - RTX_ONLY
    assert not missing, f"not in TensorRT {version}; guard the use, or run scripts/tensorrt_names.py for a new release"
    assert not RTX_ONLY & RELEASES[version]
    assert used >= RTX_ONLY


def test_names_of_tensorrt_rtx_alone_are_guarded() -> None:
    """They are used only in functions that run, or continue, for TensorRT-RTX alone."""
    guarded = {"_set_targets", "check_targets", "_warn_if_not_runnable"}
    for path in (ROOT / "runtime").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in guarded:
                names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
                assert not names & RTX_ONLY, f"{path.name}: {function.name}"


def test_an_unsupported_hardware_level_is_rejected() -> None:
    """The first releases of TensorRT 10 have AMPERE_PLUS only."""
    level = SimpleNamespace(__members__={"NONE": 0, "AMPERE_PLUS": 1})
    old = SimpleNamespace(__version__="10.0.1", HardwareCompatibilityLevel=level)
    options = BuildOptions(hardware_compatible="same_compute_capability")
    with pytest.raises(
        ConfigError, match=r"TensorRT 10\.0\.1 does not support same_compute_capability; it supports ampere_plus"
    ):
        check_options(Flavor("tensorrt", old), options, quantized=False)


def test_host_code_causes_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_options(Flavor("tensorrt", trt), BuildOptions(version_compatible=True), quantized=False)
    assert "loads only if engine_host_code_allowed is set" in caplog.text
