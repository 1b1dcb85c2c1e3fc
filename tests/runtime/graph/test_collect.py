from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from runtime.errors import DataError
from runtime.graph.collect import collect, collect_amax
from tests.support.networks import classifier


@pytest.fixture
def network() -> onnx.ModelProto:
    return classifier()


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


def test_ranges_are_those_of_every_tensor_over_all_batches(network: onnx.ModelProto) -> None:
    seen: list[int] = []
    amax = collect_amax(network, [images()[:1], images()[1:]], progress=seen.append)
    assert seen == [1, 3]
    assert set(amax) == {"input", "a", "r", "p", "logits"}
    session = ort.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": images()})[0]
    assert amax["input"] == np.abs(images()).max()
    assert amax["logits"] == amax["p"] == pytest.approx(np.abs(logits).max(), rel=1e-5)
    assert amax["r"] <= amax["a"]


def test_only_the_tensors_asked_for_are_measured(network: onnx.ModelProto) -> None:
    everything, some = collect(network, [images()]), collect(network, [images()], tensors={"r", "p"})
    assert some.amax == {name: everything.amax[name] for name in ("r", "p")}
    assert np.array_equal(some.output, everything.output)


def test_a_tensor_that_is_infinite_is_told_apart(network: onnx.ModelProto) -> None:
    batch = images()
    batch[0, 0, 0, 0] = np.inf
    assert collect_amax(network, [images(), batch])["input"] == np.inf


def test_each_batch_is_dropped_once_it_has_run(network: onnx.ModelProto) -> None:
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []

    def batches() -> Iterator[np.ndarray]:
        for _ in range(5):
            assert sum(reference() is not None for reference in alive) <= 1
            batch = images()
            alive.append(weakref.ref(batch))
            yield batch

    collect_amax(network, batches())
    assert len(alive) == 5


def test_ranges_need_images(network: onnx.ModelProto) -> None:
    with pytest.raises(DataError, match="measured on images"):
        collect_amax(network, [])
