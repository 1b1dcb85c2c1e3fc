import json
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from advprop.cli import main
from advprop.doctor import check, run_checks
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
        assert (full.state, full.fix) == ("missing", "pip install 'advprop[tensorrt]'")
        assert "no NVIDIA GPU was found" in full.found
    assert all(finding.fix for finding in findings.values() if finding.state == "broken")


def test_doctor_prints_a_table_or_json() -> None:
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "TensorRT-RTX" in shown.output
    assert "advprop[tensorrt]" in "".join(shown.output.split()) or find_gpu() is not None
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
    finding = check("onnxruntime")
    assert finding.state == "broken"
    assert finding.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install")
