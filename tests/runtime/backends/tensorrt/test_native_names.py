"""The names that our code uses exist in the installed cuda-bindings and TensorRT-RTX."""

import ast
import inspect
from types import ModuleType

import pytest

from tests.support import ROOT

RUNNING = ROOT / "runtime" / "backends" / "tensorrt"


def driver_calls() -> dict[str, int]:
    """Return the functions that driver.py calls, with the number of arguments."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / "runtime" / "device" / "driver.py").read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr.startswith("cu") and node.func.attr[2].isupper():
            found[node.func.attr] = len(node.args)
        elif node.func.attr == "_call" and isinstance(node.args[0], ast.Constant):
            found[str(node.args[0].value)] = len(node.args) - 1
    return found


def test_cuda_bindings_has_the_functions_that_we_call() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    calls = driver_calls()
    assert len(calls) > 20
    for name, count in {**calls, "cuMemFree": 1, "cuMemFreeHost": 1}.items():
        assert len(inspect.signature(getattr(driver, name)).parameters) == count, name
    for kind, name in (
        ("CUstream_flags", "CU_STREAM_NON_BLOCKING"),
        ("CUevent_flags", "CU_EVENT_DISABLE_TIMING"),
        ("CUevent_flags", "CU_EVENT_DEFAULT"),
        ("CUstreamCaptureMode", "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"),
        ("CUpointer_attribute", "CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL"),
    ):
        assert hasattr(getattr(driver, kind), name)
    assert (driver.CU_MEMHOSTALLOC_PORTABLE, int(driver.CU_STREAM_LEGACY)) == (1, 1)
    assert int(driver.CUstream(5)) == 5
    codes = {"OUT_OF_MEMORY": 2, "NOT_INITIALIZED": 3, "NO_DEVICE": 100, "ILLEGAL_ADDRESS": 700, "LAUNCH_FAILED": 719}
    assert {name: int(getattr(driver.CUresult, f"CUDA_ERROR_{name}")) for name in codes} == codes


OWNERS = {
    "_runtime": "Runtime",
    "_engine": "ICudaEngine",
    "engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
}
"""Name in our code → TensorRT class."""


def test_tensorrt_has_the_members_that_we_use() -> None:
    trt: ModuleType = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    found = set()
    for file in ("engine.py", "context.py"):
        for node in ast.walk(ast.parse((RUNNING / file).read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if file == "context.py" and owner in ("engine", "_engine"):
                continue  # our own LoadedEngine
            if owner in OWNERS:
                found.add((OWNERS[owner], node.attr))
            elif owner in ("trt", "_trt"):
                assert hasattr(trt, node.attr), node.attr
    missing = {(kind, name) for kind, name in found if not hasattr(getattr(trt, kind), name)}
    assert missing == set()
    assert len(found) > 20
    for kind, name in (
        ("TensorIOMode", "INPUT"),
        ("TensorIOMode", "OUTPUT"),
        ("TensorLocation", "DEVICE"),
        ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
        ("CudaGraphStrategy", "DISABLED"),
        *(("DataType", name) for name in ("FLOAT", "HALF", "INT8", "UINT8", "INT32", "INT64", "BOOL")),
    ):
        assert name in getattr(trt, kind).__members__
