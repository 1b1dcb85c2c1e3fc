"""Inputs of a report: what is read, refused, merged and not compared."""

import json
import re
from pathlib import Path

import pytest

from runtime.errors import ConfigError, DataError
from runtime.evaluate.report import write_report
from runtime.evaluate.report.charts import Point, pareto_front
from runtime.evaluate.report.inputs import attack_of, latency_of, read_inputs
from runtime.evaluate.report.numbers import (
    Quantity,
    Unit,
    Verdict,
    columns_of,
    corruption_errors_of,
    verdict_of,
)
from runtime.evaluate.report.rows import report_of
from runtime.evaluate.results import write_result
from runtime.evaluate.run import evaluate
from tests.support import ROOT
from tests.support.evaluation_sets import config, labeled_folder, one_pixel, run_config, toy
from tests.support.report_sets import attack_file, bench_file, changed, results_of

ONLY = ("clean", "fog", "contrast/3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return results of three models on thirty images."""
    folder = tmp_path_factory.mktemp("made")
    data = labeled_folder(folder / "set", count=10)
    models = [toy("a"), toy("b", predict=one_pixel), toy("c", predict=lambda images: -images[:, :, 9, 9])]
    return results_of(models, data, folder, only=ONLY)


def test_other_files_are_refused(made: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for text, expected in (
        ("{", "is not JSON"),
        ("[1]", "found 'list'"),
        ('{"format": "advprop.calib/1"}', "found 'advprop.calib/1'"),
        ('{"format": "advprop.evaluation/9"}', "another version of advprop wrote it"),
        ('{"format": "advprop.evaluation/1"}', "it is damaged or was edited"),
        ('{"format": "advprop.bench/1"}', "missing 'model'"),
        ('{"format": "advprop.attack/1", "model": 3}', "expected format 'advprop.attack/1'"),
    ):
        other.write_text(text)
        with pytest.raises(DataError, match=expected):
            read_inputs([made[0], other])
    with pytest.raises(DataError, match="cannot read"):
        read_inputs([tmp_path / "none.json"])
    bench = bench_file(tmp_path / "bench.json", "a", 1.0)
    with pytest.raises(DataError, match="found none"):
        read_inputs([bench])
    with pytest.raises(DataError, match="above 0"):
        read_inputs([made[0], changed(bench, other, p50_ms=-1)])
    with pytest.raises(ConfigError, match=r"found .*report\.pdf"):
        write_report(made, [tmp_path / "report.pdf"])


@pytest.mark.parametrize("key", ["model", "data", "settings", "versions", "cells", "reference", "suite"])
def test_a_result_without_a_key_is_damaged(made: list[Path], tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="it is damaged or was edited"):
        read_inputs([changed(made[1], tmp_path / "x.json", **{key: 3})])


def test_metrics_are_computed_again_from_the_counts(made: list[Path], tmp_path: Path) -> None:
    wrong = json.loads(made[1].read_text())["metrics"]
    wrong["cells"]["clean"]["top1"] = 1.0
    (result,) = read_inputs([changed(made[1], tmp_path / "x.json", metrics=wrong)]).results
    assert result["metrics"]["cells"]["clean"]["top1"] < 1


def test_shards_and_cells_are_merged(made: list[Path], tmp_path: Path) -> None:
    data = made[0].parent / "set"
    cells = [
        results_of([toy("a")], data, tmp_path / name.replace("/", "-"), only=(name,), compared=False)[0]
        for name in ONLY
    ]
    inputs = read_inputs([*cells, cells[0]])
    assert len(inputs.results) == 1
    assert set(inputs.results[0]["cells"]) == {"clean", "contrast/3", *(f"fog/{level}" for level in range(1, 6))}
    parts = []
    for shard in (1, 2):
        run = run_config(tmp_path, batch_size=8, shard=shard, shards=2)
        (part,) = evaluate([toy("a")], config("imagenet", data), run)
        parts.append(tmp_path / f"{shard}.json")
        write_result(parts[-1], part)
    assert read_inputs(parts).results[0]["metrics"]["cells"]["images"]["images"] == 30
    with pytest.raises(DataError, match="found only shards 1/2 of an evaluation; pass all of its files"):
        read_inputs(parts[:1])
    with pytest.raises(DataError, match="cannot be merged"):
        read_inputs([made[0], results_of([toy("a")], data, tmp_path / "few", only=ONLY, limit=9)[0]])


def test_models_with_other_images_are_reported_and_not_compared(made: list[Path], tmp_path: Path) -> None:
    data = made[0].parent / "set"
    (few,) = results_of([toy("few")], data, tmp_path, only=ONLY, limit=21)
    (seed,) = results_of([toy("seed")], data, tmp_path / "seed", only=ONLY, seed=1)
    report = report_of(read_inputs([few, *made, seed]))
    first, *others = report.groups
    assert [entry.label for entry in first.entries] == ["a", "b", "c"]
    assert sorted(group.entries[0].label for group in others) == ["few", "seed"]
    gaps = "\n".join(report.gaps)
    assert (
        "few on corruptions: not compared, because its images differ from those of a (images: 21 instead of 30)" in gaps
    )
    assert "seed on corruptions: not compared, because its images differ from those of a (seed of the" in gaps
    column = next(column for column in columns_of(report) if column.quantity is Quantity.TOP1)
    marked = [entry.label for entry, value in zip(report.entries, column.values, strict=True) if value.why]
    assert sorted(marked) == ["few", "seed"]


def test_missing_measurements_are_reported(made: list[Path], tmp_path: Path) -> None:
    bare = report_of(read_inputs(results_of([toy("x")], made[0].parent / "set", tmp_path, "imagenet", compared=False)))
    gaps = "\n".join(bare.gaps)
    for message in ("no corruptions", "no comparison with a reference", "no latency", "no attacks"):
        assert message in gaps
    assert "imagenet-a" not in gaps  # advice for other classes
    assert [column.quantity for column in columns_of(bare)] == [Quantity.TOP1]
    other = bench_file(tmp_path / "s.json", "0123456789abcdef", 1.0, name="other")
    report = report_of(read_inputs([*made, other, attack_file(tmp_path / "t.json", "a")]))
    gaps = "\n".join(report.gaps)
    assert "latency of other (0123456789ab) ignored: no evaluation result has this model hash" in gaps
    assert "mce_alexnet" not in gaps  # there is an mCE relative to the reference
    assert report.entries[0].attacks
    assert "no attacks" not in gaps


def test_a_mean_error_is_not_shown_as_mce(made: list[Path]) -> None:
    columns = {column.quantity: column for column in columns_of(report_of(read_inputs(made)))}
    assert Quantity.MCE not in columns  # a model of three classes cannot be compared with AlexNet
    assert columns[Quantity.MEAN_ERROR].measured_on == "corruptions, plain mean"
    assert (Quantity.MEAN_ERROR.unit, Quantity.MCE.unit) == (Unit.SHARE, Unit.MCE)


def test_differences_by_corruption_follow_from_the_counts(made: list[Path]) -> None:
    results = [json.loads(path.read_text()) for path in made[:2]]
    errors = [{error.name: error for error in corruption_errors_of(result)} for result in results]
    fog = errors[1]["fog"]
    assert fog.difference == pytest.approx(fog.error - errors[0]["fog"].error)
    assert fog.interval is not None
    assert fog.interval[0] < fog.error < fog.interval[1]
    right = sum(results[1]["cells"][f"fog/{level}"]["counts"]["top1"] for level in range(1, 6))
    assert fog.error == pytest.approx(1 - right / 150)
    assert [level for level, *_ in errors[1]["contrast"].levels] == [3]
    # Without any error there is still no certainty: there were only 30 images.
    assert errors[0]["fog"].error == 0
    assert errors[0]["fog"].interval == pytest.approx((0, 0.1135), abs=5e-5)


def test_the_examples_in_the_documentation_are_read() -> None:
    text = (ROOT / "docs" / "how-to" / "report.md").read_text()
    bench, attack = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S))
    assert latency_of(bench, "docs").setting == "NVIDIA L4, batch 1"
    assert [curve.attack for curve in attack_of(attack, "docs").curves] == ["square", "noise"]


def test_verdicts_and_the_pareto_front() -> None:
    assert (
        verdict_of((0.1, 0.2), higher_is_better=True) is verdict_of((-2, -1), higher_is_better=False) is Verdict.BETTER
    )
    assert (
        verdict_of((0.1, 0.2), higher_is_better=False) is verdict_of((-2, -1), higher_is_better=True) is Verdict.WORSE
    )
    assert verdict_of((-0.1, 0.2), higher_is_better=True) is Verdict.UNCLEAR
    assert verdict_of(None, higher_is_better=True) is None
    points = [
        Point(place=0, label=label, x=x, y=y) for label, x, y in (("a", 1, 5), ("b", 2, 7), ("c", 2, 6), ("d", 3, 4))
    ]
    assert [point.label for point in pareto_front(points, higher_is_better=True)] == ["a", "b"]
    assert [point.label for point in pareto_front(points, higher_is_better=False)] == ["a", "d"]


def test_adding_a_result_keeps_all_columns(made: list[Path], tmp_path: Path) -> None:
    """Results on clean images, and of the same model without a reference, remove nothing."""
    data = made[0].parent / "set"
    before = {(column.quantity, column.measured_on) for column in columns_of(report_of(read_inputs(made)))}
    clean = results_of([toy("a"), toy("b")], data, tmp_path, "folder")
    bare = results_of([toy("b", predict=one_pixel)], data, tmp_path / "bare", only=ONLY, compared=False)
    report = report_of(read_inputs([*made, *clean, *bare]))
    after = {(column.quantity, column.measured_on) for column in columns_of(report)}
    assert before < after
    assert (Quantity.TOP1, "clean") in after
