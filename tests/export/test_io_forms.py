from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from PIL import Image

import runtime
from calib.precision import to_reduced
from export.cli import main
from export.io_forms import with_forms
from runtime.preprocessing import Preprocessor, normalize
from runtime.session import softmax
from runtime.spec import INPUT_FORMS, OUTPUT_FORMS, ModelSpec, Preprocessing
from tests.support.networks import classifier
from train.loop import FitResult

PREPROCESSING = Preprocessing(
    height=8, width=10, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear", crop_pct=1.0
)


def spec(**forms: Any) -> ModelSpec:
    return ModelSpec(arch="x", classes=("a", "b", "c", "d"), preprocessing=PREPROCESSING, **forms)


@pytest.fixture
def network() -> onnx.ModelProto:
    return classifier(height=8, width=10)


def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (5, 8, 10, 3), dtype=np.uint8)


def run(model: onnx.ModelProto, batch: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": batch})


def expected_output(logits: np.ndarray, output: str) -> np.ndarray:
    """Return the first output of a file with that output form."""
    if output == "logits":
        return logits
    return softmax(logits) if output == "probs" else -np.sort(-softmax(logits))


@pytest.mark.parametrize("form", INPUT_FORMS)
@pytest.mark.parametrize("output", OUTPUT_FORMS)
def test_all_forms_have_the_same_outputs(network: onnx.ModelProto, form: str, output: str) -> None:
    (logits,) = run(network, normalize(pixels(), PREPROCESSING))
    changed = with_forms(network, spec(input_form=form, output_form=output))
    found, *classes = run(changed, Preprocessor(PREPROCESSING, form).convert(pixels()))
    tolerance = 2e-3 if form == "float16 NCHW" else 1e-6
    np.testing.assert_allclose(found, expected_output(logits, output), rtol=tolerance, atol=tolerance)
    names = {"logits": ["logits"], "probs": ["probs"], "topk": ["probs", "classes"]}[output]
    assert [value.name for value in changed.graph.output] == names
    assert changed.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert ModelSpec.from_json(changed.metadata_props[0].value).input_form == form
    if classes:
        assert np.array_equal(classes[0][:, 0], logits.argmax(1))


@pytest.mark.parametrize("output", OUTPUT_FORMS)
def test_fp16_input_and_output_need_no_casts(network: onnx.ModelProto, output: str) -> None:
    half = to_reduced(network, "fp16")
    changed = with_forms(half, spec(input_form="float16 NCHW", output_form=output), half_output=True)
    kinds = [value.type.tensor_type.elem_type for value in (changed.graph.input[0], changed.graph.output[0])]
    assert kinds == [onnx.TensorProto.FLOAT16] * 2
    casts = [node.op_type for node in changed.graph.node].count("Cast")
    assert casts == (0 if output == "logits" else 2)  # probabilities are computed in float32
    (logits,) = run(network, normalize(pixels(), PREPROCESSING))
    found = run(changed, Preprocessor(PREPROCESSING, "float16 NCHW").convert(pixels()))[0]
    np.testing.assert_allclose(found.astype(np.float32), expected_output(logits, output), rtol=1e-2, atol=1e-2)


def test_fp16_input_and_output_of_a_float32_network_are_cast(network: onnx.ModelProto) -> None:
    changed = with_forms(network, spec(input_form="float16 NCHW"), half_output=True)
    assert [node.op_type for node in changed.graph.node][::5] == ["Cast", "Cast"]


def test_pixels_are_normalized_bit_for_bit_as_in_preprocessing(network: onnx.ModelProto) -> None:
    changed = with_forms(network, spec(input_form="uint8 NHWC"))
    inside = onnx.helper.make_tensor_value_info("advprop/normalized", onnx.TensorProto.FLOAT, None)
    changed.graph.output.append(inside)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(changed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (normalized,) = session.run(["advprop/normalized"], {"input": pixels()})
    assert np.array_equal(normalized, normalize(pixels(), PREPROCESSING))


@pytest.mark.slow
def test_files_with_pixel_input_and_probabilities_predict_like_the_plain_file(
    trained: FitResult, tmp_path: Path
) -> None:
    """The FP32 and FP16 files run; the engine is only built."""
    arguments = [str(trained.last), "--out", str(tmp_path / "pixels"), "--trt", "fp16", "--sm", "86"]
    result = CliRunner().invoke(main, [*arguments, "--input", "uint8-nhwc", "--output", "probs"])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(main, [str(trained.last), "--out", str(tmp_path / "plain")]).exit_code == 0
    images = [Image.fromarray(image) for image in np.random.default_rng(2).integers(0, 256, (4, 40, 30), np.uint8)]
    with runtime.load(tmp_path / "plain" / "model.onnx") as plain:
        expected = plain.predict(images)
    for name, tolerance in (("model.onnx", 1e-6), ("model.fp16.onnx", 0.02)):
        with runtime.load(tmp_path / "pixels" / name) as session:
            assert session.backend.input.dtype == np.uint8
            answers = session.predict(images)
        for answer, truth in zip(answers, expected, strict=True):
            np.testing.assert_allclose(answer.probabilities, truth.probabilities, atol=tolerance)
    assert (tmp_path / "pixels" / "model.fp16.engine").stat().st_size > 1e6
