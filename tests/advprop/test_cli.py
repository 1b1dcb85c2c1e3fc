import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from advprop.cli import COMMANDS, main
from export.config import ExportConfig
from export.pipeline import export_checkpoint
from tests.support.digit_files import write_digits
from train.loop import FitResult


@pytest.fixture(scope="module")
def model(trained: FitResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(trained.last, ExportConfig(out=tmp_path_factory.mktemp("model"))).onnx


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    write_digits(tmp_path, 5)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Examples:" in result.output


@pytest.mark.parametrize("option", ["-h", "--version"])
def test_every_command_has_a_short_help_and_a_version(option: str) -> None:
    for command in ([], *([name] for name in COMMANDS), *(["cache", name] for name in ("ls", "path", "prune"))):
        result = CliRunner().invoke(main, [*command, option], prog_name="advprop")
        assert result.exit_code == 0, (command, result.output)
        expected = "advprop " if option == "--version" else " ".join(["Usage: advprop", *command])
        assert result.stdout.startswith(expected), (command, result.output)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["predikt"], "no such command: 'predikt'; did you mean predict?"),
        (["cache", "prun"], "no such command: 'prun'; did you mean prune?"),
        (["xyzzy"], "no such command: 'xyzzy'; expected one of train, export"),
        (["export", "best.pt", "--trtt", "fp16"], "no such option: --trtt; did you mean --trt?"),
        (["predict", "m.onnx", "a.jpg", "--topk", "3"], "no such option: --topk; did you mean --top?"),
        (["eval", "m.onnx", "--dat", "x"], "no such option: --dat; did you mean --data?"),
        (["attack", "m.onnx", "-d", "x"], "no such option: -d; did you mean --data or --draws or --device?"),
        (["bench", "m.onnx", "--no-grphs"], "no such option: --no-grphs; did you mean --no-graphs?"),
        (["export", "best.pt", "--half"], "no such option: --half; write FP16 with --precision fp16"),
        (["export", "best.pt", "-x"], "no such option: -x; main export --help lists all options"),
        (["--data", "x", "eval"], "no such option: --data; options follow the command: main eval --data"),
    ],
)
def test_misspelled_commands_and_options_suggest_the_nearest(arguments: list[str], hint: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert hint in result.stderr


@pytest.mark.slow
def test_predict_files_and_folders(model: Path, digits: Path) -> None:
    result = CliRunner().invoke(main, ["predict", str(model), str(digits), str(digits / "00.png"), "--top", "3"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(digits / f"{n:02}.png") for n in (0, 1, 2, 3, 4, 0)]
    assert lines[0] == lines[5]
    assert lines[0].count("%") == 3


@pytest.mark.slow
def test_predict_as_json(model: Path, digits: Path) -> None:
    result = CliRunner().invoke(main, ["predict", str(model), str(digits), "--json", "--top", "10"])
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == 5
    assert sum(item["probability"] for item in answers[0]["classes"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_predict_skips_and_names_an_image_that_cannot_be_decoded(model: Path, digits: Path) -> None:
    (digits / "02.png").write_bytes(b"not an image")
    result = CliRunner().invoke(main, ["predict", str(model), str(digits)])
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 4
    assert f"skipped: cannot decode {digits / '02.png'}" in result.stderr
    assert "1 of 5 images could not be decoded" in result.stderr


def test_predict_without_images_is_an_error(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["predict", str(model), str(tmp_path)])
    assert result.exit_code == 2
    assert "found no image files" in result.stderr


def test_inspect_a_checkpoint(trained: FitResult, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(trained.last)])
    assert result.exit_code == 0, result.output
    for text in ("advprop checkpoint", "main, adv", "1 epochs, 44 steps", "resnet10t", "advprop on digits"):
        assert text in result.output
    (tmp_path / "other.pt").write_bytes(b"nothing")
    refused = CliRunner().invoke(main, ["inspect", str(tmp_path / "other.pt")])
    assert refused.exit_code == 2
    assert "is not a torch file" in refused.output
