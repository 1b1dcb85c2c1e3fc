"""`runtime.load` of an export folder opens the best file that runs here."""

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from runtime.engine.sidecar import sidecar_path
from runtime.errors import ConfigError, ModelFileError
from runtime.system.gpu import find_gpu
from tests.support.serving_models import serving_model

IMAGES = np.zeros((1, 3, 32, 32), np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.onnx", "model.fp16.onnx", "model.int8.onnx"):
        onnx.save(serving_model(size="32, 32"), tmp_path / name)
    (tmp_path / "best.pt").write_bytes(b"not read")
    (tmp_path / "export.json").write_text("{}")
    return tmp_path


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_fp32_onnx_file_is_the_first_choice_without_an_engine(folder: Path) -> None:
    with runtime.load(folder) as session:
        assert session.explain().splitlines()[0].endswith(f": {folder / 'model.onnx'}")
        expected = session.run(IMAGES)
    onnx.save(serving_model(size="32, 32"), folder / "model.v2.onnx")
    with runtime.load(folder) as session:  # a name without a precision comes last
        assert session.explain().splitlines()[0].endswith(f": {folder / 'model.onnx'}")
    (folder / "model.onnx").unlink()
    with runtime.load(str(folder), warm_up=(2,)) as session:
        assert "model.fp16.onnx" in session.explain()
        np.testing.assert_array_equal(session.run(IMAGES), expected)


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_an_engine_that_cannot_run_is_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    for precision in ("fp16", "int8"):
        runtime.build(folder / f"model.{precision}.onnx", sm=(89,), flavor="tensorrt_rtx", batch=(1, 1, 2))
    with runtime.load(folder) as session:
        first, *others = session.explain().splitlines()
        assert first.endswith(f": {folder / 'model.onnx'}")
        assert [line.split(":")[0] for line in others[:2]] == [
            "skipped model.int8.engine",
            "skipped model.fp16.engine",
        ]
        assert "no NVIDIA GPU or driver was found" in others[0]
        assert session.run(IMAGES).shape[0] == 1
    with runtime.load(folder, device="cpu") as session:
        assert "runs on a GPU only" in session.explain()
    assert not warnings_in(caplog)  # the files are valid
    with (folder / "model.int8.engine").open("r+b") as plan:
        plan.write(b"\0\0\0\0")
    with runtime.load(folder) as session:
        assert "skipped model.int8.engine: " in session.explain()
    (warning,) = warnings_in(caplog)
    assert "model.int8.engine is not the plan that its sidecar describes" in warning
    for file in folder.glob("*.onnx"):
        file.unlink()
    with pytest.raises(ModelFileError, match=r"no file in .* can be run:\n  skipped model\.int8\.engine"):
        runtime.load(folder)
    sidecar_path(folder / "model.int8.engine").unlink()
    with pytest.raises(ModelFileError, match=r"no such file: .*json"):
        runtime.load(folder)


def test_a_folder_without_models_is_rejected_with_advice(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.onnx"):
        file.unlink()
    with pytest.raises(ModelFileError, match=r"no \.onnx file and no \.engine file; .* advprop-export .*/best\.pt"):
        runtime.load(folder)
    (folder / "best.pt").unlink()
    with pytest.raises(ModelFileError, match="pass a model file"):
        runtime.load(folder)


def test_a_checkpoint_is_rejected_with_advice(folder: Path) -> None:
    with pytest.raises(ModelFileError, match=r"best\.pt is a checkpoint; export it first: advprop-export"):
        runtime.load(folder / "best.pt")


def test_invalid_arguments_fail_instead_of_skipping_files(folder: Path) -> None:
    with pytest.raises(ConfigError, match="backend must be"):
        runtime.load(folder, backend="tensorflow")
    with pytest.raises(ConfigError, match="device must be"):
        runtime.load(folder, device="tpu")
