from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import runtime
from calib.precision import to_reduced
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.convert import convert_classifier
from runtime.graph.foreign import ForeignOptions
from runtime.graph.model import OPSET, run_batches, save_onnx
from runtime.spec import ImageSizes
from tests.support.foreign_files import CLASSES, COLOR_MEANS, HEIGHT, WEIGHTS, WIDTH, write_graph, write_network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
OPTIONS: dict[str, Any] = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 1.0}
PIXELS = np.random.default_rng(1).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)
NORMALIZED = ((PIXELS / 255 - MEAN) / STD).astype(np.float32)
"""(N, H, W, 3)."""


def predicted(path: Path, options: ForeignOptions) -> NDArray[np.float32]:
    """Convert a file, and return the probabilities that a session predicts for PIXELS."""
    target = path.with_suffix(".converted.onnx")
    save_onnx(convert_classifier(path, options).model, target)
    with runtime.load(target, device="cpu") as session:
        assert session.backend.input.name == "input"
        return np.stack([prediction.probabilities for prediction in session.predict(list(PIXELS))])


def softmax(logits: NDArray[Any]) -> NDArray[Any]:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def scores_of(images_NHWC: NDArray[Any]) -> NDArray[Any]:
    """Return what COLOR_MEANS computes."""
    return images_NHWC.mean((1, 2)) @ WEIGHTS.T.astype(np.float32)


def test_batch_norms_are_folded_and_nodes_named(tmp_path: Path) -> None:
    path = write_network(tmp_path / "m.onnx", batch="n")
    model = convert_classifier(path, ForeignOptions(**OPTIONS)).model
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert model.opset_import[0].version == OPSET
    assert [model.graph.input[0].name, model.graph.output[0].name] == ["input", "logits"]
    images = NORMALIZED.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(run_batches(model, [images]), run_batches(onnx.load(path), [images]), rtol=1e-4)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 20, 22])
def test_a_file_of_any_opset_predicts_like_the_original(tmp_path: Path, opset: int) -> None:
    path = write_network(tmp_path / "m.onnx", opset)
    images = [image[None] for image in NORMALIZED.transpose(0, 3, 1, 2)]
    expected = softmax(run_batches(onnx.load(path), images))
    np.testing.assert_allclose(predicted(path, ForeignOptions(**OPTIONS)), expected, rtol=1e-3, atol=1e-5)


def test_a_network_of_bgr_images_gets_bgr_images(tmp_path: Path) -> None:
    path = write_network(tmp_path / "conv.onnx")
    images = [image[None] for image in np.ascontiguousarray(NORMALIZED[..., ::-1]).transpose(0, 3, 1, 2)]
    expected = softmax(run_batches(onnx.load(path), images))
    options = ForeignOptions(**OPTIONS, bgr=True)
    np.testing.assert_allclose(predicted(path, options), expected, rtol=1e-3, atol=1e-5)
    assert "Gather" not in {node.op_type for node in convert_classifier(path, options).model.graph.node}


def test_bgr_images_of_other_operators_are_reordered_in_the_graph(tmp_path: Path) -> None:
    body = COLOR_MEANS.replace("(x)", "(image)")
    path = write_graph(tmp_path / "m.onnx", body, "float[n, 3, 8, 12] image", w=WEIGHTS)
    expected = softmax(scores_of(NORMALIZED[..., ::-1]))
    np.testing.assert_allclose(predicted(path, ForeignOptions(**OPTIONS, bgr=True)), expected, rtol=1e-3)


def test_channels_last_images_become_channels_first(tmp_path: Path) -> None:
    body = "x = Transpose <perm = [0, 3, 1, 2]> (image) " + COLOR_MEANS
    path = write_graph(tmp_path / "m.onnx", body, "float[n, 8, 12, 3] image", w=WEIGHTS)
    converted = convert_classifier(path, ForeignOptions(**OPTIONS))
    assert "Transpose" not in {node.op_type for node in converted.model.graph.node}
    assert (converted.spec.preprocessing.height, converted.spec.preprocessing.width) == (HEIGHT, WIDTH)
    expected = softmax(scores_of(NORMALIZED))
    np.testing.assert_allclose(predicted(path, ForeignOptions(**OPTIONS)), expected, rtol=1e-3)


def test_an_ambiguous_layout_must_be_given(tmp_path: Path) -> None:
    body = "x = Transpose <perm = [0, 3, 1, 2]> (image) " + COLOR_MEANS
    path = write_graph(tmp_path / "m.onnx", body, "float[n, h, w, c] image", w=WEIGHTS)
    sizes = ImageSizes.parse("8x12")
    with pytest.raises(ModelFileError, match=r"pass --layout NCHW .channels first. or --layout NHWC"):
        convert_classifier(path, ForeignOptions(**OPTIONS, image_sizes=sizes))
    expected = softmax(scores_of(NORMALIZED))
    options = ForeignOptions(**OPTIONS, image_sizes=sizes, layout="NHWC")
    np.testing.assert_allclose(predicted(path, options), expected, rtol=1e-3)


def test_uint8_pixels_that_the_file_normalizes_become_floats(tmp_path: Path) -> None:
    body = "t = Transpose <perm = [0, 3, 1, 2]> (image) c = Cast <to = 1> (t) x = Div(c, s) " + COLOR_MEANS
    path = write_graph(tmp_path / "m.onnx", body, "uint8[n, 8, 12, 3] image", w=WEIGHTS, s=255.0)
    options = ForeignOptions(interpolation="bilinear", crop_pct=1.0)
    np.testing.assert_allclose(predicted(path, options), softmax(scores_of(PIXELS / 255)), rtol=1e-3)
    with pytest.raises(ConfigError, match="uint8 input, which the file normalizes itself; remove --mean and --std"):
        convert_classifier(path, ForeignOptions(**OPTIONS))


def test_arithmetic_with_uint8_pixels_is_refused(tmp_path: Path) -> None:
    body = "d = Max(image, image) x = Cast <to = 1> (d) " + COLOR_MEANS
    path = write_graph(tmp_path / "m.onnx", body, "uint8[n, 3, 8, 12] image", w=WEIGHTS)
    with pytest.raises(ModelFileError, match=r"Max.* computes with uint8 pixels; expected a Cast to float first"):
        convert_classifier(path, ForeignOptions())


def test_an_output_with_trailing_dimensions_is_flattened(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path / "m.onnx",
        "p = GlobalAveragePool(image) scores = Conv(p, w)",
        "float[n, 3, 8, 12] image",
        "float[n, 5, 1, 1] scores",
        w=WEIGHTS[:, :, None, None],
    )
    expected = softmax(scores_of(NORMALIZED))
    np.testing.assert_allclose(predicted(path, ForeignOptions(**OPTIONS)), expected, rtol=1e-3)


def test_probabilities_are_not_taken_for_logits(tmp_path: Path) -> None:
    body = COLOR_MEANS.replace("(x)", "(image)").replace("scores =", "z =") + " scores = Softmax(z)"
    path = write_graph(tmp_path / "m.onnx", body, "float[n, 3, 8, 12] image", w=WEIGHTS)
    options = ForeignOptions(**OPTIONS)
    assert convert_classifier(path, options).spec.output_form == "probs"
    np.testing.assert_allclose(predicted(path, options), softmax(scores_of(NORMALIZED)), rtol=1e-3)


def test_one_of_several_outputs_is_chosen_by_name(tmp_path: Path) -> None:
    body = COLOR_MEANS.replace("(x)", "(image)")
    outputs = "float[n, 3] f, float[n, 5] scores"
    path = write_graph(tmp_path / "m.onnx", body, "float[n, 3, 8, 12] image", outputs, w=WEIGHTS)
    with pytest.raises(ModelFileError, match=r"2 outputs: f .*, scores .*--output NAME"):
        convert_classifier(path, ForeignOptions(**OPTIONS))
    with pytest.raises(ConfigError, match=r"no output is called 'score'.*did you mean scores"):
        convert_classifier(path, ForeignOptions(**OPTIONS, output="score"))
    options = ForeignOptions(**OPTIONS, output="scores")
    np.testing.assert_allclose(predicted(path, options), softmax(scores_of(NORMALIZED)), rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "given", "found"),
    [("8, 12", None, [8, 12]), ("h, w", "8x12", [8, 12]), ("h, w", "8:12:16", [-1, -1]), ("8, 12", "8x12", [8, 12])],
)
def test_the_image_size_is_that_of_the_file_or_of_the_option(
    tmp_path: Path, size: str, given: str | None, found: list[int]
) -> None:
    path = write_network(tmp_path / "m.onnx", size=size)
    sizes = ImageSizes.parse(given) if given else None
    converted = convert_classifier(path, ForeignOptions(**OPTIONS, image_sizes=sizes))
    dims = converted.model.graph.input[0].type.tensor_type.shape.dim[2:]
    assert [dim.dim_value or -1 for dim in dims] == found
    size_in_spec = (converted.spec.preprocessing.height, converted.spec.preprocessing.width)
    assert size_in_spec == (sizes.usual if sizes else (HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("size", "given", "message"),
    [
        ("h, w", None, "images of several sizes .any × any pixels.; set the size with --img-size HxW"),
        ("8, w", None, "images of several sizes .8 × any pixels."),
        ("8, 12", "12x8", "has images of 8 × 12 pixels, and --img-size is 12x8; remove --img-size"),
        ("8, 12", "8:12:16", "has images of 8 × 12 pixels, and --img-size is 8x8:12x12:16x16"),
    ],
)
def test_an_image_size_that_does_not_fit_is_refused(tmp_path: Path, size: str, given: str | None, message: str) -> None:
    path = write_network(tmp_path / "m.onnx", size=size)
    sizes = ImageSizes.parse(given) if given else None
    with pytest.raises(ConfigError, match=message):
        convert_classifier(path, ForeignOptions(**OPTIONS, image_sizes=sizes))


def test_classes_are_named_by_the_options_or_by_numbers(tmp_path: Path) -> None:
    path = write_network(tmp_path / "m.onnx")
    assert convert_classifier(path, ForeignOptions(**OPTIONS)).spec.classes == ("0", "1", "2", "3", "4")
    names = tuple("abcde")
    assert convert_classifier(path, ForeignOptions(**OPTIONS, classes=names)).spec.classes == names
    with pytest.raises(ConfigError, match=rf"has 4 names \(the first is 'a'\), but the model has {CLASSES} outputs"):
        convert_classifier(path, ForeignOptions(**OPTIONS, classes=names[:4]))


def test_names_that_the_graph_uses_already_are_replaced(tmp_path: Path) -> None:
    body = "logits = GlobalAveragePool(image) input = Flatten(logits) scores = Gemm <transB = 1> (input, w)"
    path = write_graph(tmp_path / "m.onnx", body, "float[n, 3, 8, 12] image", w=WEIGHTS)
    np.testing.assert_allclose(predicted(path, ForeignOptions(**OPTIONS)), softmax(scores_of(NORMALIZED)), rtol=1e-3)


def test_a_float_input_needs_its_normalization(tmp_path: Path) -> None:
    path = write_network(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"does not contain the normalization.*advprop convert"):
        convert_classifier(path, ForeignOptions())


def test_a_file_with_a_spec_is_refused(tmp_path: Path) -> None:
    path = write_network(tmp_path / "m.onnx")
    model = convert_classifier(path, ForeignOptions(**OPTIONS)).model
    save_onnx(model, path)
    with pytest.raises(ConfigError, match=r"contains an advprop.spec.*use the file as it is, and remove the options"):
        convert_classifier(path, ForeignOptions(**OPTIONS))


def test_files_that_are_not_float32_are_refused(tmp_path: Path) -> None:
    source = write_network(tmp_path / "m.onnx")
    model = convert_classifier(source, ForeignOptions(**OPTIONS)).model
    half = to_reduced(model, "fp16")
    del half.metadata_props[:]
    save_onnx(half, tmp_path / "half.onnx")
    with pytest.raises(ModelFileError, match="has FLOAT16 weights; use the float32 file that it was made from"):
        convert_classifier(tmp_path / "half.onnx", ForeignOptions(**OPTIONS))
    body = "q = QuantizeLinear(image, s, z) x = DequantizeLinear(q, s, z) " + COLOR_MEANS
    path = write_graph(
        tmp_path / "q.onnx", body, "float[n, 3, 8, 12] image", w=WEIGHTS, s=0.1, z=np.asarray(0, np.int8)
    )
    with pytest.raises(ModelFileError, match="is quantized already: it contains DequantizeLinear"):
        convert_classifier(path, ForeignOptions(**OPTIONS))


@pytest.mark.parametrize(
    "image", ["float[n, 3, 8, 12] image, float[n] other", "float[n, 96] image", "float[n, 4, 8, 12] image"]
)
def test_other_inputs_are_refused(tmp_path: Path, image: str) -> None:
    body = "p = ReduceMean(image) scores = Mul(p, w)"
    path = write_graph(tmp_path / "m.onnx", body, image, w=WEIGHTS)
    with pytest.raises(ModelFileError, match=r"expected one input of images with four dimensions|--layout NCHW"):
        convert_classifier(path, ForeignOptions(**OPTIONS))


def test_sizes_of_minus_one_are_open_sizes(tmp_path: Path) -> None:
    path = write_graph(
        tmp_path / "m.onnx",
        "z = Shape(image) r = Reshape(image, z) " + COLOR_MEANS.replace("(x)", "(r)"),
        "float[n, 3, h, w] image",
        w=WEIGHTS,
    )
    model = onnx.load(path)
    for axis in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = -1
    onnx.save(model, path)
    options = ForeignOptions(**OPTIONS, image_sizes=ImageSizes.parse("8x12"))
    np.testing.assert_allclose(predicted(path, options), softmax(scores_of(NORMALIZED)), rtol=1e-3)
