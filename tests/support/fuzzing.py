"""Generate damaged and hostile files, and check that they only cause our own errors.

ONNX files have bytes changed, cut, repeated and inserted, or parts of their graph set to nonsense,
and so do sidecars and plans; command-line options are arbitrary text. `tests/runtime/test_fuzz.py`
runs a few cases of each kind, and `benchmarks/fuzz.py` many.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from advprop.cli import main as advprop
from runtime.engine.int8 import LayerReport, Reason, int8_layers
from runtime.engine.sidecar import EngineInfo, read_sidecar, sidecar_path, write_sidecar
from runtime.errors import AdvPropError
from runtime.graph.read import read_onnx
from runtime.graph.summary import summarize, work_of
from runtime.graph.validation import check_volumes
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from runtime.system.files import write_bytes

__all__ = ["KINDS", "MODEL", "fuzz"]

SPEC = ModelSpec(
    arch="resnet10t",
    classes=("a", "b", "c", "d"),
    preprocessing=Preprocessing(
        height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0
    ),
    input_form="float32 NCHW",
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 10**9, 2**31, 2**62, -(2**63), 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(max_size=12) | st.sampled_from(["", "../w", "/etc/hostname", "a\0b", ".", "input", "logits", "1:2:3"])
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def sample_onnx() -> onnx.ModelProto:
    """Return a model with quantized and float layers, a subgraph, a constant and a spec."""
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[n, 3, 8, 8] input) => (float[n, 4] logits) {
        q = QuantizeLinear(input, s, z) d = DequantizeLinear(q, s, z) w = DequantizeLinear(wq, s, z)
        a = Conv(d, w) r = Relu(a) h = Cast<to: int = 1>(v) b = Conv(r, h)
        c = Constant<value: tensor = float[1] {1.0}>()
        e = If(t) <then_branch: graph = y () => (float[1] o) { o = Identity(c) },
                   else_branch: graph = y () => (float[1] u) { u = Constant<value: tensor = float[1] {2.0}>() }>
        m = Mul(b, e) p = GlobalAveragePool(m) f = Flatten(p) logits = Gemm<transB: int = 1>(f, g)
    }"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    weights = {
        "s": np.float32(0.1), "z": np.int8(0), "t": np.bool_(True),
        "wq": random.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8),
        "v": random.normal(size=(4, 4, 3, 3)).astype(np.float32), "g": random.normal(size=(4, 4)).astype(np.float32),
    }  # fmt: skip
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    model.metadata_props.add(key=METADATA_KEY, value=SPEC.to_json())
    return model


MODEL = sample_onnx()
PLAN = np.random.default_rng(1).bytes(4000)
INFO = EngineInfo(
    plan_sha256="0" * 64, onnx_sha256="1" * 64, flavor="tensorrt_rtx", version="1.7.1",
    compute_capabilities=("sm_89",), gpu="",
    layers=(LayerReport(node="a", op="Conv", macs=5, quantized=True, computes="int8", why="", reason=Reason.NONE),),
    profiles=({"input": {"min": [1, 3, 8, 8], "opt": [1, 3, 8, 8], "max": [1, 3, 8, 8]}},),
    flags=("STRONGLY_TYPED",), precision="int8", precision_shares={"int8": 1.0}, calibration_sha256="", spec=SPEC,
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a copy of the content with bytes changed, removed, repeated or inserted."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(result) - 1, 0)))
        span = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "repeat", "insert", "set"]))
        if kind == "flip" and result:
            result[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del result[place:]
        elif kind == "drop":
            del result[place : place + span]
        elif kind == "repeat":
            result[place:place] = result[place : place + span] * draw(st.integers(1, 50))
        elif kind == "insert":
            result[place:place] = draw(st.binary(max_size=16))
        else:
            result[place : place + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"]))
    return bytes(result)


@st.composite
def nonsense(draw: st.DrawFn) -> bytes:
    """Draw a file that protobuf can read but whose graph is nonsense."""
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    graph = model.graph
    for _ in range(draw(st.integers(1, 5))):
        node = draw(st.sampled_from(list(graph.node)))
        tensor = draw(st.sampled_from(list(graph.initializer)))
        what = draw(st.integers(0, 12))
        if what == 0 and node.input:
            node.input[draw(st.integers(0, len(node.input) - 1))] = draw(TEXTS | st.sampled_from(["a", "m", "w", "h"]))
        elif what == 1:
            del node.input[draw(st.integers(0, 2)) :]
        elif what == 2:
            del node.output[:]
        elif what == 3:
            del node.attribute[:]
        elif what == 4:
            node.op_type = draw(
                TEXTS | st.sampled_from(["Conv", "Gemm", "Loop", "Range", "ConstantOfShape", "Reshape"])
            )
        elif what == 5:
            tensor.dims[:] = draw(st.lists(NUMBERS, max_size=6))
        elif what == 6:
            tensor.data_type = draw(st.integers(-1, 40))
        elif what == 7:
            tensor.raw_data = draw(st.binary(max_size=40))
        elif what == 8:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key in ("location", "offset", "length"):
                tensor.external_data.add(key=key, value=draw(TEXTS | NUMBERS.map(str) | st.just("weights")))
        elif what == 9:
            value = draw(st.sampled_from([*graph.input, *graph.output]))
            value.type.tensor_type.elem_type = draw(st.integers(-1, 30))
            del value.type.tensor_type.shape.dim[:]
            for size in draw(st.lists(NUMBERS | st.none(), max_size=6)):
                dim = value.type.tensor_type.shape.dim.add()
                if size is not None:
                    dim.dim_value = size
        elif what == 10:
            model.metadata_props[0].value = draw(TEXTS | PLAIN.map(json.dumps))
        elif what == 11:
            node.attribute.add(name=draw(TEXTS | st.just("group")), i=draw(NUMBERS), type=onnx.AttributeProto.INT)
        else:
            other = draw(st.sampled_from(list(graph.node)))
            if node.input and other.output:
                node.input[0] = other.output[0]
    return model.SerializeToString()


@st.composite
def sidecars(draw: st.DrawFn) -> bytes:
    """Draw a sidecar with nonsense in its fields, or with damaged bytes."""
    with tempfile.TemporaryDirectory() as folder:
        write_sidecar(Path(folder) / "a.engine", INFO)
        text = sidecar_path(Path(folder) / "a.engine").read_bytes()
    if draw(st.booleans()):
        return draw(damaged(text))
    content: Any = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        holder = draw(st.sampled_from([content, content["spec"], content["profiles"][0], *content["layers"]]))
        if isinstance(holder, dict) and holder:
            name = draw(st.sampled_from(sorted(holder)))
            if holder is content and name in ("spec", "profiles", "layers"):
                return json.dumps({**content, name: draw(PLAIN)}).encode()
            holder[name] = draw(PLAIN)
    return json.dumps(content).encode()


def only_our_errors(work: Callable[[], object]) -> str:
    """Run `work`, and return the type of our error, or `passed`. Other errors are not caught."""
    try:
        work()
    except AdvPropError as error:
        return type(error).__name__
    return "passed"


def try_onnx(content: bytes, folder: Path, native: bool = False) -> str:
    """Run everything that reads an ONNX file before a builder, and the builder if `native`."""
    path = folder / "a.onnx"
    path.write_bytes(content)

    def read() -> None:
        summarize(path)
        work_of(path)
        int8_layers(path, [])
        check_volumes(read_onnx(path), path)

    result = only_our_errors(read)
    if result == "passed" and native:
        program = "import sys, runtime; runtime.build(sys.argv[1], sys.argv[2], sm=(89,), flavor='tensorrt_rtx')"
        command = [sys.executable, "-c", program, str(path), str(folder / "a.engine")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        last = (run.stderr.strip().splitlines() or [""])[-1]
        result = "built" if run.returncode == 0 else last.split(":")[0].split(".")[-1]
        if run.returncode not in (0, 1) or (run.returncode == 1 and "runtime.errors." not in last):
            (folder.parent / f"crash-{time.time_ns()}.onnx").write_bytes(content)
            result = f"native crash, exit {run.returncode}: {last[:100]}"
    return result


def try_sidecar(content: bytes, folder: Path) -> str:
    """Read an engine whose sidecar is `content`."""
    engine = folder / "a.engine"
    engine.write_bytes(PLAN)
    sidecar_path(engine).write_bytes(content)
    try_command(["inspect", str(engine)])
    return only_our_errors(lambda: read_sidecar(engine))


def try_plan(content: bytes, folder: Path) -> str:
    """Read an engine whose plan is `content`."""
    engine = folder / "a.engine"
    write_bytes(engine, content)
    write_sidecar(engine, INFO)
    return only_our_errors(lambda: read_sidecar(engine))


def try_command(arguments: list[str]) -> str:
    """Run a command, which must exit with one of our exit codes and without a traceback."""
    result = CliRunner().invoke(advprop, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 2, 3), result.output
    return f"exit {result.exit_code}"


def try_options(values: list[str], folder: Path) -> str:
    """Run `advprop build` with these option values."""
    names = ("--sm", "--batch", "--img-size", "--workspace-mib", "--hardware-compatible")
    options = [part for pair in zip(names, values, strict=False) for part in pair]
    return try_command(["build", str(folder / "none.onnx"), *options])


KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[..., str]]] = {
    "ONNX bytes": (damaged(MODEL.SerializeToString()), try_onnx),
    "ONNX graphs": (nonsense(), try_onnx),
    "sidecars": (sidecars(), try_sidecar),
    "plans": (damaged(PLAN), try_plan),
    "options": (st.lists(TEXTS | st.from_regex(r"[-0-9:x.]{1,9}"), min_size=1, max_size=5), try_options),
}
"""Kind of input → its generator, and the function that reads it."""


def fuzz(kind: str, cases: int, folder: Path, *, seeded: bool, native: bool = False) -> Counter[str]:
    """Run cases of one kind, and count their results.

    An error that is not ours is raised with the smallest case that causes it.

    Args:
        kind: a key of `KINDS`.
        cases: number of cases.
        folder: folder for temporary files.
        seeded: run the same cases every time.
        native: pass valid ONNX files to TensorRT-RTX, in a child process.
    """
    strategy, attempt = KINDS[kind]
    counts: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=seeded,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(content: Any) -> None:
        counts[attempt(content, folder, *([True] if native and attempt is try_onnx else []))] += 1

    run()
    return counts
