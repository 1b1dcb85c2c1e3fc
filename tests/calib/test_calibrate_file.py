import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

import runtime
from advprop.cli import main
from calib.config import CalibrationConfig
from calib.images import calibration_set
from calib.pipeline import calibrate_file
from calib.precision import to_reduced
from calib.ptq import calibrate
from export.pipeline import export_checkpoint
from runtime.errors import ConfigError, DataError, ModelFileError
from runtime.graph.model import open_session
from runtime.graph.rounding import with_roundings
from tests.support.networks import classifier, graph
from train.data import embedded_digits
from train.loop import FitResult


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    for number, pixels in enumerate(embedded_digits().val.images[:60]):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def exported(trained: FitResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(trained.last, out=tmp_path_factory.mktemp("int8")).onnx


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
def test_a_checkpoint_to_an_int8_engine(trained: FitResult, digits: Path, tmp_path: Path) -> None:
    result = export_checkpoint(trained.last, out=tmp_path, precision="int8", calib_data=digits, engine=True, sm=(89,))
    assert result.engine_info.precision == "int8"
    assert result.reduced_parity.agreement >= 0.95
    assert {path.name for path in tmp_path.iterdir()} == {
        *("model.onnx", "model.int8.onnx", "model.int8.json", "calib.json", "export.json", "model.int8.ranges.png"),
        *("model.int8.engine", "model.int8.engine.json"),
    }


@pytest.mark.slow
def test_the_same_images_give_the_same_bytes(exported: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first = calibrate_file(exported, digits, tmp_path / "m.int8.onnx", CalibrationConfig(images=40))
    second = calibrate_file(exported, tmp_path / "calib.json", tmp_path / "again" / "m.int8.onnx")
    assert first.images == second.images
    assert len(first.images.images) == 40
    for name in ("m.int8.onnx", "m.int8.json", "calib.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_manifest_holds_to_its_images(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "photos"
    copy.mkdir()
    for path in sorted(digits.iterdir())[:3]:
        (copy / path.name).write_bytes(path.read_bytes())
    calibration_set(copy).save(tmp_path / "calib.json")
    assert calibration_set(tmp_path / "calib.json") == calibration_set(copy)
    (copy / "01.png").write_bytes((copy / "00.png").read_bytes())
    with pytest.raises(DataError, match=r"01\.png is not the image that .*its content has changed"):
        calibration_set(tmp_path / "calib.json")
    (copy / "01.png").unlink()
    with pytest.raises(DataError, match="names an image that is not there"):
        calibration_set(tmp_path / "calib.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such manifest"), ("[]", "is not the manifest"), ('{"format": "other"}', "has format 'other'")],
)
def test_what_is_no_manifest(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "calib.json").write_text(content)
    with pytest.raises(DataError, match=expected):
        calibration_set(tmp_path / "calib.json")


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing of that name"):
        calibration_set(tmp_path / "none")
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(DataError, match="found 1 images, none of which can be used"):
        calibration_set(tmp_path)


def batches(images: np.ndarray):
    return lambda count: iter([images[: count or None]])


def test_few_images_and_dead_ones_are_told(caplog: pytest.LogCaptureFixture) -> None:
    images = np.random.default_rng(1).normal(size=(6, 3, 8, 8)).astype(np.float32)
    assert calibrate(classifier(), batches(images)).int8_share == 1.0
    assert "6 calibration images are few: at least 32, better 256" in caplog.text
    with pytest.raises(DataError, match="every tensor is zero"):
        calibrate(classifier(), batches(np.zeros_like(images)))
    with pytest.raises(ConfigError, match="method must be auto"):
        CalibrationConfig(method="best")
    with pytest.raises(ConfigError, match=r"no convolution or matrix product is called 'Conv_1'; did you mean Conv_0"):
        calibrate(classifier(), batches(images), CalibrationConfig(keep=("Conv_1",)))
    with pytest.raises(ModelFileError, match="nothing to quantize"):
        calibrate(classifier(), batches(images), CalibrationConfig(keep=("Conv_0",)))
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="the tensor input has values that are not finite"):
        calibrate(classifier(), batches(images))


def test_a_file_that_does_not_say_its_preprocessing(digits: Path, tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"carries no advprop.spec"):
        calibrate_file(tmp_path / "m.onnx", digits, tmp_path / "m.int8.onnx")
    onnx.save(to_reduced(classifier(), "fp16"), tmp_path / "half.onnx")
    with pytest.raises(ModelFileError, match=r"half.onnx computes in fp16; calibrate the float32 file"):
        calibrate_file(tmp_path / "half.onnx", digits, tmp_path / "m.int8.onnx")
    same = CliRunner().invoke(
        main,
        ["calibrate", str(tmp_path / "m.onnx"), "--data", str(digits), "--out", str(tmp_path / "m.onnx")],
    )
    assert (same.exit_code, "the INT8 file is one of its own" in same.stderr) == (2, True)


def test_a_tensor_of_zeros_stays_in_floating_point() -> None:
    """Nothing passes the first ReLU."""
    body = """a = Conv(input, w1, low) r = Relu(a) b = Conv(r, w2) p = GlobalAveragePool(b) logits = Flatten(p)"""
    random = np.random.default_rng(0)
    weights = {"w1": random.normal(size=(5, 3, 3, 3)), "w2": random.normal(size=(4, 5, 1, 1))}
    model = graph(body, low=np.full(5, -1000.0), **weights)
    images = random.normal(size=(4, 3, 8, 8)).astype(np.float32)
    points = calibrate(model, batches(images)).points
    assert [(point.node, point.int8) for point in points] == [("Conv_0", True), ("Conv_2", False)]
    assert "zero on every calibration image" in points[1].reason


def test_matrix_products_are_quantized_by_their_last_axis_and_keep_no_bias() -> None:
    body = """f = Flatten(input) m = MatMul(f, w1) r = Relu(m) logits = Gemm(r, w2, b)"""
    random = np.random.default_rng(0)
    w1 = random.normal(size=(192, 6)) * np.geomspace(1, 100, 6)
    model = graph(body, w1=w1, w2=random.normal(size=(6, 4)), b=random.normal(size=4))
    images = random.normal(size=(40, 3, 8, 8)).astype(np.float32)
    calibrated = calibrate(model, batches(images))
    assert [(point.op, point.axis, point.int8) for point in calibrated.points] == [
        ("MatMul", 1, True),
        ("Gemm", 1, True),
    ]
    exact, found = (open_session(graph_).run(None, {"input": images})[0] for graph_ in (model, calibrated.model))
    assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.slow
def test_what_overflows_fp16_stays_in_fp32_beside_int8(exported: Path, digits: Path, tmp_path: Path) -> None:
    """A layer's output is scaled beyond 65504 and the next one's weights down again."""
    model = onnx.load(exported)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    last = next(node for node in model.graph.node if node.op_type == "Gemm")
    before = [node for node in model.graph.node if node.op_type == "Conv"][-2:]
    factor = np.float32(1e6)
    for node in (*before, last):
        change = factor if node is not last else 1 / factor
        for name in node.input[1 : 2 if node is last else 3]:
            array = onnx.numpy_helper.to_array(constants[name])
            constants[name].CopyFrom(onnx.numpy_helper.from_array(array * np.float32(change), name))
    onnx.save(model, tmp_path / "large.onnx")
    result = calibrate_file(tmp_path / "large.onnx", digits, tmp_path / "m.onnx")
    assert result.parity_images > 0
    logits = open_session(with_roundings(onnx.load(tmp_path / "m.onnx"))).run(
        None, {"input": np.zeros((1, 3, 32, 32), "f4")}
    )
    assert np.isfinite(logits[0]).all()
