import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import runtime
from advprop.cli import main
from calib.precision import to_reduced
from runtime.engine.flavors import choose_flavor, parse_sm
from runtime.engine.options import BuildOptions
from runtime.engine.sidecar import read_sidecar, sidecar_path
from runtime.errors import BackendUnavailable, ConfigError, EngineBuildError, ModelFileError
from runtime.graph.model import save_onnx
from runtime.graph.summary import summarize
from runtime.system.files import sha256_file
from runtime.system.gpu import find_gpu

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")


def classifier() -> onnx.ModelProto:
    """Return a model with 8 MB of weights, whose engine's size shows its precision."""
    text = """<ir_version: 9, opset_import: ["" : 20]>
    g (float[n, 3, 32, 32] input) => (float[n, 5] logits) {
        a = Conv<strides=[2, 2]>(input, w1) r = Relu(a) b = Conv<strides=[2, 2]>(r, w2)
        p = GlobalAveragePool(b) f = Flatten(p) logits = Gemm<transB=1>(f, w3)
    }"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in (("w1", (256, 3, 3, 3)), ("w2", (896, 256, 3, 3)), ("w3", (5, 896))):
        model.graph.initializer.append(numpy_helper.from_array(random.normal(size=shape).astype(np.float32) / 50, name))
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    model = classifier()
    half = to_reduced(model, "fp16")
    onnx.save(model, folder / "fp32.onnx")
    onnx.save(half, folder / "fp16.onnx")
    return {"fp32": folder / "fp32.onnx", "fp16": folder / "fp16.onnx"}


def test_the_graph_defines_the_precision_of_the_plan(files: dict[str, Path], tmp_path: Path) -> None:
    built = {name: runtime.build(path, tmp_path / f"{name}.engine", sm=(89,)) for name, path in files.items()}
    assert {name: info.precision for name, info in built.items()} == {"fp32": "fp32", "fp16": "fp16"}
    sizes = {name: (tmp_path / f"{name}.engine").stat().st_size for name in built}
    assert sizes["fp16"] < 0.65 * sizes["fp32"]
    for name, info in built.items():
        assert read_sidecar(tmp_path / f"{name}.engine") == info
        assert info.spec is None
        assert info.flags == ("STRONGLY_TYPED",)


def test_an_fp32_graph_does_not_become_an_fp16_engine(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"fp16 engine was requested, but the weights of .* are 100% fp32"):
        runtime.build(files["fp32"], tmp_path / "a.engine", options=BuildOptions(precision="fp16"))
    assert list(tmp_path.iterdir()) == []


def test_several_targets_and_batch_sizes(files: dict[str, Path], tmp_path: Path) -> None:
    info = runtime.build(files["fp16"], tmp_path / "a.engine", sm=(86, 120), batch=(2, 4, 6))
    assert info.compute_capabilities == ("sm_86", "sm_120")
    assert info.profiles == ({"input": {"min": [2, 3, 32, 32], "opt": [4, 3, 32, 32], "max": [6, 3, 32, 32]}},)


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"sm": (90,)}, ConfigError, "does not support SM 90; it supports SM75.*full TensorRT"),
        ({"batch": (4, 2, 8)}, ConfigError, "1 ≤ min ≤ opt ≤ max"),
        ({"flavor": "trt"}, ConfigError, "flavor must be auto"),
        ({"engine": "a.onnx"}, ConfigError, r"NAME\.engine or NAME\.plan; found a\.onnx"),
    ],
)
def test_invalid_arguments_are_rejected(
    files: dict[str, Path], tmp_path: Path, changes: dict[str, Any], error: type[Exception], expected: str
) -> None:
    if "sm" in changes:
        changes = {**changes, "flavor": "tensorrt_rtx"}
    with pytest.raises(error, match=expected):
        runtime.build(files["fp16"], **{"engine": tmp_path / "a.engine", **changes})
    assert list(tmp_path.iterdir()) == []


def test_the_parsers_reason_is_in_the_message(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20, "my.domain" : 1]>
    g (float[n, 3, 8, 8] input) => (float[n, 3] logits) { logits = my.domain.Magic(input) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "magic.onnx")
    with pytest.raises(EngineBuildError, match=r"cannot read .*magic\.onnx: .*Magic"):
        runtime.build(tmp_path / "magic.onnx", flavor="tensorrt_rtx")
    assert not (tmp_path / "magic.engine").exists()


@pytest.mark.skipif(find_gpu() is not None, reason="with a GPU, full TensorRT may be installed")
def test_full_tensorrt_needs_a_gpu() -> None:
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU was found") as error:
        choose_flavor("tensorrt", ())
    assert error.value.reason == "full TensorRT builds only for the GPU of this machine, and no NVIDIA GPU was found"
    assert "pip install tensorrt-rtx" in error.value.fix
    assert choose_flavor("auto", ()).name == "tensorrt_rtx"


@pytest.mark.parametrize("text", ["89", "8.9", "sm89", "sm_89", "SM_89"])
def test_compute_capabilities_are_parsed(text: str) -> None:
    assert parse_sm(text) == 89


@pytest.mark.parametrize("damage", ["plan", "cut", "sidecar", "format", "types", "no sidecar", "no plan"])
def test_an_engine_that_does_not_match_its_sidecar_is_rejected(
    files: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    engine = tmp_path / "a.engine"
    runtime.build(files["fp16"], engine, sm=(89,))
    plan, sidecar = engine.read_bytes(), sidecar_path(engine)
    if damage == "plan":
        engine.write_bytes(plan[:1000] + bytes([plan[1000] ^ 1]) + plan[1001:])
    elif damage == "cut":
        engine.write_bytes(plan[:-1])
    elif damage == "sidecar":
        sidecar.write_text(sidecar.read_text()[:-20])
    elif damage == "format":
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "format": "other/1"}))
    elif damage == "types":
        sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "profiles": [{"input": {}}]}))
    else:
        (sidecar if damage == "no sidecar" else engine).unlink()
    with pytest.raises(ModelFileError, match=r"build it again: advprop build"):
        read_sidecar(engine)
    result = CliRunner().invoke(main, ["inspect", str(engine)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_build_and_inspect_on_the_command_line(files: dict[str, Path], tmp_path: Path) -> None:
    engine = tmp_path / "b.engine"
    result = CliRunner().invoke(main, ["build", str(files["fp16"]), "--out", str(engine), "--sm", "8.6"])
    assert result.exit_code == 0, result.output
    assert "fp16, for SM 86" in result.output
    shown = CliRunner().invoke(main, ["inspect", str(engine)])
    assert "bytes match the sidecar" in shown.output
    shown = CliRunner().invoke(main, ["inspect", str(files["fp16"])])
    assert "100.0% fp16" in shown.output


def test_an_onnx_file_is_summarized(files: dict[str, Path], tmp_path: Path) -> None:
    summary = summarize(files["fp32"])
    assert (summary.input_name, summary.input_shape, summary.outputs) == ("input", (-1, 3, 32, 32), ("logits",))
    assert summary.weights == {"fp32": 256 * 27 + 896 * 256 * 9 + 5 * 896}
    assert summarize(files["fp16"]).share("fp16") == 1.0
    with pytest.raises(ModelFileError, match="no such ONNX file"):
        summarize(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_bytes(b"hello hello")
    with pytest.raises(ModelFileError, match="is not an ONNX file, or is truncated"):
        summarize(tmp_path / "text.onnx")


def test_a_timing_cache_has_no_effect_on_tensorrt_rtx(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = BuildOptions(timing_cache=tmp_path / "timings")
    runtime.build(files["fp16"], tmp_path / "a.engine", sm=(89,), flavor="tensorrt_rtx", options=options)
    assert "--timing-cache has no effect" in caplog.text
    assert not (tmp_path / "timings").exists()


def test_external_weights_are_used_and_hashed(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["fp32"])
    whole, split = tmp_path / "whole.onnx", tmp_path / "split.onnx"
    save_onnx(model, whole)
    save_onnx(model, split, limit=1000)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.onnx", "split.onnx", "split.onnx.data"}
    assert split.stat().st_size < 10_000 < (tmp_path / "split.onnx.data").stat().st_size
    images = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with runtime.load(whole) as first, runtime.load(split) as second:
        assert np.array_equal(first.run(images), second.run(images))
    info = runtime.build(split, sm=(89,))
    assert info.onnx_sha256 == summarize(split).sha256 != sha256_file(split)
    assert (tmp_path / "split.engine").stat().st_size == pytest.approx(
        (tmp_path / "whole.engine").stat().st_size if runtime.build(whole, sm=(89,)) else 0, rel=0.01
    )
    first_hash = summarize(split).sha256
    content = bytearray((tmp_path / "split.onnx.data").read_bytes())
    content[100] ^= 1
    (tmp_path / "split.onnx.data").write_bytes(content)
    assert summarize(split).sha256 != first_hash
    save_onnx(model, split)
    assert not (tmp_path / "split.onnx.data").exists()


@pytest.mark.parametrize(
    ("location", "expected"), [("../w", "outside its folder"), ("/etc/hostname", "outside"), ("gone", "no such file")]
)
def test_weights_outside_the_folder_are_rejected(
    files: dict[str, Path], tmp_path: Path, location: str, expected: str
) -> None:
    model = onnx.load(files["fp32"])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=expected):
        runtime.build(tmp_path / "m.onnx")
