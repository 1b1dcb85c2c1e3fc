from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

import runtime
from advprop.cli import main
from calib.prepare import prepared
from runtime.errors import ModelFileError
from runtime.spec import Preprocessing
from tests.support.networks import graph

SPEC = Preprocessing(
    height=8, width=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation="bilinear", crop_pct=1.0
)


def foreign(path: Path, opset: int = 13, batch: str = "1", size: int = 8) -> Path:
    """A network as other tools write it: fixed batch, BatchNorm, weights in Constant nodes, no names."""
    random = np.random.default_rng(0)
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    g (float[{batch}, 3, {size}, {size}] image) => (float[{batch}, 5] scores) {{
        a = Conv(image, w1)
        n = BatchNormalization(a, gamma, beta, mean, variance)
        r = Relu(n)
        p = GlobalAveragePool(r)
        f = Flatten(p)
        scores = Gemm <transB = 1> (f, w2)
    }}"""
    model = onnx.parser.parse_model(text)
    arrays = {
        "w1": random.normal(size=(6, 3, 3, 3)),
        "gamma": random.uniform(0.5, 2, 6),
        "beta": random.normal(size=6),
        "mean": random.normal(size=6),
        "variance": random.uniform(0.5, 2, 6),
        "w2": random.normal(size=(5, 6)),
    }
    for name, array in arrays.items():
        value = numpy_helper.from_array(array.astype(np.float32))
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=value))
    onnx.save(model, path)
    return path


def test_another_tools_file_from_the_command_line(tmp_path: Path) -> None:
    source = foreign(tmp_path / "other.onnx")
    photos = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", photos)
    command = ["calibrate", str(source), "--data", str(tmp_path / "photos.npy"), "--no-cache"]
    refused = CliRunner().invoke(main, command)
    assert (refused.exit_code, "say what it was trained with: --img-size, --mean" in refused.stderr) == (2, True)
    command += ["--img-size", "8", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2", "--interpolation", "bilinear"]
    result = CliRunner().invoke(main, [*command, "--crop-pct", "1.0", "--rest", "fp32"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 layers in INT8" in result.output
    with runtime.load(tmp_path / "other.int8.onnx") as session:
        assert session.spec.preprocessing == SPEC
        found = [session.predict([photo])[0].index for photo in photos]
    import onnxruntime as ort

    plain = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    normalized = ((photos / 255 - SPEC.mean) / SPEC.std).astype(np.float32).transpose(0, 3, 1, 2)
    expected = [plain.run(None, {"image": image[None]})[0].argmax() for image in normalized]
    assert np.mean(np.asarray(found) == expected) >= 0.9


def test_batch_norms_are_folded_and_nodes_named(tmp_path: Path) -> None:
    model = prepared(foreign(tmp_path / "m.onnx", batch="n"), SPEC)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert model.opset_import[0].version >= 19


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({"size": 16}, r"takes float \[1, 3, 16, 16\]; expected float \[any or 1, 3, 8, 8\].*--img-size"),
        ({"batch": "4"}, r"takes float \[4, 3, 8, 8\]"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, wishes: dict, expected: str) -> None:
    with pytest.raises(ModelFileError, match=expected):
        prepared(foreign(tmp_path / "m.onnx", **wishes), SPEC)


def test_an_operator_that_nobody_has(tmp_path: Path) -> None:
    model = graph(
        "a = Conv(input, w) b = Mystery(a) p = GlobalAveragePool(a) logits = Flatten(p)", w=np.ones((4, 3, 1, 1))
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"ONNX Runtime cannot run .*m.onnx: .*Mystery"):
        prepared(tmp_path / "m.onnx", SPEC)
