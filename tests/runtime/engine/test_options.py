"""Progress, Ctrl-C, options and error messages of real TensorRT-RTX builds."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import runtime
from advprop.cli import main
from runtime.engine.flavors import choose_flavor
from runtime.engine.options import BuildOptions, apply_options, check_options, flag_names
from runtime.engine.progress import BuildProgress, run_interruptibly
from runtime.engine.sidecar import read_sidecar, sidecar_path
from runtime.errors import ConfigError, EngineBuildError
from runtime.system.gpu import find_gpu
from tests.support.networks import classifier, graph

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("options") / "a.onnx"
    onnx.save(classifier(), path)
    return path


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 150 convolutions of distinct shapes, which take the builder at least a second."""
    random = np.random.default_rng(0)
    lines, weights, channels, name = [], {}, 3, "input"
    for number in range(150):
        out = 8 + number % 23
        weights[f"w{number}"] = random.normal(size=(out, channels, 3, 3)) / 10
        lines.append(f"a{number} = Conv<pads=[1, 1, 1, 1]>({name}, w{number}) r{number} = Sigmoid(a{number})")
        name, channels = f"r{number}", out
    weights["last"] = random.normal(size=(4, channels, 1, 1))
    lines.append(f"z = Conv({name}, last) p = GlobalAveragePool(z) logits = Flatten(p)")
    path = tmp_path_factory.mktemp("deep") / "deep.onnx"
    onnx.save(graph(" ".join(lines), **weights), path)
    return path


def test_progress_never_decreases_and_ends_near_one(model: Path, tmp_path: Path) -> None:
    reported: list[tuple[str, float]] = []
    runtime.build(model, tmp_path / "a.engine", sm=(89,), progress=lambda phase, share: reported.append((phase, share)))
    shares = [share for _, share in reported]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.2
    assert 0.8 < shares[-1] <= 1
    assert "Building engine" in {phase for phase, _ in reported}


def test_nested_phases() -> None:
    reported: list[float] = []
    progress = BuildProgress(lambda phase, share: reported.append(share))
    progress.phase_start("all", None, 2)
    progress.phase_start("part", "all", 4)
    assert progress.step_complete("part", 1)
    assert reported[-1] == 0.25
    progress.phase_finish("part")
    progress.phase_start("ring", "ring", 2)  # a cycle must not loop forever
    progress.step_complete("all", 0)
    assert reported[-1] == 0.5
    progress.stop()
    assert not progress.step_complete("all", 1)


def test_an_error_of_the_callback_stops_the_build(model: Path, tmp_path: Path) -> None:
    def refuse(phase: str, share: float) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        runtime.build(model, tmp_path / "a.engine", sm=(89,), progress=refuse)
    assert list(tmp_path.iterdir()) == []
    runtime.build(model, tmp_path / "a.engine", sm=(89,))  # the next build succeeds


def test_a_signal_stops_the_build_and_keeps_the_old_engine(model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    before = runtime.build(model, engine, sm=(89,))

    def interrupt(phase: str, share: float) -> None:
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt):
        runtime.build(model, engine, sm=(86,), progress=interrupt)
    assert read_sidecar(engine) == before


def test_errors_and_repeated_interrupts_of_the_work() -> None:
    progress = BuildProgress()
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 // 0, progress)

    def work() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        assert progress.stopped

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work, progress)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_on_the_command_line(deep: Path, tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    command = [sys.executable, "-m", "advprop.cli", "build", str(deep), "--out", str(engine), "-v"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        seen = next(line for line in process.stdout if "tensorrt_rtx: " in line)  # the builder runs
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, seen + rest
    assert "Interrupted. No incomplete file was left behind." in rest
    assert list(tmp_path.iterdir()) == []


def test_messages_have_node_operator_and_reason(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 20, "my.domain" : 1]>
    g (float[n, 3, 8, 8] input) => (float[n, 3] logits) { a = Relu(input) logits = my.domain.Magic(a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    with pytest.raises(EngineBuildError, match=r"node 1 \(Magic\): tensorrt_rtx has no such operator \(creator.*\)$"):
        runtime.build(tmp_path / "a.onnx", sm=(89,), flavor="tensorrt_rtx")
    named = onnx.parser.parse_model(text.replace("my.domain.Magic(a)", "Conv(a, nothing)"))
    named.graph.node[1].name = "head"
    onnx.save(named, tmp_path / "a.onnx")
    with pytest.raises(EngineBuildError, match=r"node 'head' \(Conv\): one of its inputs is not the output of a node"):
        runtime.build(tmp_path / "a.onnx", sm=(89,), flavor="tensorrt_rtx")


def test_a_workspace_that_is_too_small_is_reported(tmp_path: Path) -> None:
    body = "a = Conv(input, w) p = GlobalAveragePool(a) f = Flatten(p) logits = Gemm<transB=1>(f, v)"
    random = np.random.default_rng(0)
    model = graph(body, 32, 32, w=random.normal(size=(2000, 3, 20, 20)), v=random.normal(size=(4, 2000)))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(EngineBuildError, match=r"workspace of 1 MiB is too small: try --workspace-mib \d+ or more"):
        runtime.build(tmp_path / "a.onnx", sm=(89,), options=BuildOptions(workspace_mib=1))
    info = runtime.build(tmp_path / "a.onnx", sm=(89,), options=BuildOptions(workspace_mib=512))
    assert info.flags == ("STRONGLY_TYPED", "WORKSPACE_512_MIB")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"version_compatible": True},
            "does not support version-compatible engines: each release needs its own engine",
        ),
        (
            {"hardware_compatible": "ampere_plus"},
            "does not support hardware compatibility levels; name the GPU generations",
        ),
        pytest.param(
            {"refit": True},
            "needs a GPU and its driver",
            marks=pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU"),
        ),
        pytest.param(
            {"strip_weights": True},
            "needs a GPU and its driver",
            marks=pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU"),
        ),
    ],
)
def test_options_that_tensorrt_rtx_does_not_support(
    model: Path, tmp_path: Path, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        runtime.build(model, tmp_path / "a.engine", sm=(89,), options=BuildOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_invalid_options_are_rejected() -> None:
    with pytest.raises(ConfigError, match="workspace_mib must be a number of MiB"):
        BuildOptions(workspace_mib=-1)
    with pytest.raises(ConfigError, match="must be one of ampere_plus, same_compute_capability"):
        BuildOptions(hardware_compatible="all")


@pytest.mark.parametrize("options", [BuildOptions(refit=True), BuildOptions(strip_weights=True)])
def test_int8_engines_cannot_be_refitted(options: BuildOptions) -> None:
    flavor = choose_flavor("tensorrt_rtx", (89,))
    with pytest.raises(ConfigError, match="an INT8 engine cannot be refitted"):
        check_options(flavor, options, quantized=True)


def test_flags_reach_the_builder() -> None:
    """TensorRT-RTX's bindings accept flags that only full TensorRT supports."""
    trt = choose_flavor("tensorrt_rtx", (89,)).module
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = builder.create_builder_config()
    options = BuildOptions(workspace_mib=64, version_compatible=True, refit=True, strip_weights=True)
    apply_options(trt, config, options)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    for flag in (trt.BuilderFlag.VERSION_COMPATIBLE, trt.BuilderFlag.REFIT, trt.BuilderFlag.STRIP_PLAN):
        assert config.get_flag(flag)
    assert flag_names(trt, options) == (
        "STRONGLY_TYPED",
        "VERSION_COMPATIBLE",
        "REFIT",
        "STRIP_PLAN",
        "WORKSPACE_64_MIB",
    )


def test_host_code_is_reported(model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    runtime.build(model, engine, sm=(89,))
    assert not read_sidecar(engine).has_host_code
    text = sidecar_path(engine).read_text()
    sidecar_path(engine).write_text(text.replace('"STRONGLY_TYPED"', '"STRONGLY_TYPED", "VERSION_COMPATIBLE"'))
    assert read_sidecar(engine).has_host_code
    assert "engine_host_code_allowed" in CliRunner().invoke(main, ["inspect", str(engine)]).output


def test_options_on_the_command_line(model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    common = ["build", str(model), "--out", str(engine), "--sm", "89", "--builder", "tensorrt_rtx"]
    result = CliRunner().invoke(main, [*common, "--workspace-mib", "256"])
    assert result.exit_code == 0, result.output
    assert read_sidecar(engine).flags == ("STRONGLY_TYPED", "WORKSPACE_256_MIB")
    refused = CliRunner().invoke(main, [*common, "--hardware-compatible", "same-compute-capability"])
    assert refused.exit_code == 2
    assert "name the GPU generations instead" in refused.stderr
    exported = CliRunner().invoke(main, ["export", "none.pt", "--refit"])
    assert "--refit only applies together with --trt" in exported.stderr
