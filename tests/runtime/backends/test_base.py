"""The checks, splitting and padding that all backends share, with ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import runtime
from runtime.backends.base import Backend, TensorInfo
from runtime.backends.open import warm_up
from runtime.device.views import DeviceView
from runtime.errors import ConfigError, InputError, RunFailed
from tests.support.serving_models import FRAGILE, SPEC, images_of, serving_model

NHWC = "t = Transpose <perm=[0, 3, 1, 2]> (input) p = GlobalAveragePool(t) logits = Flatten(p)"


def load(folder: Path, model: onnx.ModelProto, **options: Any) -> runtime.Session:
    onnx.save(model, folder / "m.onnx")
    return runtime.load(folder / "m.onnx", **{"threads": 1, **options})


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (
            np.zeros((2, 4, 4, 3), np.float32),
            r"2 images, channels last\); transpose them: images.transpose\(0, 3, 1, 2",
        ),
        (np.zeros((3, 4, 4), np.float32), r"one image without its batch dimension; pass images\[None\]"),
        (np.zeros((0, 3, 4, 4), np.float32), "an empty batch"),
        (np.zeros((0, 4, 4, 3), np.float32), "an empty batch"),
        (np.zeros((), np.float32), r"found shape \(\)"),
        (np.zeros((2, 3, 0, 4), np.float32), r"found shape \(2, 3, 0, 4\)"),
        (images_of(1.0, np.nan), "image 1 of the batch contains NaN; expected finite numbers"),
        (images_of(-np.inf), "image 0 of the batch contains infinity"),
    ],
)
def test_an_invalid_batch_is_rejected_with_advice(tmp_path: Path, batch: np.ndarray, expected: str) -> None:
    with load(tmp_path, serving_model()) as session:
        for call in (session.run, session.submit):
            with pytest.raises(InputError, match=expected):
                call(batch)


def test_channels_first_images_for_a_channels_last_model_are_rejected(tmp_path: Path) -> None:
    model = serving_model(NHWC)
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], (4, 4, 3), strict=True):
        dimension.dim_value = size
    with load(tmp_path, model) as session:
        assert session.run(np.zeros((2, 4, 4, 3), np.float32)).shape == (2, 3)
        with pytest.raises(InputError, match=r"channels first\); transpose them: images.transpose\(0, 2, 3, 1\)"):
            session.run(np.zeros((2, 3, 4, 4), np.float32))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_batches_are_padded_and_split_to_a_fixed_batch_size(tmp_path: Path, count: int) -> None:
    images = np.random.default_rng(0).normal(size=(count, 3, 4, 4)).astype(np.float32)
    with load(tmp_path, serving_model()) as session:
        expected = session.run(images)
    with load(tmp_path, serving_model(batch="4"), warm_up=(1,)) as session:
        assert session.backend.batch_range == (4, 4)
        np.testing.assert_array_equal(session.run(images), expected)
        np.testing.assert_array_equal(session.submit(images).result(), expected)
        assert max(session.stats.batcher.batch_sizes) <= 4


def test_errors_of_the_library_become_run_failed(tmp_path: Path) -> None:
    with load(tmp_path, serving_model(FRAGILE), device="cpu") as session:
        with pytest.raises(RunFailed, match=r"onnxruntime on cpu failed on a batch of shape \(1, 3, 4, 4\): .*Gather"):
            session.run(images_of(2.0))
        assert session.run(images_of(0.5)).tolist() == [[0.5] * 3]
        assert (session.stats.calls, session.stats.images, session.stats.failed) == (1, 1, 1)


def test_outputs_without_a_batch_dimension_are_rejected(tmp_path: Path) -> None:
    model = serving_model("p = ReduceMean <keepdims=0> (input, axes) logits = Unsqueeze(p, first)")
    for name, value in (("axes", [0, 2, 3]), ("first", [0])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    with load(tmp_path, model) as session:
        assert session.run(images_of(1.0)).shape == (1, 3)
        with pytest.raises(RunFailed, match="returned 1 rows of logits for 2 images"):
            session.run(images_of(1.0, 2.0))


def test_thread_settings_are_used_and_checked(tmp_path: Path) -> None:
    images = images_of(1.0, 2.0)
    for threads in (1, runtime.Threads(intra=2, inter=2, spin=False), runtime.Threads(intra=1)):
        with load(tmp_path, serving_model(), threads=threads, device="cpu") as session:
            assert session.run(images)[:, 0].tolist() == [1.0, 2.0]
            explained = session.explain()
    assert "device: cpu, as requested" in explained
    assert "threads: 1 per operator, 1 parallel operators" in explained
    with pytest.raises(ConfigError, match="intra must be at least 0; found -1"):
        runtime.Threads(intra=-1)
    with pytest.raises(ConfigError, match="inter must be at least 1; found 0"):
        runtime.Threads(inter=0)
    with pytest.raises(ConfigError, match="contexts must be at least 1; found 0"):
        runtime.Threads(contexts=0)
    with pytest.raises(ConfigError, match="intra must be at least 0"):
        runtime.load(tmp_path / "m.onnx", threads=-1)


def test_explain_reports_backend_and_device(tmp_path: Path) -> None:
    with load(tmp_path, serving_model()) as session:
        lines, device = session.explain().splitlines(), session.backend.device
    assert lines[0] == f"onnxruntime on {device}: {tmp_path / 'm.onnx'}"
    assert lines[1].startswith("backend: ONNX Runtime ")
    assert lines[2].startswith("device: cpu, because " if device == "cpu" else "device: cuda, on ")


class Recorder(Backend):
    """A backend that records the shapes of its batches."""

    name, device = "recorder", "cpu"
    input = TensorInfo("input", np.dtype(np.float32), (-1, 3, -1, -1))
    outputs = (TensorInfo("logits", np.dtype(np.float32), (-1, 3)),)
    spec = SPEC

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def _run(self, images_NCHW: np.ndarray | DeviceView) -> tuple[np.ndarray]:
        assert isinstance(images_NCHW, np.ndarray)
        self.shapes.append(images_NCHW.shape)
        return (images_NCHW.mean((2, 3)),)

    def close(self) -> None:
        pass


def test_warm_up_runs_the_given_batch_sizes_at_the_size_of_the_spec() -> None:
    recorder = Recorder()
    warm_up(recorder, (1, 3), Path("m.onnx"))
    assert recorder.shapes == [(1, 3, 4, 4), (3, 3, 4, 4)]


def test_warm_up_of_a_session(tmp_path: Path) -> None:
    open_size = serving_model(size="h, w")
    with load(tmp_path, open_size, warm_up=(1, 3)) as session:
        assert session.stats.calls == 0
        assert session.run(np.ones((1, 3, 5, 7), np.float32)).tolist() == [[1.0] * 3]
    with pytest.raises(ConfigError, match="batch sizes of at least 1; found \\[0\\]"):
        load(tmp_path, serving_model(), warm_up=[0])
    del open_size.metadata_props[:]
    with pytest.raises(ConfigError, match="accepts images of any size and has no spec"):
        load(tmp_path, open_size, warm_up=[1])
