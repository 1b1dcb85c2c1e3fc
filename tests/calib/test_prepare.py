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
from calib.prepare import prepare_model, read_float_model
from export.io_forms import with_forms
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.model import OPSET, run_batches
from runtime.spec import ModelSpec, Preprocessing
from tests.support.networks import classifier, graph

PREPROCESSING = Preprocessing(
    height=8, width=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation="bilinear", crop_pct=1.0
)


def foreign(path: Path, opset: int = 13, batch: str = "1", size: int = 8) -> Path:
    """Write a network like other tools do: fixed batch, BatchNorm, weights in Constant nodes, no node names."""
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


def test_the_file_of_another_tool_is_calibrated_from_the_command_line(tmp_path: Path) -> None:
    source = foreign(tmp_path / "other.onnx")
    photos = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", photos)
    command = ["calibrate", str(source), "--data", str(tmp_path / "photos.npy"), "--no-cache"]
    refused = CliRunner().invoke(main, command)
    assert (refused.exit_code, "or pass the preprocessing: --img-size, --mean" in refused.stderr) == (2, True)
    command += ["--img-size", "8", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.2,0.2", "--interpolation", "bilinear"]
    result = CliRunner().invoke(main, [*command, "--crop-pct", "1.0", "--rest", "fp32"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 layers in INT8" in result.output
    with runtime.load(tmp_path / "other.int8.onnx") as session:
        assert session.spec.preprocessing == PREPROCESSING
        found = [session.predict([photo])[0].index for photo in photos]
    normalized = ((photos / 255 - PREPROCESSING.mean) / PREPROCESSING.std).astype(np.float32).transpose(0, 3, 1, 2)
    expected = run_batches(onnx.load(source), [image[None] for image in normalized]).argmax(1)
    assert np.mean(np.asarray(found) == expected) >= 0.9


def test_batch_norms_are_folded_and_nodes_named(tmp_path: Path) -> None:
    path = foreign(tmp_path / "m.onnx", batch="n")
    model = prepare_model(path, PREPROCESSING)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert model.opset_import[0].version == OPSET
    images = np.random.default_rng(1).normal(size=(3, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run_batches(model, [images]), run_batches(onnx.load(path), [images]), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": 16}, r"has float input \[1, 3, 16, 16\]; expected float \[any or 1, 3, 8, 8\].*--img-size"),
        ({"batch": "4"}, r"has float input \[4, 3, 8, 8\]"),
    ],
)
def test_other_input_shapes_are_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelFileError, match=expected):
        prepare_model(foreign(tmp_path / "m.onnx", **changes), PREPROCESSING)


def test_an_unknown_operator_is_an_error(tmp_path: Path) -> None:
    model = graph(
        "a = Conv(input, w) b = Mystery(a) p = GlobalAveragePool(a) logits = Flatten(p)", w=np.ones((4, 3, 1, 1))
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"ONNX Runtime cannot run .*m.onnx: .*Mystery"):
        prepare_model(tmp_path / "m.onnx", PREPROCESSING)


def test_only_float32_files_with_logits_and_one_preprocessing_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(classifier(), path)
    with pytest.raises(ModelFileError, match=r"has no advprop.spec"):
        read_float_model(path, None)
    onnx.save(to_reduced(classifier(), "fp16"), path)
    with pytest.raises(ModelFileError, match=r"m.onnx computes in fp16; calibrate the float32 file"):
        read_float_model(path, PREPROCESSING)
    spec = ModelSpec(arch="x", classes=tuple("abcd"), preprocessing=PREPROCESSING)
    onnx.save(with_forms(classifier(), spec), path)
    assert read_float_model(path, None)[1] == PREPROCESSING
    with pytest.raises(ConfigError, match="specifies its preprocessing; remove --img-size"):
        read_float_model(path, PREPROCESSING)
    spec = ModelSpec(arch="x", classes=tuple("abcd"), preprocessing=PREPROCESSING, output_form="probs")
    onnx.save(with_forms(classifier(), spec), path)
    with pytest.raises(ModelFileError, match="float32 NCHW input and outputs probs; calibrate a file with float32"):
        read_float_model(path, None)
