"""Engines that are rejected before native code reads them, with engines that TensorRT-RTX built."""

import dataclasses
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

import runtime
from runtime.backends.tensorrt.engine import LoadedEngine
from runtime.backends.tensorrt.validation import check_gpu, check_plan, check_version, rebuild_command, validate_engine
from runtime.device.driver import Cuda, load_bindings
from runtime.engine.flavors import Flavor
from runtime.engine.sidecar import EngineInfo, read_sidecar, sidecar_path, write_sidecar
from runtime.errors import BackendUnavailable, ConfigError, ModelFileError
from runtime.system.gpu import Gpu, find_gpu
from tests.support import ROOT
from tests.support.serving_models import serving_model

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")

ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    onnx.save(serving_model(size="32, 32"), folder / "m.onnx")
    runtime.build(folder / "m.onnx", batch=(1, 2, 4), sm=(86, 89), flavor="tensorrt_rtx")
    return folder / "m.engine"


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    for file in (built, sidecar_path(built)):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / built.name


def change(engine: Path, **fields: Any) -> EngineInfo:
    info = dataclasses.replace(read_sidecar(engine), **fields)
    write_sidecar(engine, info)
    return info


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_an_engine_without_a_gpu_is_rejected(engine: Path, backend: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"m\.engine cannot run here: no NVIDIA GPU or driver was found: load"):
        runtime.load(engine, backend=backend)


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_the_message_lists_everything_that_is_missing(engine: Path) -> None:
    change(engine, flavor="tensorrt", version="10.13.0.35")
    with pytest.raises(BackendUnavailable) as error:
        runtime.load(engine)
    assert "TensorRT: tensorrt cannot be imported" in str(error.value)
    assert "pip install tensorrt cuda-bindings; no NVIDIA GPU or driver was found" in str(error.value)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "more"])
def test_a_modified_plan_is_rejected(engine: Path, damage: str) -> None:
    plan = engine.read_bytes()
    middle = len(plan) // 2
    changed = {
        "flip": plan[:middle] + bytes([plan[middle] ^ 1]) + plan[middle + 1 :],
        "cut": plan[:-1],
        "empty": b"",
        "more": plan + b"\0",
    }
    engine.write_bytes(changed[damage])
    with pytest.raises(ModelFileError, match=r"found sha256 .*expected .*build it again: advprop build"):
        runtime.load(engine)


def test_a_modified_plan_is_rejected_before_a_library_is_loaded(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1])
    program = (
        f"import sys, runtime\ntry: runtime.load({str(engine)!r})\n"
        "except runtime.errors.ModelFileError: print([name for name in sys.modules if 'tensorrt_rtx' in name])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (run.stdout, run.stderr) == ("[]\n", "")


@pytest.mark.parametrize("missing", ["sidecar", "plan", "both"])
def test_a_missing_plan_or_sidecar_is_reported(engine: Path, missing: str) -> None:
    for file in {"sidecar": [sidecar_path(engine)], "plan": [engine], "both": [engine, sidecar_path(engine)]}[missing]:
        file.unlink()
    with pytest.raises(ModelFileError, match=r"no such file: .*; build it again: advprop build MODEL.onnx --out"):
        runtime.load(engine)


def test_an_engine_of_another_release_is_rejected_with_the_rebuild_command(engine: Path) -> None:
    change(engine, version="1.6.0.53")
    with pytest.raises(ModelFileError) as error:
        runtime.load(engine)
    assert f"found TensorRT-RTX {tensorrt_rtx.__version__} here, expected 1.6.0.53" in str(error.value)
    command = f"advprop build MODEL.onnx --out {engine} --builder tensorrt_rtx --batch 1:2:4"
    assert error.value.fix == f"build it again: {command}; or install TensorRT-RTX 1.6.0.53"


def test_the_rebuild_command_builds_the_engine(engine: Path) -> None:
    info = change(engine, version="1.6.0.53")
    words = rebuild_command(engine, info).split()
    words[words.index("MODEL.onnx")] = str(engine.with_suffix(".onnx"))
    onnx.save(serving_model(size="32, 32"), engine.with_suffix(".onnx"))
    command = [sys.executable, "-m", "advprop.cli", *words[1:]]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    assert read_sidecar(engine).version == tensorrt_rtx.__version__


def test_a_version_compatible_engine_runs_in_later_releases_if_host_code_is_allowed(engine: Path) -> None:
    info = change(engine, flavor="tensorrt", version="10.13.0.35", flags=("STRONGLY_TYPED", "VERSION_COMPATIBLE"))
    with pytest.raises(ModelFileError, match=r"contains code that would run on the CPU.*allow_host_code=True"):
        runtime.load(engine)
    check_plan(engine, engine.read_bytes(), info, allow_host_code=True)
    for later in ("10.13.0.35", "10.16.1.11", "11.4.0.106"):
        check_version(engine, info, later)
    with pytest.raises(ModelFileError, match=r"found TensorRT 10\.9\.0\.34 here, expected 10\.13"):
        check_version(engine, info, "10.9.0.34")
    with pytest.raises(ModelFileError, match=r"found TensorRT 10\.16\.1\.11"):
        check_version(engine, dataclasses.replace(info, flags=()), "10.16.1.11")


def test_an_engine_without_weights_is_rejected(engine: Path) -> None:
    change(engine, flags=("STRIP_PLAN",))
    with pytest.raises(ModelFileError, match="was built without its weights"):
        runtime.load(engine)


def test_a_plan_that_changes_while_it_is_read_is_rejected(engine: Path) -> None:
    info = read_sidecar(engine)
    with pytest.raises(ModelFileError, match=r"changed while it was read: found sha256 .*expected"):
        check_plan(engine, b"other", info, allow_host_code=False)
    assert info.plan_sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("targets", "flags", "flavor", "gpu", "expected"),
    [
        (("sm_86",), (), "tensorrt_rtx", ADA, r"found NVIDIA GeForce RTX 4090 \(SM 89\), expected SM 86; .*--sm 89$"),
        (
            ("default",),
            (),
            "tensorrt_rtx",
            Gpu("T4", (7, 5)),
            r"expected SM 80, 86.*_rtx .*--sm 75",
        ),
        (
            ("default",),
            (),
            "tensorrt_rtx",
            Gpu("H100", (9, 0)),
            r"has no kernels for this GPU.*--builder tensorrt ",
        ),
        (("sm_90",), (), "tensorrt", ADA, r"is for another GPU: found .*expected SM 90; build it again"),
        (("sm_90",), ("AMPERE_PLUS",), "tensorrt", Gpu("T4", (7, 5)), "is for another GPU"),
        (("default",), (), "tensorrt_rtx", ADA, None),
        (("sm_86", "sm_89"), (), "tensorrt_rtx", ADA, None),
        (("sm_90",), ("AMPERE_PLUS",), "tensorrt", ADA, None),
    ],
)
def test_engines_for_other_gpus_are_rejected(
    engine: Path, targets: tuple[str, ...], flags: tuple[str, ...], flavor: str, gpu: Gpu, expected: str | None
) -> None:
    info = change(engine, compute_capabilities=targets, flags=flags, flavor=flavor)
    if expected is None:
        check_gpu(engine, info, gpu)
    else:
        with pytest.raises(ModelFileError, match=expected):
            check_gpu(engine, info, gpu)


def test_an_engine_tuned_on_another_gpu_causes_a_warning(engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = change(engine, flavor="tensorrt", gpu="NVIDIA L4")
    check_gpu(engine, info, ADA)
    assert "was tuned on NVIDIA L4; it may run slower on NVIDIA GeForce RTX 4090" in caplog.text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"backend": "onnxruntime"}, "ONNX Runtime cannot run; load the ONNX file that it was built from"),
        ({"device": "cpu"}, "runs on a GPU only"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"backend": "trt"}, "backend must be auto, onnxruntime, onnxruntime-tensorrt or tensorrt"),
    ],
)
def test_options_that_do_not_fit_an_engine(engine: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        runtime.load(engine, **options)


def test_options_that_do_not_fit_an_onnx_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"build an engine first: advprop build .*m\.onnx"):
        runtime.load(tmp_path / "m.onnx", backend="tensorrt")
    with caplog.at_level(logging.WARNING):
        runtime.load(tmp_path / "m.onnx", threads=1, engine=runtime.EngineOptions(contexts=4)).close()
    assert "EngineOptions have no effect on" in caplog.text
    with pytest.raises(ConfigError, match="must be at least 1; found 0"):
        runtime.EngineOptions(contexts=0)
    with pytest.raises(ConfigError, match="must be at least 1; found 0"):
        runtime.EngineOptions(max_graphs=0)


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_tensorrts_own_reason_is_in_the_message(engine: Path) -> None:
    """The real library reads the real plan, without our checks and without a driver."""
    flavor = Flavor("tensorrt_rtx", tensorrt_rtx)
    with pytest.raises(ModelFileError, match=r"tensorrt_rtx .* cannot load .*m\.engine: .*; build it again") as error:
        LoadedEngine(flavor, engine.read_bytes(), engine, outputs=1, cuda_graphs=True, allow_host_code=False)
    assert "gave no reason" not in str(error.value)
    with pytest.raises(BackendUnavailable, match=r"CUDA cannot be used: .*driver"):
        Cuda(load_bindings())


def test_a_valid_engine_is_returned_with_its_plan_library_and_gpu(engine: Path) -> None:
    validated = validate_engine(engine, allow_host_code=False, detect_gpu=lambda: ADA)
    assert hashlib.sha256(validated.plan).hexdigest() == validated.info.plan_sha256
    assert (validated.info, validated.gpu) == (read_sidecar(engine), ADA)
    assert (validated.flavor.name, validated.flavor.module) == ("tensorrt_rtx", tensorrt_rtx)
