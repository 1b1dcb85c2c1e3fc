import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import runtime
from advprop.cli import main
from calib.config import CalibrationConfig
from calib.images import calibration_set
from calib.pipeline import calibrate_file
from calib.prepare import read_float_model
from export.config import EngineConfig, ExportConfig
from export.pipeline import export_checkpoint
from runtime.errors import ConfigError
from runtime.graph.foreign import ForeignOptions
from runtime.graph.model import run_batches, tensor_types
from runtime.graph.rounding import with_roundings
from tests.support.digit_files import write_digits
from tests.support.networks import classifier, scale_initializer
from train.loop import FitResult


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 60)
    return folder


@pytest.fixture(scope="module")
def exported(trained: FitResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(trained.last, ExportConfig(out=tmp_path_factory.mktemp("int8"))).onnx


@pytest.mark.slow
def test_from_the_command_line_to_an_engine(exported: Path, digits: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.int8.onnx"
    result = CliRunner().invoke(main, ["calibrate", str(exported), "--data", str(digits), "--out", str(target)])
    assert result.exit_code == 0, result.output
    assert "15 of 15 layers in INT8, 100.0% of the MACs" in result.output
    record = json.loads((tmp_path / "m.int8.json").read_text())
    assert record["agreement"] >= 0.95
    assert all(0 < node["threshold"] <= node["largest"] for node in record["nodes"])
    assert all(node["noise"] < 0.01 for node in record["nodes"])
    info = runtime.build(target, options=runtime.BuildOptions(precision="int8"), sm=(89,))
    assert info.precision_shares == {"int8": 1.0}
    assert info.calibration_sha256 == calibration_set(digits).sha256
    paths = sorted(digits.iterdir())
    with runtime.load(exported) as plain, runtime.load(target) as quantized:
        pairs = zip(plain.predict(paths), quantized.predict(paths), strict=True)
        assert np.mean([one.index == other.index for one, other in pairs]) >= 0.95


@pytest.mark.slow
def test_a_budget_is_met_and_recorded(exported: Path, digits: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.int8.onnx"
    options = ["--data", str(digits), "--out", str(target), "--budget", "5"]
    result = CliRunner().invoke(main, ["calibrate", str(exported), *options])
    assert result.exit_code == 0, result.output
    assert re.search(
        r"budget of 5.00 points met: expected loss \d\.\d\d \(clean\) on 15 held-out images", result.output
    )
    budget = json.loads((tmp_path / "m.int8.json").read_text())["budget"]
    assert budget["met"]
    assert budget["losses"]["clean"] <= budget["budget"] == 0.05
    assert (tmp_path / "m.int8.budget.png").stat().st_size > 1000


@pytest.mark.slow
def test_from_a_checkpoint_to_an_int8_engine(trained: FitResult, digits: Path, tmp_path: Path) -> None:
    result = export_checkpoint(
        trained.last, ExportConfig(out=tmp_path, precision="int8", calib_data=digits, engine=EngineConfig(sm=(89,)))
    )
    assert result.engine_info is not None and result.reduced_parity is not None
    assert result.engine_info.precision == "int8"
    assert result.reduced_parity.agreement >= 0.95
    assert {path.name for path in tmp_path.iterdir()} == {
        *(
            "model.onnx",
            "model.int8.onnx",
            "model.int8.json",
            "model.int8.calib.json",
            "export.json",
            "model.int8.ranges.png",
        ),
        *("model.int8.engine", "model.int8.engine.json"),
    }


@pytest.mark.slow
def test_a_manifest_reproduces_the_files_byte_for_byte(exported: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first = calibrate_file(exported, digits, tmp_path / "m.int8.onnx", CalibrationConfig(images=40))
    second = calibrate_file(exported, tmp_path / "m.int8.calib.json", tmp_path / "again" / "m.int8.onnx")
    assert first.images == second.images
    assert len(first.images.images) == 40
    for name in ("m.int8.onnx", "m.int8.json", "m.int8.calib.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_the_returned_graph_is_the_written_file_with_roundings(exported: Path, digits: Path, tmp_path: Path) -> None:
    result = calibrate_file(exported, digits, tmp_path / "m.onnx", CalibrationConfig(images=32))
    _, preprocessing = read_float_model(exported, None)
    images = next(result.images.batches(preprocessing, 4))
    expected = run_batches(with_roundings(onnx.load(tmp_path / "m.onnx")), [images])
    np.testing.assert_array_equal(run_batches(result.rounded, [images]), expected)


def test_two_calibrations_in_one_folder_keep_their_images(digits: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(classifier(), source)
    foreign = ForeignOptions(mean=(0.5,) * 3, std=(0.2,) * 3)
    for count in (33, 40):
        target = tmp_path / f"m{count}.onnx"
        calibrate_file(source, digits, target, CalibrationConfig(images=count, half=False), foreign=foreign)
    for count in (33, 40):
        manifest = tmp_path / f"m{count}.calib.json"
        assert len(calibration_set(manifest).images) == count
        manifest.rename(tmp_path / "calib.json")  # as earlier versions called it
        assert len(calibration_set(tmp_path / "calib.json").images) == count


def test_the_output_path_must_not_overwrite_another_file(digits: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(classifier(), source)
    result = CliRunner().invoke(main, ["calibrate", str(source), "--data", str(digits), "--out", str(source)])
    assert result.exit_code == 2
    assert "the output path must differ from the input" in result.stderr
    for name in ("calib.onnx", "m.calib.onnx", "m.engine"):
        with pytest.raises(
            ConfigError, match=r"the output path must be NAME\.onnx, with a NAME that does not end in calib"
        ):
            calibrate_file(source, digits, tmp_path / name)


@pytest.mark.slow
def test_nodes_that_overflow_fp16_stay_in_fp32_next_to_int8(exported: Path, digits: Path, tmp_path: Path) -> None:
    """The output of the last two convolutions is scaled beyond 65504, and the last weights down again."""
    model = onnx.load(exported)
    last = next(node for node in model.graph.node if node.op_type == "Gemm")
    before = [node for node in model.graph.node if node.op_type == "Conv"][-2:]
    for node in before:
        for name in node.input[1:3]:
            scale_initializer(model, name, 1e6)
    scale_initializer(model, last.input[1], 1e-6)
    onnx.save(model, tmp_path / "large.onnx")
    result = calibrate_file(tmp_path / "large.onnx", digits, tmp_path / "m.onnx")
    assert result.agreement >= 0.95
    types = tensor_types(onnx.load(tmp_path / "m.onnx"))
    outputs = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    assert {types[name].elem_type for name in outputs[-2:]} == {onnx.TensorProto.FLOAT}
    assert {types[name].elem_type for name in outputs[:-2]} == {onnx.TensorProto.FLOAT16}
