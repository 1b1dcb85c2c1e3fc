import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from calib.histograms import (
    BINS,
    Histogram,
    cache_file,
    collect_histograms,
    load_histograms,
    save_histograms,
)
from runtime.errors import DataError
from tests.support.networks import classifier, scale_initializer


def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=50_000).astype(np.float32) * 3


def filled(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def test_counts_match_numpy() -> None:
    histogram = filled(values())
    assert histogram.top == 16.0
    expected, _ = np.histogram(np.abs(values()), bins=BINS, range=(0, histogram.top))
    assert np.array_equal(histogram.counts, expected)
    assert histogram.amax == np.abs(values()).max()


@pytest.mark.parametrize("seed", range(3))
def test_counts_do_not_depend_on_order_or_batches(seed: int) -> None:
    random = np.random.default_rng(seed)
    mixed = random.permutation(np.concatenate([values(), values() * 100, np.zeros(100, np.float32)]))
    parts = np.array_split(mixed, [7, 8, 900, 50_000])
    one, many = filled(mixed), filled(*parts)
    assert np.array_equal(one.counts, many.counts)
    assert (one.top, one.amax) == (many.top, many.amax)
    assert many.counts.sum() == mixed.size


def test_zeros_before_any_other_value_are_counted() -> None:
    histogram = filled(np.zeros(10, np.float32))
    assert (histogram.amax, histogram.counts.sum()) == (0.0, 0)
    histogram.add(np.asarray([0.5, 0.0], np.float32))
    assert (histogram.counts[0], histogram.counts.sum()) == (11, 12)


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32)


def test_tensors_of_a_network_are_counted_in_one_pass() -> None:
    seen: list[int] = []
    found = collect_histograms(classifier(), [images()[:1], images()[1:]], ["input", "r", "logits"], seen.append)
    assert seen == [1, 3]
    assert np.array_equal(found["input"].counts, filled(images()).counts)
    assert found["r"].counts.sum() == 4 * 4 * 6 * 6
    assert found["logits"].counts.sum() == 4 * 4


def test_the_error_for_a_value_that_is_not_finite_names_its_tensor() -> None:
    network = classifier()
    scale_initializer(network, "w", float("nan"))
    with pytest.raises(DataError, match="the tensor a has values that are not finite"):
        collect_histograms(network, [images()], ["a"])


def test_histograms_without_images_are_an_error() -> None:
    def nothing() -> Iterator[np.ndarray]:
        yield from ()

    with pytest.raises(DataError, match="calibration needs at least one batch of images"):
        collect_histograms(classifier(), nothing(), ["a"])


def test_an_interrupted_count_resumes_from_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = classifier()
    batches = [np.random.default_rng(seed).normal(size=(16, 3, 8, 8)).astype(np.float32) for seed in range(6)]
    poisoned = [np.full_like(batch, np.nan) for batch in batches]
    whole = collect_histograms(network, batches, ["input", "r"])
    cache = tmp_path / "folder" / "histograms.npz"

    def interrupted() -> Iterator[np.ndarray]:
        yield from batches[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_histograms(network, interrupted(), ["input", "r"], cache=cache)
    ran: list[int] = []
    # The first 64 images must not run again: nan would be an error.
    found = collect_histograms(network, poisoned[:4] + batches[4:], ["input", "r"], ran.append, cache=cache)
    assert sum(ran) == 96
    for name, histogram in whole.items():
        np.testing.assert_array_equal(found[name].counts, histogram.counts)
        assert (found[name].amax, found[name].top) == (histogram.amax, histogram.top)
    cached = collect_histograms(network, poisoned, ["input", "r"], cache=cache)
    np.testing.assert_array_equal(cached["r"].counts, whole["r"].counts)
    cache.write_bytes(cache.read_bytes()[:100])
    again = collect_histograms(network, batches, ["input", "r"], cache=cache)
    np.testing.assert_array_equal(again["r"].counts, whole["r"].counts)
    assert "are damaged and will be collected again" in caplog.text


def test_the_cache_deletes_the_least_recently_used_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path))
    histogram = filled(values())
    first, second = (cache_file(classifier(), images) for images in ("a", "b"))
    assert first is not None
    assert second is not None
    save_histograms(first, {"x": histogram}, 10)
    assert load_histograms(first, ["x"])[1] == 10
    monkeypatch.setenv("ADVPROP_CACHE_GB", str(1.5e-9 * first.stat().st_size))
    os.utime(first, (1, 1))
    save_histograms(second, {"x": histogram}, 20)
    assert not first.exists()
    assert load_histograms(second, ["x"])[1] == 20
    os.utime(second, (1, 1))
    load_histograms(second, ["x"])
    assert second.stat().st_mtime > 1e9  # loading marks the file as used


def test_a_cache_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path))
    path = cache_file(classifier(), "a")
    assert path is not None
    assert path.parent == tmp_path / "histograms"
    path.parent.chmod(0o775)
    assert cache_file(classifier(), "a") is None
    assert "other users may write to it" in caplog.text


def test_a_cache_that_cannot_be_written_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    network = classifier()
    batches = [np.full((32, 3, 8, 8), number, np.float32) for number in range(1, 6)]  # saved after every second
    cache = tmp_path / "file" / "histograms.npz"
    found = collect_histograms(network, batches, ["r"], cache=cache)
    expected = collect_histograms(network, batches, ["r"])
    np.testing.assert_array_equal(found["r"].counts, expected["r"].counts)
    assert caplog.text.count("the calibration goes on without a cache") == 1


def test_a_limit_of_zero_disables_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVPROP_CACHE_GB", "0")
    assert cache_file(classifier(), "a") is None
