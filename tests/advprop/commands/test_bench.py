"""`advprop bench` on real files in ONNX Runtime and PyTorch, and its results in the report."""

import csv
import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result

from advprop.checkpoints import open_torch_peer
from advprop.cli import main
from runtime.bench.entries import LoadOptions, find_onnx_of, open_targets
from runtime.engine.sidecar import EngineInfo, write_sidecar
from runtime.errors import ArchError, ConfigError, ModelFileError
from runtime.evaluate.report.inputs import latency_of
from runtime.system.files import sha256_file
from tests.support.checkpoints import save_resnet10t
from tests.support.evaluation_sets import labeled_folder, spec_of, toy_onnx
from tests.support.serving_models import serving_model
from train.models import create_model

QUICK = ["--rounds", "2", "--duration-s", "0", "--iterations", "2", "--warm-up-ms", "0", "--device", "cpu"]


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments), *QUICK, "--threads", "1"])


@pytest.fixture
def real_spec(tmp_path: Path) -> Path:
    """Write the toy model with the name of a ResNet in its spec."""
    return toy_onnx(tmp_path / "model.onnx", spec=dataclasses.replace(spec_of(), arch="resnet10t"))


def test_files_and_peers_side_by_side(real_spec: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "out"
    run = bench(real_spec, "--against", "torch,ort", "--batch", "1,4", "--concurrency", "1,2", "--out", out)
    torch.set_num_threads(threads)
    assert run.exit_code == 0, run.output
    names = ["model", "model-ort", "resnet10t-torch"]
    for words in (
        *names,
        "with random weights, which do not change the times",
        "a bare InferenceSession.run of the same file",
    ):
        assert words in run.output.replace("\n", " "), run.output
    found = json.loads((out / "bench.json").read_text())
    assert found["format"] == "advprop.benchrun/1"
    assert [model["name"] for model in found["models"]] == names
    assert [model["backend"].split()[0] for model in found["models"]] == ["onnxruntime", "onnxruntime", "torch"]
    assert found["models"][2]["threads"] == found["models"][0]["threads"] == 1
    assert found["models"][0]["sha256"] == sha256_file(real_spec)
    keys = [(point["model"], point["batch_size"], point["concurrency"]) for point in found["points"]]
    assert keys == [(name, size, callers) for size in (1, 4) for callers in (1, 2) for name in names]
    point = found["points"][0]
    assert set(point["quantities"]) == {"end_to_end", "compute", "predict", "decode", "transform", "run"}
    for times in point["quantities"].values():
        assert 0 < times["min_ms"] <= times["p50_ms"] <= times["p90_ms"] <= times["p99_ms"] <= times["max_ms"]
        assert len(times["round_medians_ms"]) == 2
    assert {"median", "low", "high"} == set(found["points"][1]["quantities"]["end_to_end"]["ratio"])
    assert found["trtexec"]["compute"]["trtexec"] == "GPU Compute Time"
    assert found["settings"]["batch_sizes"] == [1, 4]
    rows = list(csv.DictReader((out / "bench.csv").read_text().splitlines()))
    assert len(rows) == sum(len(point["quantities"]) for point in found["points"])
    page = (out / "bench.md").read_text()
    assert "## predict" in page
    assert "## On the GPU" not in page
    assert (out / "latency_throughput.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (out / "latency_throughput.svg").read_text()
    written = sorted(path.name for path in out.iterdir() if path.suffix == ".json")
    assert written == ["bench.json", "model.batch1.json", "model.batch4.json"]


def test_the_report_shows_latencies(real_spec: Path, tmp_path: Path) -> None:
    int8 = toy_onnx(tmp_path / "quick.onnx", scale=4.0)
    data, out = labeled_folder(tmp_path / "set", count=4), tmp_path / "out"
    assert bench(real_spec, int8, "--batch", "1,2", "--out", out).exit_code == 0
    evaluated = ["eval", str(real_spec), str(int8), "--suite", "imagenet", "--data", str(data), "--workers", "0"]
    assert CliRunner().invoke(main, [*evaluated, "--device", "cpu", "--out", str(tmp_path / "e")]).exit_code == 0
    files = [*sorted((tmp_path / "e").glob("*.json")), *sorted(out.glob("*.batch1.json"))]
    page = tmp_path / "report.md"
    run = CliRunner().invoke(main, ["report", *map(str, files), "-o", str(page)])
    assert run.exit_code == 0, run.output
    assert "p50 ms" in page.read_text()
    for name in ("model", "quick"):
        latency = latency_of(json.loads((out / f"{name}.batch1.json").read_text()), name)
        assert latency.p50_ms > 0
        assert f"{latency.p50_ms:.2g}"[:3] in page.read_text()
        result = json.loads((tmp_path / "e" / f"{name}.imagenet.json").read_text())
        assert result["model"]["sha256"] == latency.sha256


def test_a_checkpoint_is_timed_on_given_images(real_spec: Path, tmp_path: Path) -> None:
    model = create_model("resnet10t", num_classes=3)
    save_resnet10t(tmp_path / "best.pt", model, np.zeros((1, 32, 32, 3), np.uint8))
    threads = torch.get_num_threads()
    folder = labeled_folder(tmp_path / "set", count=1)
    run = bench(real_spec, tmp_path / "best.pt", "--batch", "5", "--images", folder, "--out", tmp_path / "out")
    torch.set_num_threads(threads)
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "out" / "best.batch5.json").read_text())
    assert found["model"]["sha256"] == sha256_file(tmp_path / "best.pt")
    assert found["backend"].startswith("torch ")
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["images"] == str(folder)


def test_files_without_a_spec_and_with_a_fixed_batch(tmp_path: Path) -> None:
    model = serving_model(batch="4")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "m.onnx")
    run = bench(tmp_path / "m.onnx", "--out", tmp_path / "out")
    assert run.exit_code == 0, run.output
    (point,) = json.loads((tmp_path / "out" / "bench.json").read_text())["points"]
    assert (point["batch_size"], sorted(point["quantities"])) == (4, ["compute", "end_to_end"])
    refused = bench(tmp_path / "m.onnx", "--batch", "1", "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert "m runs batches of 4" in refused.stderr
    assert "use --batch-sizes 4" in refused.stderr
    refused = bench(tmp_path / "m.onnx", "--against", "torch", "--out", tmp_path / "out")
    assert "has no spec, so its architecture is unknown" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.onnx"], 2, "no such model file: none.onnx"),
        (["bad.onnx"], 2, "bad.onnx"),
        (["model.onnx", "model.onnx"], 2, "the same file was passed twice"),
        (["model.onnx", "./model.onnx"], 2, "the same file was passed twice"),
        (["model.onnx", "--batch", "0"], 2, "at least 1; found 0"),
        (["model.onnx", "--batch", "one"], 2, "expected whole numbers such as 1,8,32"),
        (["model.onnx", "--concurrency", "1,1"], 2, "concurrency contains a number twice"),
        (["model.onnx", "--against", "jax"], 2, "--against takes torch and ort"),
        (["model.onnx", "--images", "."], 2, "found no image files"),
        (["model.onnx", "--out", "model.onnx"], 2, "cannot write model.onnx"),
        (["none.engine"], 2, "no such model file: none.engine"),
        ([], 2, "Missing argument"),
    ],
)
def test_invalid_input_exits_with_a_message(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toy_onnx(Path("model.onnx"))
    Path("bad.onnx").write_bytes(b"not a model")
    run = bench(*arguments)
    assert run.exit_code == code, run.output
    assert words in run.stderr.replace("\n", " ")


def sidecar(engine: Path, onnx_sha256: str) -> None:
    engine.write_bytes(b"plan")
    fields: dict[str, Any] = {
        "plan_sha256": sha256_file(engine),
        "onnx_sha256": onnx_sha256,
        "flavor": "tensorrt_rtx",
        "version": "0",
        "compute_capabilities": ("sm_89",),
        "gpu": "",
        "profiles": (),
        "flags": (),
        "precision": "fp32",
        "precision_shares": {},
        "calibration_sha256": "",
        "spec": None,
    }
    write_sidecar(engine, EngineInfo(**fields))


def test_the_onnx_file_next_to_an_engine_is_found_by_its_hash(tmp_path: Path) -> None:
    engine, model = tmp_path / "m.engine", toy_onnx(tmp_path / "m.onnx")
    sidecar(engine, sha256_file(model))
    assert find_onnx_of(engine) == model
    shutil.move(model, tmp_path / "x.onnx")
    toy_onnx(tmp_path / "m.onnx", scale=1.0)
    assert find_onnx_of(engine) == tmp_path / "x.onnx"
    (tmp_path / "x.onnx").unlink()
    with pytest.raises(
        ModelFileError, match=r"the folder does not contain it, and m.onnx is another file. Copy it there, or remove"
    ):
        find_onnx_of(engine)


def test_names_of_targets_and_settings_without_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        toy_onnx(tmp_path / folder / "m.onnx")
    logging.getLogger("runtime").handlers.clear()
    caplog.set_level(logging.WARNING, logger="runtime")
    paths = [tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"]
    found = open_targets(paths, ["ort"], LoadOptions(device="cpu", cuda_graphs=False))
    assert [one.name for one in found] == ["a-m.onnx", "a-m.onnx-ort", "b-m.onnx", "b-m.onnx-ort"]
    assert caplog.text.count("EngineOptions have no effect") == 2
    with pytest.raises(ConfigError, match=r"found 'ort,ort'"):
        open_targets(paths, ["ort", "ort"], LoadOptions())
    with pytest.raises(ArchError):
        open_targets(paths[:1], ["torch"], LoadOptions(device="cpu", spin=False), torch_opener=open_torch_peer)
    with pytest.raises(ConfigError, match=r"pass torch_opener=advprop\.checkpoints\.open_torch_peer"):
        open_targets(paths[:1], ["torch"], LoadOptions(device="cpu"))
    assert "spin settings have no effect on toy-torch" in caplog.text
    assert "use --threads N for equal numbers" in caplog.text
