import json
from importlib import metadata
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from advprop.cli import main
from advprop.doctor import Finding, check, run_checks, summarize
from runtime.system.gpu import find_gpu


def test_every_part_is_checked() -> None:
    findings = run_checks()
    runtime = findings["onnxruntime"]
    assert runtime.state == "ok"
    assert "CPU" in runtime.found
    builder = findings["tensorrt_rtx"]
    assert (builder.state, builder.found.split(".")[0]) == ("ok", metadata.version("tensorrt-rtx").split(".")[0])
    if find_gpu() is None:
        assert findings["gpu"].state == "missing"
        full = findings["tensorrt"]
        assert (full.state, full.fix) == ("missing", ""), "installing TensorRT does not help without a GPU"
        assert "no NVIDIA GPU was found" in full.found
    assert all(finding.fix for finding in findings.values() if finding.state == "broken")


def test_doctor_prints_a_table_or_json() -> None:
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "TensorRT-RTX" in shown.output
    assert shown.stdout.startswith("Training and prediction work on this ")
    assert "…" not in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    content = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert [entry["part"] for entry in content][:3] == ["machine", "GPU", "ONNX Runtime"]
    assert all(set(entry) == {"part", "state", "found", "fix"} for entry in content)


def test_two_onnx_runtimes_are_reported_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions of ONNX Runtime are installed, according to their metadata."""
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-9.9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = check("onnxruntime")
    assert found.state == "broken"
    assert found.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")


def finding(state: Literal["ok", "missing", "broken"], fix: str = "") -> Finding:
    return Finding(part="part", state=state, found="found", fix=fix)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"onnxruntime": finding("broken", "pip 1")}, "because ONNX Runtime is broken. Fix it: pip 1"),
        ({"torch": finding("broken", "pip 2")}, "but part is broken. Fix it: pip 2"),
        ({"timm": finding("missing", "pip 3")}, "Training and export need timm: pip 3"),
        ({"tensorrt_rtx": finding("missing", "pip 4")}, "Training and prediction work on this CPU; engines need pip 4"),
        ({"tensorrt_rtx": finding("missing")}, "engines need another machine"),
        ({"onnxruntime_gpu": finding("ok")}, "work on this GPU"),
    ],
)
def test_the_summary_states_what_matters_most(changes: dict[str, Finding], words: str) -> None:
    usual = {name: finding("ok") for name in ("onnxruntime", "torch", "timm", "tensorrt_rtx")}
    absent = {name: finding("missing") for name in ("gpu", "onnxruntime_gpu", "tensorrt", "pycuda")}
    assert words in summarize({**usual, **absent, **changes})
