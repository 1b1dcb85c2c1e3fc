"""Comparisons of models, and the conditions that fail them."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from runtime.errors import ConfigError, DataError
from runtime.evaluate.comparison import compare, rebase
from runtime.evaluate.comparison_text import comparison_table, summary_markdown, verdict_lines
from runtime.evaluate.counts import Counts
from runtime.evaluate.gate import Status, check, parse_condition, to_junit
from runtime.evaluate.metrics import calibration_error, grouped_calibration_error
from runtime.evaluate.results import Result
from runtime.evaluate.run import evaluate
from tests.support.evaluation_sets import config, labeled_folder, mean_color, one_pixel, run_config, toy
from tests.support.gate_trials import trial


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Return results of a good model, of the same model, and of a bad one, compared with the first."""
    folder = tmp_path_factory.mktemp("compare")
    models = [toy("good"), toy("same", predict=mean_color), toy("bad", predict=one_pixel)]
    suite = config("corruptions", labeled_folder(folder / "set", count=40), only=("clean", "fog"))
    return evaluate(models, suite, run_config(folder / "out", batch_size=32), reference=models[0])


def test_models_are_compared_image_by_image(results: list[Result]) -> None:
    comparison = compare(results, [], "good")
    assert (comparison.baseline.name, comparison.images) == ("good", 120)
    same, bad = comparison.others
    assert same.measured["top1"].is_identical
    assert same.measured["top1"].difference == 0
    loss = bad.measured["top1"].difference_interval
    assert loss is not None and loss[1] < -20
    assert bad.measured["fog"].difference is not None
    for name in ("top1", "ece", "mean_error", "fog"):
        assert name in bad.measured
    lines = "\n".join(verdict_lines(comparison))
    assert "clean top-1: identical, right on the same ones of 120 images" in lines
    assert "clean top-1: worse" in lines
    assert comparison_table(comparison).row_count > 4


def test_results_without_a_common_reference_are_compared_by_groups(results: list[Result]) -> None:
    bare = [{**result, "reference": None} for result in results]
    exact, grouped = (compare(found, [], "good").others[1].measured["top1"] for found in (results, bare))
    assert exact.difference_interval and grouped.difference_interval
    assert grouped.difference == pytest.approx(exact.difference)
    widths = [high - low for low, high in (exact.difference_interval, grouped.difference_interval)]
    assert 0.5 < widths[0] / widths[1] < 2
    assert rebase(bare[2], bare[0])["reference"]["name"] == "good"


def test_calibration_by_group_adds_up_to_the_calibration_error(results: list[Result]) -> None:
    for result in results:
        counts = Counts.from_dict(result["cells"]["clean"]["counts"])
        assert grouped_calibration_error(counts) == pytest.approx(calibration_error(counts), abs=1e-8)
        assert Counts.from_dict(counts.to_dict()) == counts
        assert "group_gap_nano" not in result["cells"]["fog/1"]["counts"]


def test_what_cannot_be_compared_is_refused(results: list[Result], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model is named 'x'; found good, same, bad"):
        compare(results, [], "x")
    suite = config("corruptions", labeled_folder(tmp_path / "set", count=4), only=("clean", "fog"))
    other = evaluate([toy("few")], suite, run_config(tmp_path))
    with pytest.raises(DataError, match="few cannot be compared with good: its images differ"):
        compare([*results, *other], [], "good")


@pytest.mark.parametrize(
    ("text", "relative", "below", "limit"),
    [
        ("top1 < baseline - 0.5", True, True, -0.5),
        ("fog>baseline+2", True, False, 2.0),
        ("mean_error >= baseline", True, False, 0.0),
        ("ece > 0.1", False, False, 0.1),
        ("top1 < 70%", False, True, 70.0),
    ],
)
def test_conditions(text: str, relative: bool, below: bool, limit: float) -> None:
    found = parse_condition(text)
    assert (found.is_relative, found.is_below, found.limit) == (relative, below, limit)


@pytest.mark.parametrize("text", ["top1", "top1 < ", "top1 = 3", "top1 < baseline * 2", "baseline < top1", ""])
def test_other_texts_are_no_conditions(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a condition METRIC < baseline - NUMBER"):
        parse_condition(text)


def test_a_condition_fails_only_if_the_whole_interval_is_beyond_the_limit(results: list[Result]) -> None:
    comparison = compare(results, [], "good")
    found = {
        (outcome.model, outcome.condition.text): outcome
        for outcome in check(
            map(parse_condition, ("top1 < baseline - 0.5", "top1 < baseline - 20", "top1 < 50")), comparison
        )
    }
    assert found["bad", "top1 < baseline - 0.5"].status is Status.FAILED
    assert found["same", "top1 < baseline - 0.5"].status is Status.INCONCLUSIVE
    assert "neither show the failure nor rule it out" in found["same", "top1 < baseline - 0.5"].explanation
    assert "120 images show a loss of" in found["same", "top1 < baseline - 0.5"].explanation
    assert found["same", "top1 < baseline - 20"].status is Status.PASSED
    assert found["same", "top1 < 50"].status is Status.PASSED
    with pytest.raises(ConfigError, match="the metric 'top2' was not measured; did you mean top1"):
        check([parse_condition("top2 < 1")], comparison)
    with pytest.raises(ConfigError, match="pass a second model"):
        check([parse_condition("top1 < baseline")], compare(results[:1], [], "good"))


def test_the_files_for_ci(results: list[Result]) -> None:
    comparison = compare(results, [], "good")
    outcomes = check([parse_condition("top1 < baseline - 0.5")], comparison)
    suite = ElementTree.fromstring(to_junit(comparison, outcomes).split("\n", 1)[1])
    assert suite.attrib["failures"] == "1"
    cases = {case.attrib["classname"]: [child.tag for child in case] for case in suite.iter("testcase")}
    assert cases == {"same": ["skipped"], "bad": ["failure"]}
    summary = summary_markdown(comparison, outcomes)
    assert "❌ failed | bad |" in summary
    assert "⚠️ inconclusive | same |" in summary
    assert "<details>" in summary


def test_the_error_rates_of_a_gate() -> None:
    """Of 200 trials each, none without a loss fails, and a loss of four points nearly always does."""
    random = np.random.default_rng(0)
    found = {loss: [trial(random, 2000, loss) for _ in range(200)] for loss in (0.0, 0.5, 4.0)}
    assert found[0.0].count(Status.FAILED) == 0
    assert found[0.5].count(Status.FAILED) <= 12  # 2.5% on average
    assert found[4.0].count(Status.FAILED) >= 195
