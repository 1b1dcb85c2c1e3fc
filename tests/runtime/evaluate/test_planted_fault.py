"""A planted fault in an INT8 file of EfficientNet-Lite0 with its ImageNet weights."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from advprop.cli import main
from calib.config import CalibrationConfig
from calib.pipeline import calibrate_file
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from tests.support.real_weights import SOURCE, save_lite0
from tests.support.report_sets import with_fault

CALIBRATION, MEASURED = 32, 64
"""Number of class folders."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_a_scale_times_a_tenth_is_reported_and_int8_without_a_fault_is_not(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = sorted((shared_data("imagenet_dev.tar") / "imagenet_dev").iterdir())
    for name, chosen in (("calib", folders[1::2][:CALIBRATION]), ("val", folders[::2][:MEASURED])):
        for folder in chosen:
            shutil.copytree(folder, tmp_path / name / folder.name)
    fp32 = export_checkpoint(
        SOURCE, ExportConfig(weights=save_lite0(tmp_path / "lite0.pt"), data=tmp_path / "calib", out=tmp_path / "model")
    ).onnx
    int8, faulty = tmp_path / "sound.onnx", tmp_path / "faulty.onnx"
    calibrate_file(fp32, tmp_path / "calib", int8, CalibrationConfig(images=CALIBRATION), cache=False)
    with_fault(int8, faulty)
    out = tmp_path / "out"
    arguments = [fp32, int8, faulty, "--reference", fp32, "--suite", "imagenet", "--data", tmp_path / "val"]
    options = ["--out", out, "--device", "cpu", "--workers", "0", "--limit", MEASURED]
    run = CliRunner().invoke(main, ["eval", *map(str, [*arguments, *options])])
    assert run.exit_code == 0, run.output
    report = [part for ending in ("html", "md", "csv") for part in ("-o", str(tmp_path / f"report.{ending}"))]
    run = CliRunner().invoke(main, ["report", *map(str, sorted(out.glob("*.json"))), *report])
    assert run.exit_code == 0, run.output
    against = {}
    for name in ("sound", "faulty"):
        found = json.loads((out / f"{name}.imagenet.json").read_text())["metrics"]["cells"]["images"]
        against[name] = found["against_reference"]
    low, high = against["faulty"]["top1_difference_interval"]
    assert low < high < 0
    low, high = against["sound"]["top1_difference_interval"]
    assert low < 0 < high
    assert against["sound"]["agreement"] > 0.9
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text().replace("\\", "")
    lines = {name: re.search(rf"- \*\*{name}\*\* compared with model .*", text) for name in against}
    assert lines["faulty"]
    assert "**worse**" in lines["faulty"][0]
    assert lines["sound"]
    assert "no difference shown" in lines["sound"][0]
    assert re.search(r"Δ −\d+\.\d \[−\d+\.\d, −\d+\.\d\]", page)
    rows = {row["model"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert [float(rows["faulty"][key]) < 0 for key in ("top1_difference_low", "top1_difference_high")] == [True, True]
    assert float(rows["sound"]["top1_difference_high"]) > 0
