"""The engine cache with real builds, real processes, a real full disk and a real kill."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import runtime
from advprop.cli import main
from runtime.engine.cache import EngineCache, engine_key
from runtime.engine.options import BuildOptions
from runtime.engine.sidecar import EngineInfo, read_sidecar, sidecar_path
from runtime.system import cache
from tests.support import ROOT
from tests.support.networks import classifier, graph

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")

SHM = Path("/dev/shm")
BUILD = "import sys, runtime; print(runtime.build(sys.argv[1], sys.argv[2], sm=(89,), cache=True))"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up an empty cache, and return its folder of engines."""
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVPROP_CACHE_GB", raising=False)
    return tmp_path / "cache" / "engines"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "a.onnx"
    onnx.save(classifier(), path)
    return path


def build(model: Path, engine: Path, **options: Any) -> EngineInfo:
    return runtime.build(model, engine, **{"sm": (89,), "cache": True, **options})


def was_cached(caplog: pytest.LogCaptureFixture) -> bool:
    found = "using the cached engine" in caplog.text
    caplog.clear()
    return found


def python(program: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_the_second_build_comes_from_the_cache(
    model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "runtime")
    first = build(model, tmp_path / "a.engine")
    assert not was_cached(caplog)
    second = build(model, tmp_path / "b.engine")
    assert was_cached(caplog)
    assert first == second == read_sidecar(tmp_path / "b.engine")
    assert (tmp_path / "a.engine").read_bytes() == (tmp_path / "b.engine").read_bytes()
    (entry,) = cache.entries(folder)
    assert entry.key == engine_key(first)
    assert {file.name for file in folder.iterdir()} == {f"{entry.key}.engine", f"{entry.key}.engine.json"}
    assert read_sidecar(folder / f"{entry.key}.engine") == first
    assert folder.stat().st_mode & 0o077 == 0
    before = (tmp_path / "b.engine").stat()
    build(model, tmp_path / "b.engine")  # the file exists already: no bytes are written
    assert (tmp_path / "b.engine").samefile(folder / f"{entry.key}.engine")
    assert (tmp_path / "b.engine").stat().st_ino == before.st_ino
    assert not list(tmp_path.glob(".*.tmp")) and not list(folder.glob(".*.tmp"))


def test_a_modified_engine_that_is_linked_to_the_cache_is_rebuilt(
    model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = build(model, tmp_path / "a.engine")
    good = (tmp_path / "a.engine").read_bytes()
    with (tmp_path / "a.engine").open("r+b") as file:
        file.write(b"\0\0\0\0")
    build(model, tmp_path / "b.engine")
    assert "a cached engine is damaged and will be rebuilt" in caplog.text
    assert (
        read_sidecar(tmp_path / "b.engine").plan_sha256
        == hashlib.sha256((tmp_path / "b.engine").read_bytes()).hexdigest()
    )
    assert (folder / f"{engine_key(first)}.engine").samefile(tmp_path / "b.engine")
    assert (tmp_path / "a.engine").read_bytes()[4:] == good[4:]  # the user's file is not touched


@pytest.mark.skipif(not SHM.is_dir(), reason="no second file system (/dev/shm)")
def test_engines_are_copied_to_another_file_system(model: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        first = build(model, Path(name) / "a.engine")
        second = build(model, Path(name) / "b.engine")
        assert first == second == read_sidecar(Path(name) / "b.engine")
        plan = folder / f"{engine_key(first)}.engine"
        assert plan.stat().st_dev != (Path(name) / "a.engine").stat().st_dev
        assert plan.read_bytes() == (Path(name) / "b.engine").read_bytes()


def test_other_inputs_and_options_build_another_engine(
    model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "runtime")
    build(model, tmp_path / "a.engine")
    other = onnx.load(model)
    other.doc_string = "another file"
    onnx.save(other, tmp_path / "other.onnx")
    for source, options in (
        (model, {"sm": (86,)}),
        (model, {"batch": (1, 2, 4)}),
        (model, {"options": BuildOptions(workspace_mib=64)}),
        (tmp_path / "other.onnx", {}),
    ):
        build(source, tmp_path / "a.engine", **options)
        assert not was_cached(caplog), options
    assert len(cache.entries(folder)) == 5
    build(model, tmp_path / "b.engine", cache=False)
    assert not was_cached(caplog)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("onnx_sha256", "0"), ("precision", "int8"), ("calibration_sha256", "1"), ("profiles", ()), ("version", "2"),
        ("flavor", "tensorrt"), ("compute_capabilities", ("sm_90",)), ("gpu", "H100"), ("flags", ("REFIT",)),
    ],
)  # fmt: skip
def test_the_key_depends_on_everything_that_determines_an_engine(
    model: Path, tmp_path: Path, field: str, value: Any
) -> None:
    info = runtime.build(model, tmp_path / "a.engine", sm=(89,))
    assert engine_key(dataclasses.replace(info, **{field: value})) != engine_key(info)
    assert engine_key(dataclasses.replace(info, plan_sha256="", layers=())) == engine_key(info)


@pytest.mark.parametrize("damage", ["bit", "cut", "sidecar", "renamed", "no plan"])
def test_a_damaged_entry_is_reported_and_rebuilt(
    model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first = build(model, tmp_path / "a.engine")
    plan = folder / f"{engine_key(first)}.engine"
    content = bytearray(plan.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
    elif damage == "cut":
        plan.write_bytes(content[:-1])
    elif damage == "sidecar":
        sidecar_path(plan).write_text("[" * 100_000)
    elif damage == "renamed":
        changed = {**json.loads(sidecar_path(plan).read_text()), "compute_capabilities": ["sm_120"]}
        sidecar_path(plan).write_text(json.dumps(changed))
    else:
        plan.unlink()
    assert build(model, tmp_path / "b.engine").compute_capabilities == ("sm_89",)
    assert "a cached engine is damaged and will be rebuilt" in caplog.text
    assert read_sidecar(tmp_path / "b.engine") == read_sidecar(plan)
    caplog.clear()
    build(model, tmp_path / "c.engine")
    assert "damaged" not in caplog.text


def test_the_least_recently_used_engines_are_removed(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {}
    for sm in (80, 86, 89):
        keys[sm] = engine_key(build(model, tmp_path / "a.engine", sm=(sm,)))
    for age, sm in enumerate((89, 86, 80)):  # the oldest is 80
        sidecar_of = sidecar_path(folder / f"{keys[sm]}.engine")
        for file in (sidecar_of, folder / f"{keys[sm]}.engine"):
            os.utime(file, (time.time() - 100 * (age + 1),) * 2)
    build(model, tmp_path / "a.engine", sm=(80,))  # used again
    total = sum(entry.bytes for entry in cache.entries(folder))
    monkeypatch.setenv("ADVPROP_CACHE_GB", str(total * 1.1 / 1e9))
    newest = engine_key(build(model, tmp_path / "a.engine", sm=(120,)))
    assert {entry.key for entry in cache.entries(folder)} == {newest, keys[80], keys[89]}


@pytest.mark.parametrize("gigabytes", ["0", "0.000001"])
def test_a_cache_without_room_stays_empty(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: str
) -> None:
    monkeypatch.setenv("ADVPROP_CACHE_GB", gigabytes)
    build(model, tmp_path / "a.engine")
    build(model, tmp_path / "b.engine")
    assert cache.entries(folder) == []


@pytest.mark.parametrize("text", ["many", "-1", "nan", "inf"])
def test_an_invalid_size_causes_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    monkeypatch.setenv("ADVPROP_CACHE_GB", text)
    assert cache.limit_bytes() == 10e9
    assert "ADVPROP_CACHE_GB must be a number of gigabytes" in caplog.text


def test_a_cache_that_cannot_be_written_does_not_fail_the_build(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADVPROP_CACHE", str(tmp_path / "file"))
    info = build(model, tmp_path / "a.engine")
    assert read_sidecar(tmp_path / "a.engine") == info
    assert "is not used: Not a directory" in caplog.text


def test_a_cache_that_others_can_write_is_not_used(
    model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its engines contain native code. They may be valid, with a sidecar of the same author."""
    build(model, tmp_path / "a.engine")
    folder.chmod(0o777)
    caplog.set_level("INFO", "runtime")
    build(model, tmp_path / "b.engine")
    assert f"{folder} is not used: other users may write to it; run chmod 700 {folder}" in caplog.text
    assert not was_cached(caplog)
    build(model, tmp_path / "c.engine")
    assert "is not used" not in caplog.text  # one warning is enough
    folder.chmod(0o700)
    build(model, tmp_path / "d.engine")
    assert was_cached(caplog)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_not_used(
    model: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(mode=0o700, parents=True)
    os.chown(folder, 12345, 12345)
    build(model, tmp_path / "a.engine")
    assert "is not used: it belongs to another user; set ADVPROP_CACHE" in caplog.text
    assert list(folder.iterdir()) == []


def test_a_full_disk_does_not_fail_the_build(model: Path, tmp_path: Path) -> None:
    """The cache is on a file system of 16 kB, in its own mount namespace."""
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=16k none {small}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not allow mounting a file system")
    (tmp_path / "build.py").write_text(BUILD)
    script = f'{mount} && "$@" && find {small} -type f && "$@"'
    arguments = [sys.executable, tmp_path / "build.py", model, tmp_path / "a.engine"]
    environment = {**os.environ, "ADVPROP_CACHE": str(small), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [unshare, "-rm", "sh", "-c", script, "sh", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("EngineInfo(") == 2
    assert str(small) not in run.stdout  # no file is left
    assert "the disk is full" in run.stderr
    read_sidecar(tmp_path / "a.engine")


def slow_network(path: Path) -> Path:
    """Write a network that takes the builder at least a second."""
    random = np.random.default_rng(0)
    body, weights, name = [], {}, "input"
    for number in range(80):
        weights[f"w{number}"] = random.normal(size=(8 + number % 13, 8 + (number - 1) % 13 if number else 3, 3, 3))
        body.append(f"a{number} = Conv<pads=[1, 1, 1, 1]>({name}, w{number}) r{number} = Sigmoid(a{number})")
        name = f"r{number}"
    body.append(f"p = GlobalAveragePool({name}) logits = Flatten(p)")
    onnx.save(graph(" ".join(body), **weights), path)
    return path


def test_two_processes_build_the_same_engine_once(folder: Path, tmp_path: Path) -> None:
    source = slow_network(tmp_path / "slow.onnx")
    program = f"import logging; logging.basicConfig(level='INFO'); {BUILD}"
    both = [python(program, source, tmp_path / f"{name}.engine") for name in "ab"]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("using the cached engine" in errors for _, errors in outputs) == 1
    assert sum("waiting for another process" in errors for _, errors in outputs) == 1
    assert read_sidecar(tmp_path / "a.engine") == read_sidecar(tmp_path / "b.engine")
    assert len(list(folder.iterdir())) == 2  # no lock is left


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_build_after_a_kill_does_not_wait(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = slow_network(tmp_path / "slow.onnx")
    process = python(BUILD, source, tmp_path / "a.engine")
    while not list(folder.glob("*.lock")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # the build runs
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert [file.suffix for file in folder.iterdir()] == [".lock"]
    (folder / ".abc.engine.xyz.tmp").write_bytes(b"left behind by a kill during a write")
    os.utime(folder / ".abc.engine.xyz.tmp", (0, 0))
    with caplog.at_level(logging.INFO):
        info = build(source, tmp_path / "a.engine")
    assert "waiting for another process" not in caplog.text
    assert read_sidecar(tmp_path / "a.engine") == info
    assert {file.name for file in folder.iterdir()} == {
        f"{engine_key(info)}{end}" for end in (".engine", ".engine.json")
    }


def test_waiting_for_another_build_times_out(folder: Path) -> None:
    cache = EngineCache(folder=folder, max_bytes=10**9, lock_timeout_s=0.2)
    with cache.lock("key"):
        start = time.monotonic()
        with cache.lock("key"):
            assert time.monotonic() - start >= 0.2


def test_the_cache_command_lists_and_prunes(model: Path, folder: Path, tmp_path: Path) -> None:
    run = CliRunner()
    assert run.invoke(main, ["cache", "ls"]).output == "the cache is empty\n"
    assert run.invoke(main, ["cache", "path"]).output.strip() == str(folder.parent)
    for _ in range(2):
        built = run.invoke(main, ["build", str(model), "--out", str(tmp_path / "a.engine"), "--sm", "89"])
        assert built.exit_code == 0, built.output
    assert "using the cached engine" in built.output.replace("\n", " ")
    assert run.invoke(main, ["build", str(model), "--out", str(tmp_path / "a.engine"), "--no-cache"]).exit_code == 0
    assert len(cache.entries(folder)) == 1
    histograms = folder.parent / "histograms"
    histograms.mkdir()
    (histograms / "abc.npz").write_bytes(b"0" * 1000)
    (histograms / ".abc.npz.1.tmp").write_bytes(b"0")
    listed = run.invoke(main, ["cache", "ls"]).output
    assert "histograms" in listed
    assert re.search(r"fp32,?\s", listed)
    assert "2 entries" in listed
    assert "removed 0 entries" in run.invoke(main, ["cache", "prune"]).output
    assert "removed 1 entries" in run.invoke(main, ["cache", "prune", "--max-gb", "0.00001"]).output
    assert "removed 1 entries" in run.invoke(main, ["cache", "prune", "--all"]).output
    # Another process may be writing this file.
    assert [file.name for file in histograms.iterdir()] == [".abc.npz.1.tmp"]
    assert run.invoke(main, ["cache", "prune", "--all", "--max-gb", "1"]).exit_code == 2
    for command in ("ls", "prune", "path"):
        assert "Examples:" in run.invoke(main, ["cache", command, "--help"]).output
