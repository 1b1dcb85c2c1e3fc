"""Evaluation on a Ray cluster of two workers on this machine, even if workers are killed."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from advprop.cli import main
from runtime.errors import BackendUnavailable, ConfigError, DataError, InputError, Interrupted
from runtime.evaluate.cluster import Cluster, ClusterConfig
from runtime.evaluate.models import load_model
from runtime.evaluate.results import difference
from runtime.evaluate.run import evaluate
from tests.support import ROOT
from tests.support.evaluation_sets import (
    config,
    labeled_folder,
    run_config,
    toy,
    toy_onnx,
    wait_for_lines,
    written,
)

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")

SOME = ("clean", "gaussian_noise", "fog", "pixelate")
TWO = ClusterConfig(address="auto", workers=2)
NODE = f"on node {os.uname().nodename}"


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Start a Ray cluster with two CPUs, which evaluations join and leave running."""
    os.environ |= {
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # otherwise Ray writes a token to the home folder
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_folder(tmp_path_factory.mktemp("set"), count=10)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [toy_onnx(tmp_path / "a.onnx"), toy_onnx(tmp_path / "b.onnx", -3.0)]


def worker_processes() -> list[int]:
    """Return the worker processes that descend from this process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue

    def below(process: int) -> bool:
        return process == os.getpid() or (process in parents and below(parents[process]))

    return [process for process, name in names.items() if name.startswith("ray::ClusterWorker") and below(process)]


def bytes_without_ray(paths: list[Path], data: Path, folder: Path) -> list[bytes]:
    models = [load_model(path, device="cpu", threads=1) for path in paths]
    suite = config("corruptions", data, only=SOME)
    results = evaluate(models, suite, run_config(folder / "without"), reference=models[0])
    return [written(result, folder / "without.json") for result in results]


def test_killed_workers_change_no_byte(
    two_cpus: None, data: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill both workers. Paths are relative, because workers have another working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "images")
    expected = bytes_without_ray(models, Path("images"), tmp_path)
    killed: list[int] = []
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done in (20, 60) and not killed[done // 40 :]:
            killed.append([process for process in worker_processes() if process not in killed][-1])
            os.kill(killed[-1], signal.SIGKILL)

    with Cluster(TWO) as cluster:
        loaded = [cluster.load_model(Path(path.name), device="cpu") for path in models]
        assert len(worker_processes()) == cluster.size == 2
        suite = config("corruptions", Path("images"), only=SOME)
        results = evaluate(
            loaded, suite, run_config(tmp_path / "out"), reference=loaded[0], progress=progress, cluster=cluster
        )
    assert len(set(killed)) == 2
    assert seen == list(range(16 * 8 + 1))  # no block is counted twice
    assert [written(result, tmp_path / "ray.json") for result in results] == expected
    assert not list((tmp_path / "out").iterdir())


def test_ray_resumes_a_run_without_ray(two_cpus: None, data: Path, models: list[Path], tmp_path: Path) -> None:
    """The command writes the same bytes as the function."""
    (whole, _) = bytes_without_ray(models, data, tmp_path)
    model, suite, answered = load_model(models[0], device="cpu", threads=1), config("corruptions", data, only=SOME), []

    def stops(images: np.ndarray) -> np.ndarray:
        answered.append(images)
        if len(answered) == 30:
            raise KeyboardInterrupt
        return model.logits(images)

    with pytest.raises(Interrupted, match="29 of 128 blocks are finished"):
        evaluate([dataclasses.replace(model, logits=stops)], suite, run_config(tmp_path / "out"))
    (log,) = (tmp_path / "out").glob(".unfinished-*")
    only = [part for cell in SOME for part in ("--only", cell)]
    options = ["--suite", "corruptions", "--data", str(data), "--out", str(tmp_path / "out"), "--batch-size", "4"]
    command = ["eval", str(models[0]), *options, *only, "--device", "cpu", "--ray", "auto", "--ray-workers", "2"]
    run = CliRunner().invoke(main, command)
    assert run.exit_code == 0, run.output
    assert not log.exists()
    (result,) = (tmp_path / "out").glob("*.json")
    assert result.read_bytes() == whole
    assert ray.is_initialized()


def test_a_worker_with_other_files_gets_no_work(two_cpus: None, data: Path, models: list[Path], tmp_path: Path) -> None:
    """New workers find another model than the killed ones, as on a node with an old copy."""

    def progress(done: int, total: int) -> None:
        if done == 20:
            toy_onnx(models[0], 5.0)
            for process in worker_processes():
                os.kill(process, signal.SIGKILL)

    suite = config("corruptions", data, only=SOME)
    with Cluster(TWO) as cluster:
        model = cluster.load_model(models[0], device="cpu")
        with pytest.raises(DataError, match=rf"{NODE}: model\.sha256 is '[0-9a-f]+' instead of '[0-9a-f]+'"):
            evaluate([model], suite, run_config(tmp_path / "out"), progress=progress, cluster=cluster)
        copied = shutil.copytree(data, tmp_path / "copied")

        def moves(done: int, total: int) -> None:
            copied.rename(tmp_path / "moved")

        with pytest.raises(DataError, match=rf"{NODE}: .*copied/blue/0\.png.*Every node needs the images"):
            evaluate([model], config("imagenet", copied), run_config(tmp_path), progress=moves, cluster=cluster)
        with pytest.raises(InputError, match=rf"{NODE}: .*missing\.onnx"):
            cluster.load_model(tmp_path / "missing.onnx", device="cpu")
        with pytest.raises(ConfigError, match=r"load models with Cluster\.load_model"):
            evaluate([toy()], suite, run_config(tmp_path), cluster=cluster)


def test_a_cluster_that_is_too_small_is_reported(two_cpus: None) -> None:
    with pytest.raises(BackendUnavailable, match="has 2 CPUs and 0 GPUs; a worker needs 3 and 0"):
        Cluster(ClusterConfig(address="auto", cpus=3))
    wrong: list[dict[str, Any]] = [{"workers": 0}, {"cpus": 0.0}, {"gpus": -1.0}]
    for options in wrong:
        with pytest.raises(ConfigError, match="at least one worker"):
            ClusterConfig(address="auto", **options)


def test_an_unreachable_address_is_reported(data: Path, models: list[Path], tmp_path: Path) -> None:
    """It runs in another process, because this one is connected to a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "advprop.cli", "eval", str(models[0]), "--suite", "imagenet", "--data", str(data)]
    run = subprocess.run([*command, "--ray", address], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 3
    assert f"no Ray cluster at '{address}' ([Errno 111] Connection refused)" in run.stderr


def test_ctrl_c_stops_and_a_run_without_ray_resumes(data: Path, models: list[Path], tmp_path: Path) -> None:
    """The command starts Ray and shuts it down."""
    out = tmp_path / "out"
    only = [part for cell in SOME for part in ("--only", cell)]
    options = ["--suite", "corruptions", "--data", str(data), "--out", str(out), "--batch-size", "1", *only]
    command = [sys.executable, "-m", "advprop.cli", "eval", str(models[0]), *options, "--device", "cpu"]
    with_ray = ["--ray", "local", "--ray-workers", "2"]
    with subprocess.Popen(
        [*command, *with_ray], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        log = wait_for_lines(out, 5, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "blocks are finished; run the same command to resume" in output
    lines, seen = log.read_bytes().count(b"\n"), []
    assert 5 <= lines < 16 * 30
    suite = config("corruptions", data, only=SOME)
    model = load_model(models[0], device="cpu", threads=1)
    (resumed,) = evaluate([model], suite, run_config(out, batch_size=1), progress=lambda *now: seen.append(now[0]))
    assert seen[0] == lines
    (whole,) = evaluate([model], suite, run_config(tmp_path, batch_size=1))
    assert written(resumed, tmp_path / "resumed.json") == written(whole, tmp_path / "whole.json")


def test_differences_are_named() -> None:
    assert difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 instead of 2"
    assert difference({"a": {"b": 1}}, {"a": {"b": 1}}) == ""
    assert difference({"a": None}, {}) == ""
    assert difference({"a": 1}, {}) == "a is 1 instead of None"
