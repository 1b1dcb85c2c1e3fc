import asyncio
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import runtime
from runtime.errors import BackendUnavailable, ConfigError, DataError, InputError, ModelFileError, SpecError
from runtime.session import softmax
from runtime.spec import METADATA_KEY, ModelSpec, Preprocessing
from runtime.system.gpu import find_gpu

SPEC = ModelSpec(
    arch="toy",
    classes=("red", "green", "blue"),
    preprocessing=Preprocessing(
        height=4, width=4, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest", crop_pct=1.0
    ),
)


def write(path: Path, body: str = "p = GlobalAveragePool(input) logits = Flatten(p)", **kinds: str) -> Path:
    """Write a model whose logits are the mean of each color."""
    kind, channels = kinds.get("input", "float"), kinds.get("outputs", "float[n, 3] logits")
    text = f"""<ir_version: 9, opset_import: ["" : 20]> g ({kind}[n, 3, 4, 4] input) => ({channels}) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    if kinds.get("spec", SPEC.to_json()):
        onnx.helper.set_model_props(model, {METADATA_KEY: kinds.get("spec", SPEC.to_json())})
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "toy.onnx")


def color(red: int, green: int, blue: int) -> np.ndarray:
    return np.full((5, 7, 3), (red, green, blue), np.uint8)


def test_predict_returns_labels_and_probabilities_in_order(model: Path) -> None:
    images = [color(200, 0, 0), color(0, 0, 250), color(0, 90, 0), color(0, 0, 9)]
    with runtime.load(model) as session:
        predictions = session.predict(images, batch_size=3)
        assert session.predict([]) == []
    assert [prediction.label for prediction in predictions] == ["red", "blue", "green", "blue"]
    first = predictions[0]
    expected = np.exp([200 / 255, 0, 0]) / np.exp([200 / 255, 0, 0]).sum()
    np.testing.assert_allclose(first.probabilities, expected, rtol=1e-5)
    assert first.probability == pytest.approx(expected[0], rel=1e-5)
    assert SPEC.classes[first.index] == first.label


def test_run_accepts_a_preprocessed_batch(model: Path) -> None:
    batch = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    with runtime.load(model) as session:
        np.testing.assert_allclose(session.run(batch), batch.mean((2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 3, 4, 4)),
        np.zeros((1, 3, 4, 5), np.float32),
        np.zeros((3, 4, 4), np.float32),
        np.zeros((0, 3, 4, 4), np.float32),
        [[1.0]],
    ],
)
def test_run_rejects_invalid_batches(model: Path, batch: object) -> None:
    with runtime.load(model) as session, pytest.raises(InputError, match="found"):
        session.run(batch)


def test_predict_rejects_anything_but_a_list(model: Path) -> None:
    images: list[Any] = ["a.jpg", Path("a.jpg"), color(0, 0, 0), b"bytes", Image.new("RGB", (4, 4)), None]
    with runtime.load(model) as session:
        for single in images:
            with pytest.raises(InputError, match=r"put a single image in a list: \[image\]"):
                session.predict(single)
        with pytest.raises(ConfigError, match="batch_size must be at least 1"):
            session.predict([color(0, 0, 0)], batch_size=0)
        with pytest.raises(DataError, match=r"no such image file: a\.jpg"):
            session.predict(["a.jpg"])


def test_stats_count_completed_and_failed_calls(model: Path) -> None:
    with runtime.load(model) as session:
        session.predict([color(0, 0, 0)] * 5, batch_size=2)
        session.run(np.zeros((3, 3, 4, 4), np.float32))
        with pytest.raises(DataError):
            session.predict([color(0, 0, 0), "none.jpg"])
        with pytest.raises(InputError):
            session.run(np.zeros((3, 3, 4, 4)))
        stats = session.stats
    assert (stats.calls, stats.images, stats.failed, stats.running) == (2, 8, 2, 0)


def test_calls_on_a_closed_session_fail(model: Path) -> None:
    session = runtime.load(model)
    assert "onnxruntime on" in repr(session)
    session.close()
    session.close()
    assert "closed" in repr(session)
    with pytest.raises(InputError, match="is closed; load it again"):
        session.predict([color(0, 0, 0)])


def test_a_model_without_a_spec_runs_but_cannot_predict(tmp_path: Path) -> None:
    with runtime.load(write(tmp_path / "plain.onnx", spec="")) as session:
        assert session.run(np.zeros((1, 3, 4, 4), np.float32)).shape == (1, 3)
        with pytest.raises(SpecError, match=r"plain\.onnx has no advprop\.spec"):
            session.predict([color(0, 0, 0)])


def test_predict_fails_if_the_spec_has_another_number_of_classes(tmp_path: Path) -> None:
    spec = SPEC.to_json().replace('["red","green","blue"]', '["red","green"]')
    with (
        runtime.load(write(tmp_path / "two.onnx", spec=spec)) as session,
        pytest.raises(SpecError, match="3 outputs but its spec names 2 classes"),
    ):
        session.predict([color(0, 0, 0)])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.onnx", None, "no such model file"),
        ("text.onnx", b"hello", "text.onnx is not an ONNX file, or is truncated"),
        ("empty.onnx", b"", "empty.onnx is not an ONNX file: it is empty"),
        ("model.engine", b"plan", "no such file: .*model.engine.json; build it again: advprop build"),
    ],
)
def test_load_rejects_files_that_are_not_models(
    tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=expected):
        runtime.load(tmp_path / name)


def test_load_rejects_models_that_are_not_classifiers(tmp_path: Path) -> None:
    two = write(
        tmp_path / "two.onnx",
        "p = GlobalAveragePool(input) a = Flatten(p) logits = Flatten(p)",
        outputs="float[n, 3] a, float[n, 3] logits",
    )
    with pytest.raises(ModelFileError, match=r"has 2 outputs \(.*\), expected 1; .*advprop convert"):
        runtime.load(two)
    image = write(tmp_path / "image.onnx", "logits = Relu(input)", outputs="float[n, 3, 4, 4] logits")
    with pytest.raises(ModelFileError, match="with 2 dimensions"):
        runtime.load(image)


def test_load_rejects_unknown_backends_and_devices(model: Path) -> None:
    with pytest.raises(ConfigError, match="backend must be auto, onnxruntime, onnxruntime-tensorrt or tensorrt"):
        runtime.load(model, backend="tflite")
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda"):
        runtime.load(model, device="tpu")


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_cuda_without_a_gpu_reports_what_is_missing(model: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no NVIDIA GPU or driver was found"):
        runtime.load(model, device="cuda")
    with runtime.load(model, device="auto") as session:
        assert session.backend.device == "cpu"


def test_softmax_of_large_logits() -> None:
    found = softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], np.float32))
    np.testing.assert_allclose(found, [[1.0, 0.0], [0.5, 0.5]])
    assert found.dtype == np.float32


def test_predict_converts_images_to_the_input_type(tmp_path: Path) -> None:
    path = write(tmp_path / "half.onnx", input="float16", outputs="float16[n, 3] logits")
    with runtime.load(path) as session:
        assert session.predict([color(0, 200, 0)])[0].label == "green"


def test_the_spec_comes_from_the_file(model: Path) -> None:
    with runtime.load(model) as session:
        assert session.spec == SPEC


def test_images_above_the_limit_are_refused_and_the_session_goes_on(model: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(color(200, 0, 0)).save(file, "PNG")
    with pytest.raises(ConfigError, match="max_pixels must be at least 1; found 0"):
        runtime.load(model, max_pixels=0)
    with runtime.load(model, max_pixels=34) as session:
        with pytest.raises(DataError, match="the image has 7×5 pixels; the limit is 34 pixels"):
            session.predict([file.getvalue()])
        with pytest.raises(DataError, match="the limit is 34 pixels"):
            session.submit_predict([file.getvalue()]).result()
        assert session.predict([color(200, 0, 0)])[0].label == "red"  # pixels are decoded already
    with runtime.load(model, max_pixels=35) as session:
        assert session.predict([file.getvalue()])[0].label == "red"


def test_the_spec_decides_whether_photographs_are_rotated(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = (250, 0, 0)  # red above blue
    pixels[2:] = (0, 0, 120)
    exif = Image.Exif()
    exif[0x0112] = 3
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    body = "top = Slice(input, zero, two, axis) p = GlobalAveragePool(top) logits = Flatten(p)"
    constants = "zero = Constant<value_ints=[0]>() two = Constant<value_ints=[2]>() axis = Constant<value_ints=[2]>()"
    labels = []
    for rule in ("ignore", "upright"):
        spec = replace(SPEC, preprocessing=replace(SPEC.preprocessing, exif=rule))
        path = write(tmp_path / f"{rule}.onnx", f"{constants} {body}", spec=spec.to_json())
        with runtime.load(path) as session:
            labels.append(session.predict([file.getvalue()])[0].label)
    assert labels == ["red", "blue"]


def test_a_prediction_has_labels_plain_values_and_a_short_repr(model: Path) -> None:
    with runtime.load(model) as session:
        (answer, again) = session.predict([color(200, 100, 0)] * 2)
    assert [(label, index) for label, _, index in answer.top(2)] == [("red", 0), ("green", 1)]
    assert answer.top(1)[0] == (answer.label, answer.probability, answer.index)
    assert len(answer.top()) == 3
    values = json.loads(json.dumps(answer.to_dict(top=2)))
    assert {name: values[name] for name in ("label", "index")} == {"label": "red", "index": 0}
    assert values["top"][0]["label"] == "red"
    assert sum(ranked["probability"] for ranked in answer.to_dict()["top"]) == pytest.approx(1)
    assert list(values["top"][1]) == ["label", "probability", "index"]
    assert tuple(values["top"][1].values()) == answer.top(2)[1]
    assert (
        repr(answer)
        == f"<Prediction 'red' {answer.probability:.1%}, "
        + ", ".join(f"{label!r} {probability:.1%}" for label, probability, _ in answer.top(3)[1:])
        + ">"
    )
    assert answer == again
    assert len({answer, again}) == 1


def test_stats_count_every_way_in(model: Path) -> None:
    batch = np.zeros((2, 3, 4, 4), np.float32)

    async def ask(session: runtime.Session) -> None:
        await session.arun(batch)
        await session.apredict([color(0, 0, 0)])

    with runtime.load(model) as session:
        session.run(batch)
        session.run_outputs(batch)
        session.predict([color(0, 0, 0)] * 3)
        session.submit(batch).result(30)
        session.submit_predict([color(0, 0, 0)]).result(30)
        asyncio.run(ask(session))
        with pytest.raises(DataError):
            session.submit_predict(["none.jpg"]).result(30)
    stats = session.stats
    assert (stats.calls, stats.images, stats.failed, stats.running) == (7, 2 + 2 + 3 + 2 + 1 + 2 + 1, 1, 0)
    assert (stats.batcher.answered, stats.batcher.answered_images) == (4, 6)


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("https://example.org/a.jpg", "curl -LO https://example.org/a.jpg"),
        ("http://example.org/a.jpg?size=1&b", "curl -LO 'http://example.org/a.jpg?size=1&b'"),
        ("s3://bucket/a.jpg", "copy it to this machine"),
    ],
)
def test_urls_are_refused_as_urls(model: Path, url: str, fix: str) -> None:
    with runtime.load(model) as session:
        for image in (url, Path(url)):
            with pytest.raises(DataError, match="is a URL; expected a local image file") as error:
                session.predict([image])
            assert url in str(error.value)
            assert fix in str(error.value)
    for name in (url, url.replace("a.jpg", "model.pt")):
        with pytest.raises(ModelFileError, match="is a URL; expected a local model file"):
            runtime.load(name)
