"""Damaged ONNX files, specs, engines and options, and what reads them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import onnx
from click.testing import CliRunner
from onnx import numpy_helper

import runtime
from advprop.cli import main as advprop
from runtime.engine.int8 import LayerReport, Reason, int8_layers
from runtime.engine.sidecar import EngineInfo, read_sidecar, sidecar_path, write_sidecar
from runtime.graph.read import read_onnx
from runtime.graph.summary import summarize, work_of
from runtime.graph.validation import check_volumes
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from tests.support.mutations import damaged, hostile_json, number, text

SPEC = ModelSpec(
    arch="resnet10t",
    classes=("a", "b", "c", "d"),
    preprocessing=Preprocessing(
        height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0
    ),
    input_form="float32 NCHW",
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


def nonsense(random: Random) -> bytes:
    """Return a file that protobuf can read but whose graph is nonsense."""
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    for _ in range(random.randint(1, 5)):
        random.choice((_change_node, _change_node, _change_tensor, _change_value, _change_metadata))(random, model)
    return model.SerializeToString()


def _valid_text(random: Random) -> str:
    return text(random).encode(errors="replace").decode()


def _change_node(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    what = random.randrange(7)
    if what == 0 and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(["a", "m", "w", "h", _valid_text(random)])
    elif what == 1:
        del node.input[random.randrange(3) :]
    elif what == 2:
        del node.output[:]
    elif what == 3:
        del node.attribute[:]
    elif what == 4:
        operators = ("Conv", "Gemm", "Loop", "Range", "ConstantOfShape", "Reshape", "Resize", "Pad", "Tile", "If", "")
        node.op_type = random.choice([*operators, _valid_text(random)])
    elif what == 5:
        name = random.choice(["group", "to", "transB", "axis", _valid_text(random)])
        node.attribute.add(name=name, i=number(random), type=onnx.AttributeProto.INT)
    elif node.input and (other := random.choice(model.graph.node)).output:
        node.input[0] = other.output[0]


def _change_tensor(random: Random, model: onnx.ModelProto) -> None:
    tensor = random.choice(model.graph.initializer)
    what = random.randrange(4)
    if what == 0:
        tensor.dims[:] = [number(random) for _ in range(random.randrange(7))]
    elif what == 1:
        tensor.data_type = random.randint(-1, 40)
    elif what == 2:
        tensor.raw_data = random.randbytes(random.randrange(40))
    else:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key in ("location", "offset", "length"):
            value = random.choice(["weights", str(number(random)), _valid_text(random)])
            tensor.external_data.add(key=key, value=value)


def _change_value(random: Random, model: onnx.ModelProto) -> None:
    value = random.choice([*model.graph.input, *model.graph.output])
    value.type.tensor_type.elem_type = random.randint(-1, 30)
    del value.type.tensor_type.shape.dim[:]
    for _ in range(random.randrange(7)):
        size = value.type.tensor_type.shape.dim.add()
        if random.random() < 0.7:
            size.dim_value = number(random)


def _change_metadata(random: Random, model: onnx.ModelProto) -> None:
    model.metadata_props[0].value = make_spec(random)


def any_onnx(random: Random) -> bytes:
    return nonsense(random) if random.random() < 0.5 else damaged(random, MODEL.SerializeToString())


def read_model(content: bytes, folder: Path) -> None:
    """Run everything that reads an ONNX file before a builder."""
    path = folder / "a.onnx"
    path.write_bytes(content)
    summarize(path)
    work_of(path)
    int8_layers(path, [])
    check_volumes(read_onnx(path), path)


def load_and_run(content: bytes, folder: Path) -> None:
    """Run a file in ONNX Runtime."""
    path = folder / "a.onnx"
    path.write_bytes(content)
    with runtime.load(path, device="cpu", threads=1) as session:
        session.predict([np.zeros((9, 9, 3), np.uint8)])


def build_engine(content: bytes, folder: Path) -> None:
    """Build an engine in a child process. A crash of TensorRT fails, and its file is kept."""
    path = folder / "a.onnx"
    path.write_bytes(content)
    program = "import sys, runtime; runtime.build(sys.argv[1], sys.argv[2], sm=(89,), flavor='tensorrt_rtx')"
    command = [sys.executable, "-c", program, str(path), str(folder / "a.engine")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = (run.stderr.strip().splitlines() or [""])[-1]
    if run.returncode not in (0, 1) or (run.returncode == 1 and "runtime.errors." not in last):
        raise RuntimeError(f"crash of TensorRT-RTX, exit {run.returncode}: {last[:100]}")


def make_spec(random: Random) -> str:
    """Return a hostile spec as text that protobuf accepts."""
    return hostile_json(random, json.loads(SPEC.to_json())).decode(errors="replace")


@functools.cache
def _sidecar() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_sidecar(Path(folder) / "a.engine", INFO)
        return sidecar_path(Path(folder) / "a.engine").read_bytes()


SIDECAR = _sidecar()


def make_sidecar(random: Random) -> bytes:
    return hostile_json(random, json.loads(SIDECAR))


def read_spec(made: str, _: Path) -> None:
    ModelSpec.from_json(made)


def make_plan(random: Random) -> bytes:
    return damaged(random, PLAN)


def read_plan(plan: bytes, folder: Path) -> None:
    _read_engine(plan, SIDECAR, folder)


def read_sidecar_bytes(sidecar: bytes, folder: Path) -> None:
    _read_engine(PLAN, sidecar, folder)


def _read_engine(plan: bytes, sidecar: bytes, folder: Path) -> None:
    engine = folder / "a.engine"
    engine.write_bytes(plan)
    sidecar_path(engine).write_bytes(sidecar)
    run_command(["inspect", str(engine)])
    read_sidecar(engine)


def run_command(arguments: list[str]) -> None:
    """Run a command, which must exit with one of our exit codes and without a traceback."""
    result = CliRunner().invoke(advprop, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 2, 3), result.output


def build_with(options: list[str], folder: Path) -> None:
    run_command(["build", str(folder / "none.onnx"), *options])


def make_options(random: Random) -> list[str]:
    names = ("--sm", "--batch", "--img-size", "--workspace-mib", "--hardware-compatible")
    return [part for name in random.sample(names, random.randint(1, 5)) for part in (name, text(random))]
