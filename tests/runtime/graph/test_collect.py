import weakref
from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from runtime.errors import DataError
from runtime.graph.collect import collect, collect_amax, collect_channel_amax
from runtime.graph.compare import tensor_values
from runtime.graph.model import run_batches
from runtime.graph.structure import rename_tensors
from tests.support.networks import classifier


@pytest.fixture
def network() -> onnx.ModelProto:
    return classifier()


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


def test_ranges_cover_every_tensor_over_all_batches(network: onnx.ModelProto) -> None:
    seen: list[int] = []
    amax = collect_amax(network, [images()[:1], images()[1:]], progress=seen.append)
    assert seen == [1, 3]
    assert set(amax) == {"input", "a", "r", "p", "logits"}
    logits = run_batches(network, [images()])
    assert amax["input"] == np.abs(images()).max()
    assert amax["logits"] == amax["p"] == pytest.approx(np.abs(logits).max(), rel=1e-5)
    assert amax["r"] <= amax["a"]


def test_only_the_requested_tensors_are_measured(network: onnx.ModelProto) -> None:
    everything, some = collect(network, [images()]), collect(network, [images()], tensors={"r", "p"})
    assert some.amax == {name: everything.amax[name] for name in ("r", "p")}
    assert np.array_equal(some.output, everything.output)


def test_channel_ranges_are_the_maxima_over_images_and_positions(network: onnx.ModelProto) -> None:
    found = collect_channel_amax(network, [images()[:3], images()[3:]], ["input", "a", "logits"])
    values = tensor_values(network, ["a", "logits"], images())
    np.testing.assert_array_equal(found["input"], np.abs(images()).max((0, 2, 3)))
    np.testing.assert_allclose(found["a"], np.abs(values["a"]).max((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found["logits"], np.abs(values["logits"]).max(0), rtol=1e-6)


def test_the_range_of_an_infinite_tensor_is_inf(network: onnx.ModelProto) -> None:
    batch = images()
    batch[0, 0, 0, 0] = np.inf
    assert collect_amax(network, [images(), batch])["input"] == np.inf


def test_no_batch_is_kept_after_it_has_run(network: onnx.ModelProto) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def batches() -> Iterator[np.ndarray]:
        for _ in range(5):
            assert sum(reference() is not None for reference in alive) <= 1
            batch = images()
            alive.append(weakref.ref(batch))
            yield batch

    collect_amax(network, batches())
    assert len(alive) == 5


def test_ranges_without_images_are_an_error(network: onnx.ModelProto) -> None:
    with pytest.raises(DataError, match="cannot measure ranges without images"):
        collect_amax(network, [])
    with pytest.raises(DataError, match="cannot measure ranges without images"):
        collect_channel_amax(network, [], ["a"])


def test_names_that_begin_like_our_own_are_measured_too(network: onnx.ModelProto) -> None:
    expected = collect_amax(network, [images()])
    rename_tensors(network.graph, {"a": "advprop_range/input"})
    found = collect_amax(network, [images()])
    assert list(found.values()) == list(expected.values())
    assert found["advprop_range/input"] == expected["a"]
