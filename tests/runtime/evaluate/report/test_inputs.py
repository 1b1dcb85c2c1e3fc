"""What a report takes, what it refuses, and what it does not compare."""

import json
import re
from pathlib import Path

import pytest

from runtime.errors import ConfigError, DataError
from runtime.evaluate.report.charts import Point, front
from runtime.evaluate.report.inputs import read_inputs
from runtime.evaluate.report.measured import attack_of, latency_of
from runtime.evaluate.report.numbers import columns_of, corruption_errors_of, verdict
from runtime.evaluate.report.rows import report_of
from runtime.evaluate.report.write import write_report
from runtime.evaluate.results import write_result
from runtime.evaluate.run import evaluate
from tests.runtime.evaluate.test_run import one_pixel
from tests.support import ROOT
from tests.support.evaluation_sets import config, labeled_folder, run_config, toy
from tests.support.report_sets import attack_file, bench_file, changed, results_of

ONLY = ("clean", "fog", "contrast/3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Results of three models on thirty images."""
    folder = tmp_path_factory.mktemp("made")
    data = labeled_folder(folder / "set", count=10)
    models = [toy("a"), toy("b", predict=one_pixel), toy("c", predict=lambda images: -images[:, :, 9, 9])]
    return results_of(models, data, folder, only=ONLY)


def test_files_that_are_no_results_are_refused(made: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for text, expected in (
        ("{", "is not JSON"),
        ("[1]", "found 'list'"),
        ('{"format": "advprop.calib/1"}', "found 'advprop.calib/1'"),
        ('{"format": "advprop.evaluation/9"}', "written by another version of advprop"),
        ('{"format": "advprop.evaluation/1"}', "damaged or changed by hand"),
        ('{"format": "advprop.bench/1"}', "no 'model' in it"),
        ('{"format": "advprop.attack/1", "model": 3}', "expected 'advprop.attack/1'"),
    ):
        other.write_text(text)
        with pytest.raises(DataError, match=expected):
            read_inputs([made[0], other])
    with pytest.raises(DataError, match="cannot read"):
        read_inputs([tmp_path / "none.json"])
    bench = bench_file(tmp_path / "bench.json", "a", 1.0)
    with pytest.raises(DataError, match="found none of them"):
        read_inputs([bench])
    with pytest.raises(DataError, match="above 0"):
        read_inputs([made[0], changed(bench, other, p50_ms=-1)])
    with pytest.raises(ConfigError, match=r"found .*report\.pdf"):
        write_report(made, [tmp_path / "report.pdf"])


@pytest.mark.parametrize("key", ["model", "data", "settings", "versions", "cells", "reference", "suite"])
def test_a_result_that_lacks_something_is_damaged(made: list[Path], tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="damaged or changed by hand"):
        read_inputs([changed(made[1], tmp_path / "x.json", **{key: 3})])


def test_metrics_are_made_anew_from_the_counts(made: list[Path], tmp_path: Path) -> None:
    lie = json.loads(made[1].read_text())["metrics"]
    lie["cells"]["clean"]["top1"] = 1.0
    (result,) = read_inputs([changed(made[1], tmp_path / "x.json", metrics=lie)]).results
    assert result["metrics"]["cells"]["clean"]["top1"] < 1


def test_shards_and_cells_are_put_together(made: list[Path], tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match="only parts 1/2 of an evaluation; give all of its files"):
        read_inputs(parts[:1])
    with pytest.raises(DataError, match="do not go together"):
        read_inputs([made[0], results_of([toy("a")], data, tmp_path / "few", only=ONLY, limit=9)[0]])


def test_models_on_other_images_are_said_and_not_compared(made: list[Path], tmp_path: Path) -> None:
    data = made[0].parent / "set"
    (few,) = results_of([toy("few")], data, tmp_path, only=ONLY, limit=21)
    (seed,) = results_of([toy("seed")], data, tmp_path / "seed", only=ONLY, seed=1)
    report = report_of(read_inputs([few, *made, seed]))
    first, *others = report.groups
    assert [entry.label for entry in first.entries] == ["a", "b", "c"]
    assert sorted(group.entries[0].label for group in others) == ["few", "seed"]
    told = "\n".join(report.gaps)
    assert "few on corruptions: other images than a (images: 21 instead of 30); not compared" in told
    assert "seed on corruptions: other images than a (seed of the corruptions: 1 instead of 0)" in told
    column = next(column for column in columns_of(report) if column.title == "top-1")
    marked = [entry.label for entry, value in zip(report.entries, column.values, strict=True) if value.why]
    assert sorted(marked) == ["few", "seed"]


def test_what_is_missing_is_said(made: list[Path], tmp_path: Path) -> None:
    bare = report_of(read_inputs(results_of([toy("x")], made[0].parent / "set", tmp_path, "imagenet", compared=False)))
    told = "\n".join(bare.gaps)
    for words in ("no corruptions", "no change against a reference", "no imagenet-a", "no latency", "no attacks"):
        assert words in told
    assert [column.title for column in columns_of(bare)] == ["top-1"]
    stranger = bench_file(tmp_path / "s.json", "0123456789abcdef", 1.0, name="stranger")
    report = report_of(read_inputs([*made, stranger, attack_file(tmp_path / "t.json", "a")]))
    told = "\n".join(report.gaps)
    assert "latency of stranger (0123456789ab) left out: no result is of a model with that hash" in told
    assert "no mce_alexnet, relative_mce_alexnet of a, b, c on corruptions: AlexNet's errors are of ImageNet's" in told
    assert report.entries[0].attacks
    assert "no attacks" not in told


def test_a_mean_error_is_no_mce(made: list[Path]) -> None:
    titles = {column.title: column for column in columns_of(report_of(read_inputs(made)))}
    assert "mCE" not in titles  # three classes: AlexNet is no yardstick
    assert titles["mean error"].of == "corruptions, plain mean"
    assert {value.form for value in titles["mean error"].values} == {"share"}


def test_differences_by_corruption_are_those_of_the_counts(made: list[Path]) -> None:
    results = [json.loads(path.read_text()) for path in made[:2]]
    errors = [{error.name: error for error in corruption_errors_of(result)} for result in results]
    fog = errors[1]["fog"]
    assert fog.difference == pytest.approx(fog.error - errors[0]["fog"].error)
    assert fog.interval is not None
    assert fog.interval[0] < fog.error < fog.interval[1]
    right = sum(results[1]["cells"][f"fog/{level}"]["counts"]["top1"] for level in range(1, 6))
    assert fog.error == pytest.approx(1 - right / 150)
    assert [level for level, *_ in errors[1]["contrast"].levels] == [3]
    # No error anywhere is no certainty: 30 images were shown.
    assert errors[0]["fog"].error == 0
    assert errors[0]["fog"].interval == pytest.approx((0, 0.1135), abs=5e-5)


def test_the_formats_in_the_documentation_are_read() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    bench, attack = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S))
    assert latency_of(bench, "docs").place == "NVIDIA L4, batch 1"
    assert [curve.attack for curve in attack_of(attack, "docs").curves] == ["square", "noise"]


def test_verdicts_and_the_front() -> None:
    assert verdict((0.1, 0.2), more_is_better=True) == verdict((-2, -1), more_is_better=False) == "better"
    assert verdict((0.1, 0.2), more_is_better=False) == verdict((-2, -1), more_is_better=True) == "worse"
    assert verdict((-0.1, 0.2), more_is_better=True) == "no difference shown"
    assert verdict(None, more_is_better=True) == ""
    points = [
        Point(place=0, label=label, x=x, y=y) for label, x, y in (("a", 1, 5), ("b", 2, 7), ("c", 2, 6), ("d", 3, 4))
    ]
    assert [point.label for point in front(points, more_is_better=True)] == ["a", "b"]
    assert [point.label for point in front(points, more_is_better=False)] == ["a", "d"]
