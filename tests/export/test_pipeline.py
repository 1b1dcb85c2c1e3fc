import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner

import runtime
from advprop.commands.inspect import main as inspect
from export.cli import main
from export.config import EngineConfig, ExportConfig
from export.pipeline import ExportResult, export_checkpoint
from export.source import load_source
from runtime.engine.sidecar import read_sidecar
from runtime.errors import CheckpointError, ConfigError, DataError, ModelFileError
from runtime.preprocessing import Preprocessor
from runtime.system.gpu import find_gpu
from tests.support.digit_files import write_digits
from train.dual_bn import strip_auxiliary
from train.loop import FitResult


@pytest.fixture(scope="module")
def exported(trained: FitResult, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    out = tmp_path_factory.mktemp("exported")
    return export_checkpoint(trained.last, ExportConfig(out=out, precision="fp16", engine=EngineConfig(sm=(86, 89))))


@pytest.mark.slow
def test_files_names_and_parity(exported: ExportResult) -> None:
    folder = exported.onnx.parent
    assert {path.name for path in folder.iterdir()} == {
        *("model.onnx", "model.fp16.onnx", "model.fp16.json", "model.fp16.engine", "model.fp16.engine.json"),
        "export.json",
    }
    decisions = json.loads((folder / "model.fp16.json").read_text())
    assert decisions["kept_fp32"] == []
    assert (decisions["parity"]["images"], decisions["amax"]["logits"] > 0) == (64, True)
    assert exported.onnx_parity.images == 64
    assert exported.onnx_parity.max_abs <= 1e-4
    assert exported.reduced_parity is not None and exported.reduced_onnx is not None
    assert exported.reduced_parity.agreement >= 0.98
    assert exported.reduced_onnx.stat().st_size < 0.6 * exported.onnx.stat().st_size


@pytest.mark.slow
def test_the_sidecar_describes_the_engine(exported: ExportResult, trained: FitResult) -> None:
    content = json.loads((exported.onnx.parent / "model.fp16.engine.json").read_text())
    assert content["format"] == "advprop.engine/1"
    assert exported.engine is not None and exported.reduced_onnx is not None
    info = read_sidecar(exported.engine)
    assert info == exported.engine_info
    assert (info.precision, info.flavor, info.compute_capabilities) == ("fp16", "tensorrt_rtx", ("sm_86", "sm_89"))
    assert info.precision_shares["fp16"] == 1.0
    assert info.profiles[0]["input"]["max"] == [32, 3, 32, 32]
    assert info.onnx_sha256 == runtime.system.files.sha256_file(exported.reduced_onnx)
    assert info.spec is not None
    assert info.spec.classes == tuple("0123456789")
    assert info.spec.checkpoint_sha256 == runtime.system.files.sha256_file(trained.last)


@pytest.mark.slow
def test_inspect_shows_how_a_file_was_verified_and_which_backends_run_it(exported: ExportResult) -> None:
    for name, words in (
        ("model.onnx", ("against the checkpoint on 64 images", "MMACs", "100.0% fp32")),
        ("model.fp16.onnx", ("against model.onnx on 64 images", "% fp16,", "ONNX Runtime on the CPU: yes")),
        ("model.fp16.engine", ("its ONNX file, against model.onnx on 64 images",)),
    ):
        result = CliRunner().invoke(inspect, [str(exported.onnx.parent / name)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        assert all(word in result.output for word in words), result.output
    (exported.onnx.parent / "copy").mkdir()
    moved = shutil.copy(exported.onnx, exported.onnx.parent / "copy" / "model.onnx")
    assert "verified" not in CliRunner().invoke(inspect, [str(moved)], env={"COLUMNS": "200"}).output


@pytest.mark.slow
def test_a_range_of_image_sizes_makes_the_input_size_dynamic(trained: FitResult, tmp_path: Path) -> None:
    sizes = runtime.ImageSizes.parse("24:32:48x64")
    result = export_checkpoint(
        trained.last, ExportConfig(out=tmp_path, sizes=sizes, precision="bf16", engine=EngineConfig(sm=(86,)))
    )
    assert result.engine_info is not None and result.reduced_onnx is not None
    assert result.engine_info.profiles[0]["input"] == {
        "min": [1, 3, 24, 24],
        "opt": [8, 3, 32, 32],
        "max": [32, 3, 48, 64],
    }
    assert result.engine_info.precision == "bf16"
    with runtime.load(result.onnx) as session:
        assert session.backend.input.shape == (-1, 3, -1, -1)
        assert session.run(np.zeros((2, 3, 40, 28), np.float32)).shape == (2, 10)
        assert session.predict([np.zeros((70, 50, 3), np.uint8)])[0].probabilities.shape == (10,)
    with pytest.raises(ModelFileError, match=r"cannot run .*model\.bf16\.onnx.*TensorRT"):
        runtime.load(result.reduced_onnx)
    with pytest.raises(ModelFileError, match=r"has a dynamic size.*--img-size MIN:OPT:MAX"):
        runtime.build(result.onnx)
    with pytest.raises(ConfigError, match="fixed size"):
        runtime.build(export_at_48(trained, tmp_path / "fixed"), options=runtime.BuildOptions(image_sizes=sizes))


def export_at_48(trained: FitResult, out: Path) -> Path:
    """Export the network at another size than it was trained at, and check its outputs."""
    result = export_checkpoint(
        trained.last, ExportConfig(out=out, sizes=runtime.ImageSizes.parse("48"), output_form="topk")
    )
    with runtime.load(result.onnx) as session:
        assert session.spec.preprocessing.height == 48
        outputs = session.run_outputs(np.zeros((2, 3, 48, 48), np.float32))
        assert {name: answer.shape for name, answer in outputs.items()} == {"probs": (2, 5), "classes": (2, 5)}
        answer = session.predict([np.zeros((70, 50, 3), np.uint8)])[0]
        expected = [(int(answer.indices[n]), float(answer.probabilities[n])) for n in (0, 1)]
        assert [(ranked.index, ranked.probability) for ranked in answer.top(2)] == expected
        assert answer.index == answer.indices[0]
    return result.onnx


@pytest.mark.slow
def test_predictions_from_files_are_those_of_the_checkpoint(
    exported: ExportResult, trained: FitResult, tmp_path: Path
) -> None:
    paths = write_digits(tmp_path, 40)
    source = load_source(trained.last)
    with torch.no_grad():
        expected = source.model(torch.from_numpy(Preprocessor(source.spec.preprocessing)(paths))).argmax(1).tolist()
    assert exported.reduced_onnx is not None
    for path in (exported.onnx, exported.reduced_onnx):
        with runtime.load(path) as session:
            assert [answer.index for answer in session.predict(paths)] == expected


def test_exported_weights_are_the_moving_average_of_the_main_route(trained: FitResult) -> None:
    checkpoint = torch.load(trained.last, weights_only=True)
    model = timm.create_model("resnet10t", num_classes=10)
    model.load_state_dict(strip_auxiliary(checkpoint["ema_state_dict"]), strict=True)
    exported = load_source(trained.last).model.state_dict()
    assert all(torch.equal(value, exported[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def state_dict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "weights.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("resnet10t", num_classes=4).state_dict()}, path)
    return path


@pytest.mark.slow
def test_a_plain_state_dict_is_exported_with_arch_and_images(state_dict: Path, image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"contains no images to verify.*--data DIR"):
        export_checkpoint(state_dict, ExportConfig(arch="resnet10t"))
    result = export_checkpoint(state_dict, ExportConfig(arch="resnet10t", data=image_folder))
    assert result.onnx == state_dict.parent / "model.onnx"
    assert result.onnx_parity.images == 64
    with runtime.load(result.onnx) as session:
        assert session.spec.classes == ("class 0", "class 1", "class 2", "class 3")
        answers = session.predict([np.zeros((300, 200, 3), np.uint8)])
    assert answers[0].probabilities.shape == (4,)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (None, r"plain state_dict.*--arch"),
        ("resnet18", "do not fit timm's resnet18"),
        ("efficientnet_b0", "does not fit efficientnet_b0: it has no classifier.weight"),
    ],
)
def test_a_state_dict_of_another_architecture_is_refused(state_dict: Path, arch: str | None, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_source(state_dict, arch)


def test_a_checkpoint_cannot_make_timm_download_or_read_files(trained: FitResult, tmp_path: Path) -> None:
    checkpoint = torch.load(trained.last, weights_only=True)
    checkpoint["model_kwargs"]["checkpoint_path"] = "/etc/passwd"
    torch.save(checkpoint, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"model_kwargs .*expected only num_classes"):
        load_source(tmp_path / "evil.pt")


def test_another_architecture_than_that_of_the_checkpoint_is_refused(trained: FitResult) -> None:
    with pytest.raises(CheckpointError, match="is a checkpoint of resnet10t, but --arch is resnet18"):
        load_source(trained.last, "resnet18")


@pytest.mark.slow
@pytest.mark.skipif(find_gpu() is not None, reason="with a GPU, full TensorRT may be able to build")
def test_without_a_builder_the_onnx_files_are_kept_and_the_exit_code_is_3(trained: FitResult, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, [str(trained.last), "--trt", "fp16", "--builder", "tensorrt", "--out", str(tmp_path)]
    )
    assert result.exit_code == 3, result.output
    assert "pip install tensorrt-rtx" in result.stderr
    assert "ONNX files are complete" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx",
        "model.fp16.onnx",
        "model.fp16.json",
        "export.json",
    }


@pytest.mark.slow
def test_a_failed_verification_exits_with_4_and_keeps_the_file(trained: FitResult, tmp_path: Path) -> None:
    checkpoint = torch.load(trained.last, weights_only=True)
    for state in ("state_dict", "ema_state_dict"):
        checkpoint[state]["fc.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pt")
    result = CliRunner().invoke(main, [str(tmp_path / "nan.pt")])
    assert result.exit_code == 4, result.output
    assert "does not agree with the checkpoint" in result.stderr
    assert "The first layer that diverges is fc (Linear)" in result.stderr
    unnamed = CliRunner().invoke(main, [str(tmp_path / "nan.pt"), "--no-bisect"])
    assert unnamed.exit_code == 4
    assert "first layer" not in unnamed.stderr
    onnx.load(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.pt"], "no such checkpoint: nowhere.pt"),
        (["CHECKPOINT", "--sm", "86"], "--sm only applies together with --trt"),
        (["CHECKPOINT", "--timing-cache", "cache"], "--timing-cache only applies together with --trt"),
        (["CHECKPOINT", "--trt", "int8"], "INT8 needs calibration images: --calib-data DIR"),
        (["CHECKPOINT", "--trt", "fp16", "--calib-data", "/tmp"], "calibration images require the precision int8"),
        (
            ["CHECKPOINT", "--trt", "int8", "--calib-data", "/tmp", "--output", "probs"],
            "remove --input and --output",
        ),
        (["CHECKPOINT", "--io", "fp16"], "--io fp16 requires --trt fp16"),
        (["CHECKPOINT", "--img-size", "320:160:64"], "image sizes need 1 ≤ min ≤ opt ≤ max"),
        (["CHECKPOINT", "--img-size", "big"], "an image size is N, HEIGHTxWIDTH"),
        (["CHECKPOINT", "--trt", "fp16", "--sm", "ampere"], "--sm takes a compute capability such as 86"),
        (["CHECKPOINT", "--trt", "fp16", "--batch", "8:1"], "expected MIN:OPT:MAX such as 1:8:32"),
        (["CHECKPOINT", "--trt", "fp16", "--precision", "fp32"], "remove --precision"),
        (["CHECKPOINT", "--trt", "fp16", "--sm", "90", "--builder", "tensorrt_rtx"], "does not support SM 90"),
        (["CHECKPOINT", "--data", "/no/such"], "no such folder of images: /no/such"),
        (["CHECKPOINT", "--out", "/proc/nowhere"], "cannot write /proc/nowhere"),
    ],
)
def test_invalid_input_exits_with_2_and_a_message(trained: FitResult, arguments: list[str], expected: str) -> None:
    arguments = [str(trained.last) if word == "CHECKPOINT" else word for word in arguments]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert not (trained.last.parent / "model.onnx").exists()
