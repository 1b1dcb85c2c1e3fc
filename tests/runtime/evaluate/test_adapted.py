"""Evaluation of models that are adapted to images of each cell."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.to_onnx import to_onnx
from runtime.adapt.adapt import adapt
from runtime.adapt.moments import with_clean_moments
from runtime.errors import ConfigError
from runtime.evaluate.corruptions import corrupt
from runtime.evaluate.models import load_model, with_adapted
from runtime.evaluate.report import write_report
from runtime.evaluate.results import Result, read_result, write_result
from runtime.evaluate.run import evaluate
from runtime.evaluate.suites import open_suite
from runtime.evaluate.table import result_table
from runtime.graph.model import run_batches, save_onnx
from runtime.preprocessing import normalize
from runtime.session import softmax
from runtime.system.console import set_up_logging
from tests.support.evaluation_sets import COLORS, config, labeled_folder, picture, run_config, spec_of, toy
from tests.support.norm_networks import Colors

FOG = "fog/5"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled_folder(tmp_path_factory.mktemp("set"), count=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a network for the pictures of the test set, exported like any other."""
    spec = spec_of()
    pictures = np.stack([picture(color, 100 + number) for color in COLORS for number in range(20)])
    inputs = normalize(pictures, spec.preprocessing)
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    save_onnx(with_clean_moments(to_onnx(Colors(inputs).eval(), spec), [inputs]), path)
    return path


@pytest.fixture(scope="module")
def results(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    suite = config("corruptions", data, only=("clean", "fog", "contrast"), adapt=(8, 16), seed=3)
    models = with_adapted([load_model(model, threads=1)], suite.adapt)
    return evaluate(models, suite, run_config(tmp_path_factory.mktemp("run")))


def test_field_images_are_the_same_in_all_cells_and_are_not_tested(data: Path) -> None:
    suite = open_suite(config("corruptions", data, only=("clean", FOG), adapt=(8, 16), seed=3), spec_of())
    for cell in suite.cells:
        assert cell.field is not None
        assert len(cell.field) == 16 and len(cell.images) == 44
        assert not set(cell.field.names) & set(cell.images.names)
        assert cell.field.names == suite.cells[0].field.names  # type: ignore[union-attr]
        assert {cell.field.labels.count(label) for label in range(3)} <= {5, 6}


def test_each_cell_is_measured_with_the_model_adapted_to_its_field_images(
    results: list[Result], data: Path, model: Path
) -> None:
    cell = next(
        cell
        for cell in open_suite(config("corruptions", data, only=(FOG,), adapt=(8, 16), seed=3), spec_of()).cells
        if cell.id == FOG
    )
    assert cell.field is not None

    def pixels(names: tuple[str, ...]) -> np.ndarray:
        images = [(name, picture(Path(name).parent.name, int(Path(name).stem))) for name in names]
        return np.stack([corrupt(image, "fog", 5, key=name, seed=3, table="cifar") for name, image in images])

    found = adapt(onnx.load(model), pixels(cell.field.names))
    assert found.verdict.adapts
    logits = run_batches(found.model, [normalize(pixels(cell.images.names), spec_of().preprocessing)])
    plain, eight, sixteen = (
        sum(result["cells"][FOG]["counts"]["bin_confidence_nano"]) / len(cell.images) / 1e9 for result in results
    )
    assert sixteen == pytest.approx(softmax(logits).max(1).mean(), abs=1e-5)
    assert len({round(value, 4) for value in (plain, eight, sixteen)}) == 3


def test_metrics_of_adapted_models_have_names_of_their_own(results: list[Result]) -> None:
    assert [result["model"]["name"] for result in results] == ["net", "net.adapted-8", "net.adapted-16"]
    plain, eight, sixteen = (set(result["metrics"]) - {"cells"} for result in results)
    assert plain == {"mean_error", "mce_alexnet", "relative_mce_alexnet"}
    assert eight == {"mean_error_adapted_8", "mce_adapted_8", "relative_mce_alexnet_adapted_8"}
    assert sixteen == {"mean_error_adapted_16", "mce_adapted_16", "relative_mce_alexnet_adapted_16"}


def test_each_cell_records_the_verdict(results: list[Result]) -> None:
    plain, _, sixteen = results
    for cell, found in sixteen["cells"].items():
        adapts = found["counts"]["adapted"] > 0
        assert found["counts"]["adapted"] == found["counts"]["images"] * adapts
        assert sixteen["metrics"]["cells"][cell]["adapted"] is adapts
        if not adapts:
            assert found["counts"] == {**plain["cells"][cell]["counts"], "adapted": 0}
    assert sixteen["metrics"]["cells"][FOG]["adapted"]
    assert not sixteen["metrics"]["cells"]["clean"]["adapted"]
    assert "adapted" not in plain["cells"][FOG]["counts"]


def test_tables_and_reports_show_both(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging().print(result_table(results))
    shown = capsys.readouterr().out
    assert "adapted cells" in shown
    assert "mean_error " in shown and "mean_error_adapted_8" in shown and "mean_error_adapted_16" in shown
    paths = []
    for number, result in enumerate(results):
        paths.append(tmp_path / f"{number}.json")
        write_result(paths[-1], result)
        assert read_result(paths[-1])["metrics"].keys() == result["metrics"].keys()
    write_report(paths, [tmp_path / "report.html"])
    page = (tmp_path / "report.html").read_text()
    assert "mean error, adapted to each corruption" in page and "net.adapted-8" in page


@pytest.mark.parametrize(("adapt_to", "expected"), [((40,), "at least 80"), ((8, 8), "different numbers")])
def test_numbers_of_field_images_that_do_not_fit_are_reported(
    adapt_to: tuple[int, ...], expected: str, data: Path
) -> None:
    with pytest.raises(ConfigError, match=expected):
        open_suite(config("corruptions", data, only=("clean",), adapt=adapt_to), spec_of())


def test_models_that_cannot_be_adapted_are_reported() -> None:
    with pytest.raises(ConfigError, match="toy cannot be adapted"):
        with_adapted([toy()], [8])
