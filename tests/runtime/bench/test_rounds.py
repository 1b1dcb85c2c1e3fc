"""In which order contestants run, and what becomes of a run that is stopped."""

import itertools
import json
import threading
from pathlib import Path

import pytest

from advprop.commands.bench import _measure
from runtime.bench.config import BenchConfig
from runtime.bench.results import for_report, result_of
from runtime.bench.rounds import crowd, order, turn
from runtime.bench.run import Bench
from runtime.bench.sizes import choose_sizes
from runtime.bench.targets import Contestant
from runtime.errors import ConfigError, Interrupted, RunFailed
from runtime.system.console import set_up_logging
from tests.support.bench_toys import toy_contestant

QUICK = BenchConfig(batch_sizes=(1, 2), warm_up_ms=0, duration_s=0, iterations=6, rounds=3)


def test_orders_are_permutations_of_the_seed() -> None:
    orders = [order(4, number, seed=1) for number in range(40)]
    assert all(sorted(found) == [0, 1, 2, 3] for found in orders)
    assert orders == [order(4, number, seed=1) for number in range(40)]
    assert orders != [order(4, number, seed=2) for number in range(40)]
    for place in range(4):  # nobody always comes first
        assert 2 < sum(found[0] == place for found in orders) < 20


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    bench = Bench([toy_contestant(name, calls) for name in "abc"], QUICK)
    bench.measure()
    turns = [name for name, _ in itertools.groupby(calls)]
    # A point: three calls to warm each up, then three rounds of (one call not counted + two) of each and of each probe.
    assert calls[:9] == list("aaabbbccc")
    assert len(calls) == 2 * (9 + 3 * (9 + 9))
    first = [turns[3:][start : start + 6] for start in range(0, 18, 6)]
    for number, names in enumerate(first):
        expected = ["abc"[place] for place in order(3, number, QUICK.seed)]
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


def test_a_turn_drops_its_first_call() -> None:
    numbers = itertools.count()
    assert turn(lambda: {"a": float(next(numbers))}, 0, 3) == {"a": [1, 2, 3]}


def test_a_crowd_calls_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)
    seen = crowd(together.wait, 3, 0, 4)  # hangs unless all three are inside
    assert len(seen.times_ms) == 12
    assert seen.wall_s > 0
    assert seen.calls_s == pytest.approx(12 / seen.wall_s)


@pytest.mark.parametrize("fatal", [1, 3, 20])
@pytest.mark.parametrize("callers", [1, 3])
def test_a_crowd_ends_with_the_first_error(callers: int, fatal: int) -> None:
    numbers = itertools.count(1)

    def call() -> None:
        if next(numbers) == fatal:
            raise RunFailed("once")

    with pytest.raises(RunFailed, match="once"):
        crowd(call, callers, 30, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "advprop-bench"]


def stopped(out: Path, error: BaseException, after: int) -> Bench:
    """A run whose second contestant fails after so many calls."""
    calls: list[str] = []

    def fail() -> None:
        if len(calls) > after:
            raise error

    contestants = [toy_contestant("a", calls), toy_contestant("b", calls, fail)]
    bench = Bench(contestants, QUICK)
    out.mkdir()
    _measure(set_up_logging(), bench, out, "none")
    return bench


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"points that are finished, and in .*: 2") as caught:
        stopped(tmp_path / "out", KeyboardInterrupt(), 50)
    assert caught.value.exit_code == 130
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(point["model"], point["batch_size"]) for point in found["points"]] == [("a", 1), ("b", 1)]
    assert (tmp_path / "out" / "a.batch1.json").is_file()
    assert not (tmp_path / "out" / "a.batch2.json").exists()
    assert (tmp_path / "out" / "latency_throughput.svg").is_file()


def test_nothing_is_written_where_nothing_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "out", KeyboardInterrupt(), 5)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_keeps_what_is_finished_and_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="memory"):
        stopped(tmp_path / "out", RunFailed("out of memory"), 50)
    assert (tmp_path / "out" / "bench.json").is_file()


def test_peers_have_no_file_for_the_report() -> None:
    calls: list[str] = []
    mine, peer = toy_contestant("a", calls), toy_contestant("b", calls)
    peer = Contestant(name="b", facts={**peer.facts, "peer": "words"}, prepare=peer.prepare, image_size=peer.image_size)
    bench = Bench([mine, peer], BenchConfig(concurrency=(1, 2), warm_up_ms=0, duration_s=0, iterations=2, rounds=1))
    bench.measure()
    result = result_of(bench, "none")
    assert sorted(for_report(result)) == ["a.batch1.json", "a.batch32.json", "a.batch8.json"]
    assert {point["concurrency"] for point in result["points"]} == {1, 2}
    crowded = [point for point in result["points"] if point["concurrency"] == 2]
    assert all(list(point["quantities"]) == ["end_to_end"] for point in crowded)


def sizes(*limits: dict, asked: tuple[int, ...] = ()) -> tuple[int, ...]:
    return choose_sizes([toy_contestant(f"m{place}", [], **limit) for place, limit in enumerate(limits)], asked)


def test_batch_sizes() -> None:
    assert sizes({}, {"most_images": 1 << 62}) == (1, 8, 32)
    assert sizes({}, {"most_images": 16}) == (1, 8)
    assert sizes({"most_images": 16}, {"fixed_batch": 4}) == (4,)
    assert sizes({"most_images": 16}, asked=(3, 16)) == (3, 16)
    with pytest.raises(ConfigError, match=r"--batch 1,32: m1 takes batches of up to 16\. .* use --batch 1,8"):
        sizes({}, {"most_images": 16}, asked=(1, 32))
    with pytest.raises(ConfigError, match=r"m0 takes batches of 4\. .* use --batch 4"):
        sizes({"fixed_batch": 4}, asked=(1,))
    with pytest.raises(ConfigError, match=r"no batch size that all take: m0 takes batches of 4; m1 takes batches of 2"):
        sizes({"fixed_batch": 4}, {"fixed_batch": 2})
