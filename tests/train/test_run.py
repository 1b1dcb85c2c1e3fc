from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from train.run import main


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--arch", "efficientnet_b33"], "has no architecture 'efficientnet_b33'; did you mean efficientnet_b3 or"),
        (["--arch", "convnext_atto"], "convnext_atto has no BatchNorm: it has"),
        (["--arch", "resnet10t", "--recipe", "advpro"], "unknown recipe 'advpro'"),
        (["--arch", "resnet10t", "--data", "/no/such/folder"], "/no/such/folder: no such folder; expected"),
        (
            ["--arch", "resnet10t", "--epsilon", "-1"],
            "attack.epsilon must be a finite number above 0 and at most 255, in 1/255 of the pixel range; found -1.0",
        ),
        (["--arch", "resnet10t", "--epochs", "0"], "epochs must be a whole number from 1 to 1000000; found 0"),
        (["--arch", "resnet10t", "--set", "lr=1"], "unknown setting lr; use optim.lr"),
        (["--model", "resnet10t", "--opt", "adammm"], "the optimizer 'adammm' with its default options does not work"),
        (["--model", "resnet10t", "--smoothing", "2"], "optim.label_smoothing must be a finite number"),
        (["--model", "resnet10t", "--num-classes", "5"], "the number of classes is that of the images; remove it"),
        (["--arch", "resnet10t", "epochs=3"], "unexpected argument 'epochs=3'; use --epochs 3"),
        (["--arch", "resnet10t", "photos"], "unexpected argument 'photos'; use --data photos"),
        (["--resume"], "--resume states no run; pass its folder"),
        (["--resume", "runs/none"], "cannot resume runs/none: no such file; pass the last.pt of a run"),
        (["--arch", "resnet10t", "--device", "gpu"], "--device 'gpu' is not a torch device"),
        (["--arch", "resnet10t", "--out", "/proc/nowhere"], "error: cannot write /proc/nowhere"),
    ],
)
def test_invalid_input_exits_with_2_and_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())  # no folder is left behind


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_exits_with_3(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--arch", "resnet10t", "--device", "cuda", "--out", str(tmp_path / "run")])
    assert result.exit_code == 3
    assert "finds no NVIDIA GPU; use --device cpu" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_help_has_examples() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert "python -m train.run --arch efficientnet_b3" in result.output
