"""The order of targets, the loops that measure, and interrupted runs."""

import csv
import itertools
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from runtime.bench.results import measure_and_write, report_files, result_of
from runtime.bench.rounds import measure_probe, round_order, run_closed_loop
from runtime.bench.run import Bench, BenchConfig, choose_batch_sizes
from runtime.bench.targets import BenchTarget
from runtime.errors import ConfigError, Interrupted, RunFailed
from tests.support.bench_toys import toy_target

QUICK = BenchConfig(batch_sizes=(1, 2), warm_up_ms=0, duration_s=0, iterations=6, rounds=3)


def test_orders_are_random_permutations() -> None:
    orders = [round_order(4, number, seed=1) for number in range(40)]
    assert all(sorted(found) == [0, 1, 2, 3] for found in orders)
    assert orders == [round_order(4, number, seed=1) for number in range(40)]
    assert orders != [round_order(4, number, seed=2) for number in range(40)]
    for place in range(4):  # no target is always first
        assert 2 < sum(found[0] == place for found in orders) < 20


def test_targets_take_turns() -> None:
    calls: list[str] = []
    bench = Bench([toy_target(name, calls) for name in "abc"], QUICK)
    bench.measure()
    turns = [name for name, _ in itertools.groupby(calls)]
    # Per point: three warm-up calls of each target, then three rounds of one uncounted and two
    # counted calls of each target and each probe.
    assert calls[:9] == list("aaabbbccc")
    assert len(calls) == 2 * (9 + 3 * (9 + 9))
    first = [turns[3:][start : start + 6] for start in range(0, 18, 6)]
    for number, names in enumerate(first):
        expected = ["abc"[place] for place in round_order(3, number, QUICK.seed)]
        assert names == [*expected, *(f"{name}.compute" for name in expected)]
    assert [(point.batch_size, point.concurrency, point.model) for point in bench.points] == [
        (size, 1, name) for size in (1, 2) for name in "abc"
    ]
    content = bench.points[-1].content
    compute = content["quantities"]["compute"]
    assert (compute["count"], compute["p50_ms"], compute["round_medians_ms"]) == (6, 2, [2, 2, 2])
    assert compute["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert "ratio" not in bench.points[0].content["quantities"]["compute"]
    assert content["quantities"]["end_to_end"]["count"] == 6
    assert len(content["round_images_s"]) == 3
    json.dumps(result_of(bench, "none"), allow_nan=False)


def test_the_first_call_of_a_probe_is_not_counted() -> None:
    numbers = itertools.count()
    assert measure_probe(lambda: {"a": float(next(numbers))}, 0, 3) == {"a": [1, 2, 3]}


def test_callers_call_concurrently() -> None:
    together = threading.Barrier(3, timeout=20)
    load = run_closed_loop(together.wait, 3, 0, 4)  # fails unless all three call at the same time
    assert len(load.times_ms) == 12
    assert load.wall_s > 0
    assert load.calls_s == pytest.approx(12 / load.wall_s)


@pytest.mark.parametrize("fatal", [1, 3, 20])
@pytest.mark.parametrize("callers", [1, 3])
def test_all_callers_stop_at_the_first_error(callers: int, fatal: int) -> None:
    numbers = itertools.count(1)

    def call() -> None:
        if next(numbers) == fatal:
            raise RunFailed("once")

    with pytest.raises(RunFailed, match="once"):
        run_closed_loop(call, callers, 30, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "advprop-bench"]


def stopped(out: Path, error: BaseException, after: int) -> Bench:
    """Run a bench whose second target fails after `after` calls."""
    calls: list[str] = []

    def fail() -> None:
        if len(calls) > after:
            raise error

    targets = [toy_target("a", calls), toy_target("b", calls, fail)]
    bench = Bench(targets, QUICK)
    out.mkdir()
    measure_and_write(bench, out, "none")
    return bench


def test_ctrl_c_keeps_finished_points(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"stopped: 2 points are finished and saved in ") as caught:
        stopped(tmp_path / "out", KeyboardInterrupt(), 50)
    assert caught.value.exit_code == 130
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(point["model"], point["batch_size"]) for point in found["points"]] == [("a", 1), ("b", 1)]
    kept = json.loads((tmp_path / "out" / "a.batch1.json").read_text())
    assert kept["p50_ms"] == found["points"][0]["quantities"]["end_to_end"]["p50_ms"]
    assert not (tmp_path / "out" / "a.batch2.json").exists()
    texts = re.findall("<!-- (.*?) -->", (tmp_path / "out" / "latency_throughput.svg").read_text())
    assert texts.count("1") == 2  # two points, labeled with their batch size
    assert {"a", "b"} <= set(texts)


def test_nothing_is_written_if_no_point_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "out", KeyboardInterrupt(), 5)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_keeps_finished_points_and_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="memory"):
        stopped(tmp_path / "out", RunFailed("out of memory"), 50)
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(point["model"], point["batch_size"]) for point in found["points"]] == [("a", 1), ("b", 1)]
    assert all(point["quantities"]["compute"]["count"] == 6 for point in found["points"])
    rows = list(csv.DictReader((tmp_path / "out" / "bench.csv").read_text().splitlines()))
    assert [(row["model"], row["quantity"]) for row in rows] == [
        (name, quantity) for name in "ab" for quantity in ("end_to_end", "compute")
    ]


def test_peers_have_no_file_for_reports() -> None:
    calls: list[str] = []
    mine, peer = toy_target("a", calls), toy_target("b", calls)
    peer = BenchTarget(
        name="b", facts={**peer.facts, "peer": "a peer"}, prepare=peer.prepare, image_size=peer.image_size
    )
    bench = Bench([mine, peer], BenchConfig(concurrency=(1, 2), warm_up_ms=0, duration_s=0, iterations=2, rounds=1))
    bench.measure()
    result = result_of(bench, "none")
    assert sorted(report_files(result)) == ["a.batch1.json", "a.batch32.json", "a.batch8.json"]
    assert {point["concurrency"] for point in result["points"]} == {1, 2}
    concurrent = [point for point in result["points"] if point["concurrency"] == 2]
    assert all(list(point["quantities"]) == ["end_to_end"] for point in concurrent)


def sizes(*limits: dict[str, Any], requested: tuple[int, ...] = ()) -> tuple[int, ...]:
    return choose_batch_sizes([toy_target(f"m{place}", [], **limit) for place, limit in enumerate(limits)], requested)


def test_batch_sizes_that_all_files_support_are_chosen() -> None:
    assert sizes({}, {"most_images": 1 << 62}) == (1, 8, 32)
    assert sizes({}, {"most_images": 16}) == (1, 8)
    assert sizes({"most_images": 16}, {"fixed_batch": 4}) == (4,)
    assert sizes({"most_images": 16}, requested=(3, 16)) == (3, 16)
    with pytest.raises(
        ConfigError, match=r"--batch-sizes 1,32: m1 runs batches of up to 16\. .* use --batch-sizes 1,8"
    ):
        sizes({}, {"most_images": 16}, requested=(1, 32))
    with pytest.raises(ConfigError, match=r"m0 runs batches of 4\. .* use --batch-sizes 4"):
        sizes({"fixed_batch": 4}, requested=(1,))
    with pytest.raises(
        ConfigError, match=r"no batch size is supported by all files: m0 runs batches of 4; m1 runs batches of 2"
    ):
        sizes({"fixed_batch": 4}, {"fixed_batch": 2})
