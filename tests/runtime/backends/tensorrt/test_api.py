"""Every TensorRT name that our code uses is in TensorRT-RTX, 10.16 and 11.4, or is guarded where it is not.

The names of TensorRT 10 and 11 are in `tensorrt_names.json`, written by `scripts/tensorrt_names.py` from the text of
their wheels, since they cannot be imported without TensorRT's libraries.
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
"""What our code calls the library: `trt.Builder`, `flavor.module.Builder`."""
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
"""What our code calls the library's objects, in the files below."""
NATIVE = ("engine/plan.py", "engine/options.py", "engine/layers.py")

RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
"""Used where `flavor.name` is `tensorrt_rtx`."""


def chains() -> set[tuple[str, ...]]:
    """Names that follow the module's: `trt.MemoryPoolType.WORKSPACE` → (MemoryPoolType, WORKSPACE)."""
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
    """(class, member) of what is called, read or set on the library's objects."""
    found = set()
    for file in NATIVE:
        for node in ast.walk(ast.parse((ROOT / "runtime" / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in OBJECTS:
                found.add((OBJECTS[node.value.id], node.attr))
    return found


def by_name() -> set[tuple[str, str]]:
    """Enumerators that are looked up by name."""
    options = BuildOptions(version_compatible=True, refit=True, strip_weights=True)
    flags = {("BuilderFlag", name) for name in flag_names(trt, options) if name != "STRONGLY_TYPED"}
    levels = {("HardwareCompatibilityLevel", level.upper()) for level in HARDWARE_LEVELS}
    return flags | levels | {("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")}


def test_names_that_the_code_uses_are_found() -> None:
    """The search itself: what is surely used is seen."""
    assert ("MemoryPoolType", "WORKSPACE") in chains()
    assert {("Builder", "build_serialized_network"), ("IBuilderConfig", "progress_monitor")} <= members()
    assert ("ParserError", "node_operator") in members()
    assert ("BuilderFlag", "STRIP_PLAN") in by_name()
    assert len(chains()) > 15
    assert len(members()) > 20


@pytest.mark.parametrize("chain", sorted(chains() | members() | by_name()), ids=".".join)
def test_tensorrt_rtx_has_it(chain: tuple[str, ...]) -> None:
    found = trt
    for name in chain:
        assert hasattr(found, name), f"{name} of {'.'.join(chain)}"
        found = getattr(found, name)


@pytest.mark.parametrize("version", RELEASES)
def test_full_tensorrt_has_it(version: str) -> None:
    used = {name for chain in chains() | members() | by_name() for name in chain if not name.startswith("_")}
    lacking = used - RELEASES[version] - RTX_ONLY
    assert not lacking, f"not in TensorRT {version}; guard it, or run scripts/tensorrt_names.py where it is new"
    assert not RTX_ONLY & RELEASES[version]
    assert used >= RTX_ONLY


def test_what_only_one_has_is_behind_a_guard() -> None:
    """Each use of a name of TensorRT-RTX alone is in a function that is called, or goes on, for TensorRT-RTX only."""
    guarded = {"_set_targets", "check_targets", "_warn_where_it_will_not_run"}
    for path in (ROOT / "runtime").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in guarded:
                names = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
                assert not names & RTX_ONLY, f"{path.name}: {function.name}"


def test_a_level_that_this_tensorrt_lacks() -> None:
    """The first releases of TensorRT 10 have AMPERE_PLUS only."""
    level = SimpleNamespace(__members__={"NONE": 0, "AMPERE_PLUS": 1})
    old = SimpleNamespace(__version__="10.0.1", HardwareCompatibilityLevel=level)
    options = BuildOptions(hardware_compatible="same_compute_capability")
    with pytest.raises(ConfigError, match=r"TensorRT 10\.0\.1 has no same_compute_capability; it has ampere_plus"):
        check_options(Flavor("tensorrt", old), options, quantized=False)


def test_engines_with_host_code_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    check_options(Flavor("tensorrt", trt), BuildOptions(version_compatible=True), quantized=False)
    assert "loads only where that is allowed (engine_host_code_allowed)" in caplog.text
