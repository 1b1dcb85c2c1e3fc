"""Evaluations in shards, resumed or in worker processes produce the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import BackendUnavailable, ConfigError, DataError, Interrupted, OutputError, SpecError
from runtime.evaluate.counts import Counts
from runtime.evaluate.image_workers import Corruption, Workers, corrupt_block, in_order
from runtime.evaluate.models import load_model
from runtime.evaluate.results import Result, merge, read_result, write_result
from runtime.evaluate.run import RunConfig, evaluate
from tests.support import ROOT
from tests.support.evaluation_sets import (
    config,
    labeled_folder,
    mean_color,
    one_pixel,
    run_config,
    spec_of,
    toy,
    toy_onnx,
    wait_for_lines,
    written,
)

SOME = ("clean", "gaussian_noise", "fog", "pixelate")
"""Without frost, whose textures are an optional package."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_folder(tmp_path_factory.mktemp("set"), count=10)


def test_merged_shards_and_cells_equal_one_run_byte_for_byte(data: Path, tmp_path: Path) -> None:
    suite, models = (
        config("corruptions", data, only=SOME),
        [toy("a"), toy("b", predict=one_pixel)],
    )

    def measured(**options: object) -> Result:
        return evaluate(models, suite, run_config(tmp_path, **options), reference=models[0])[1]

    whole = measured()
    bytes_of_one = written(whole, tmp_path / "whole.json")
    assert 0 < whole["cells"]["gaussian_noise/5"]["counts"]["top1"] < 30
    shards = []
    for shard in (3, 1, 2):
        result = measured(shard=shard, shards=3, workers=shard % 2)
        assert result["metrics"] is None
        write_result(tmp_path / f"{shard}.json", result)
        shards.append(read_result(tmp_path / f"{shard}.json"))
    assert written(merge(shards), tmp_path / "merged.json") == bytes_of_one
    two = merge(shards[:2])
    assert two["cells"]["clean"]["parts"] == ["1/3", "3/3"]
    assert written(merge([shards[2], two]), tmp_path / "merged.json") == bytes_of_one
    cells = [
        evaluate(models, config("corruptions", data, only=(cell,)), run_config(tmp_path), reference=models[0])[1]
        for cell in reversed(whole["cells"])
    ]
    for cell in cells:
        (name,) = cell["cells"]
        assert json.dumps(cell["cells"][name]) == json.dumps(whole["cells"][name])
    assert written(merge(cells), tmp_path / "merged.json") == bytes_of_one


def test_results_of_different_evaluations_cannot_be_merged(data: Path, tmp_path: Path) -> None:
    def measured(name: str = "a", **options: object) -> Result:
        suite = config("corruptions", data, only=("clean",), **options)
        return evaluate([toy(name)], suite, run_config(tmp_path, shard=1, shards=2))[0]

    first = measured()
    with pytest.raises(DataError, match=r"overlap \(parts 1/2, 1/2\)"):
        merge([first, measured()])
    with pytest.raises(DataError, match=r"model\.name is 'b' instead of 'a'"):
        merge([first, measured("b")])
    with pytest.raises(DataError, match=r"settings\.seed is 3 instead of 0"):
        merge([first, measured(seed=3)])
    with pytest.raises(DataError, match="found none"):
        merge([])
    (tmp_path / "other.json").write_text('{"format": "something/1"}')
    with pytest.raises(DataError, match="found 'something/1'"):
        read_result(tmp_path / "other.json")
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(DataError, match="expected the result of an evaluation"):
        read_result(tmp_path / "other.json")


def test_a_killed_and_resumed_run_equals_one_run_byte_for_byte(data: Path, tmp_path: Path) -> None:
    """Kill a process while it works. Its workers end too, and no block is counted twice."""
    model, out = toy_onnx(tmp_path / "toy.onnx"), tmp_path / "out"
    only = [part for cell in SOME for part in ("--only", cell)]
    options = ["--suite", "corruptions", "--data", str(data), "--out", str(out), "--batch-size", "2", "--workers", "1"]
    command = [sys.executable, "-m", "advprop.cli", "eval", str(model), "--device", "cpu", *options, *only]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        log = wait_for_lines(out, 5, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert not list(out.glob("*.json"))
    with log.open("ab") as file:
        file.write(b'{"cell": "fog/1", "blo')  # as if it was killed while writing
    lines = log.read_bytes().count(b"\n")
    assert 5 <= lines < 16 * 15
    suite, seen = config("corruptions", data, only=SOME), []
    resumed = evaluate(
        [load_model(model, device="cpu")],
        suite,
        run_config(out, batch_size=2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 16 * 15) for done in range(lines, 16 * 15 + 1)]
    assert not log.exists()
    (whole,) = evaluate([load_model(model, device="cpu")], suite, run_config(tmp_path, batch_size=2))
    assert written(resumed[0], tmp_path / "resumed.json") == written(whole, tmp_path / "whole.json")
    wait_for_end(children)


def wait_for_end(processes: list[str]) -> None:
    assert processes
    end = time.monotonic() + 20
    while any(Path(f"/proc/{process}").exists() and "zombie" not in status(process) for process in processes):
        assert time.monotonic() < end, "a worker outlived its parent"
        time.sleep(0.05)


def status(process: str) -> str:
    try:
        return Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return "zombie"


def test_workers_return_the_same_result_and_import_neither_torch_nor_onnx(data: Path, tmp_path: Path) -> None:
    suite = config("corruptions", data, only=("clean", "fog/2"))
    here = evaluate([toy()], suite, run_config(tmp_path))
    there = evaluate([toy()], suite, run_config(tmp_path, workers=2))
    assert here == there
    images, names = np.zeros((2, 32, 32, 3), np.uint8), ["a", "b"]
    corruption = Corruption(name="defocus_blur", severity=1, seed=0, table="cifar")
    with Workers(1) as workers:
        assert workers.submit(corrupt_block, images, names, corruption, None).result().shape == images.shape
        loaded = workers.submit(eval, "set(__import__('sys').modules)").result()
    assert "cv2" in loaded
    assert not {"torch", "timm", "onnx", "onnxruntime"} & loaded


def test_models_share_images_and_are_compared_with_the_reference(data: Path, tmp_path: Path) -> None:
    batches = []

    def watch(images: np.ndarray) -> np.ndarray:
        batches.append(len(images))
        return mean_color(images)

    def turned(images: np.ndarray) -> np.ndarray:
        return mean_color(images)[:, [0, 2, 1]]

    reference, other = toy("reference", predict=watch), toy("turned", predict=turned)
    results = evaluate([reference, other], config("imagenet", data), run_config(tmp_path), reference=reference)
    assert results[0]["reference"] is None
    assert sum(batches) == 30  # once, although it is both evaluated and the reference
    counts = Counts.from_dict(results[1]["cells"]["images"]["counts"])
    assert counts.pairs is not None
    assert (counts.pairs.agree, counts.pairs.both, counts.pairs.only_reference) == (10, 10, 20)
    against = results[1]["metrics"]["cells"]["images"]["against_reference"]
    assert against["agreement"] == pytest.approx(1 / 3)
    assert against["top1_difference"] == pytest.approx(-2 / 3)
    assert against["top1_difference_interval"][1] < 0
    with pytest.raises(ConfigError, match="cannot be compared with the reference big"):
        evaluate([other], config("imagenet", data), run_config(tmp_path), reference=toy("big", spec_of(size=48)))


def test_models_with_other_input_sizes_get_images_of_their_own(data: Path, tmp_path: Path) -> None:
    sizes = []

    def watch(images: np.ndarray) -> np.ndarray:
        sizes.append(images.shape[2])
        return mean_color(images)

    models = [toy("b", spec_of(size=48), watch), toy("a", predict=watch), toy("c", spec_of(size=48), watch)]
    results = evaluate(models, config("imagenet", data), run_config(tmp_path))
    assert [result["model"]["name"] for result in results] == ["b", "a", "c"]
    assert (sizes.count(48), sizes.count(32)) == (16, 8)


def test_corrupted_images_are_cached_on_request(data: Path, tmp_path: Path) -> None:
    suite, cache = config("corruptions", data, only=("clean", "fog/2")), tmp_path / "cache"
    first = evaluate([toy()], suite, run_config(tmp_path, cache=cache))
    files = sorted(cache.rglob("*.npy"))
    assert len(files) == 8
    changed = np.zeros_like(np.load(files[0]))
    np.save(files[0], changed)  # the cache is used
    files[1].write_bytes(b"damaged")  # a damaged file is not
    second = evaluate([toy()], suite, run_config(tmp_path, cache=cache))
    assert first[0]["cells"]["clean"] == second[0]["cells"]["clean"]
    assert first[0]["cells"]["fog/2"] != second[0]["cells"]["fog/2"]
    assert np.load(files[1]).shape == changed.shape
    evaluate([toy()], config("corruptions", data, only=("fog/2",), seed=1), run_config(tmp_path, cache=cache))
    assert len(list(cache.rglob("*.npy"))) == 16


def test_invalid_run_settings_are_refused(data: Path, tmp_path: Path) -> None:
    for options in ({"batch_size": 0}, {"workers": -1}, {"shard": 3, "shards": 2}, {"shard": 0}):
        with pytest.raises(ConfigError, match="found"):
            RunConfig(out=tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"shard 9/9 has no images: there are 8 blocks of 4"):
        evaluate([toy()], config("imagenet", data), run_config(tmp_path, shard=9, shards=9))
    four = toy(predict=lambda images: np.zeros((len(images), 4), np.float32))
    with pytest.raises(SpecError, match=r"shape \(4, 4\) for 4 images; its spec names 3 classes"):
        evaluate([four], config("imagenet", data), run_config(tmp_path))


def test_outputs_that_are_not_finite_count_as_wrong(data: Path, tmp_path: Path) -> None:
    def overflows(images: np.ndarray) -> np.ndarray:
        logits = mean_color(images)
        logits[0] = np.inf
        return logits

    (result,) = evaluate([toy(predict=overflows)], config("imagenet", data), run_config(tmp_path))
    counts = result["cells"]["images"]["counts"]
    assert (counts["images"], counts["top1"], counts["not_finite"]) == (30, 22, 8)


def test_a_folder_that_cannot_be_written_is_reported_first(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="a file with that name exists"):
        evaluate([toy()], config("imagenet", data), run_config(tmp_path / "out"))


def test_ctrl_c_reports_progress_and_the_run_resumes(data: Path, tmp_path: Path) -> None:
    batches = []

    def stops(images: np.ndarray) -> np.ndarray:
        batches.append(images)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return mean_color(images)

    suite, model = config("imagenet", data), toy(predict=stops)
    with pytest.raises(Interrupted, match="stopped: 3 of 8 blocks are finished; run the same command to resume"):
        evaluate([model], suite, run_config(tmp_path))
    resumed = evaluate([model], suite, run_config(tmp_path))
    assert len(batches) == 4 + 5
    assert resumed == evaluate([toy()], suite, run_config(tmp_path))


def test_a_worker_that_dies_is_reported() -> None:
    with Workers(1) as workers, pytest.raises(BackendUnavailable, match="a worker process died"):
        list(in_order(lambda code: workers.submit(os._exit, code), [3], 0))
