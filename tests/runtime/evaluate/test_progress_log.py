"""`ProgressLog`: what is restored, what is dropped, and who may write."""

import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import DataError, OutputError
from runtime.evaluate.progress_log import ProgressLog


class Work:
    """Finished work: numbers from 0 to 9."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def restore(self, entry: Any) -> None:
        number = int(entry["number"])
        if number in self.done or not 0 <= number < 10:
            raise DataError(f"{number} is finished or unknown")
        self.done.append(number)


def finished(folder: Path, *numbers: int) -> Path:
    """Write a log with finished work, as an interrupted run leaves it."""
    with ProgressLog(folder, {"plan": 1}, Work().restore) as log:
        for number in numbers:
            log.append({"number": number})
    return log.path


def resumed(folder: Path) -> list[int]:
    """Return the finished work that a new run reads."""
    work = Work()
    with ProgressLog(folder, {"plan": 1}, work.restore):
        return work.done


@pytest.mark.parametrize("rest", [b'00000000 {"number": 6', b'{"number": 6}\n', b'00000000 {"number": 6}\n', b"\xff\n"])
def test_damaged_lines_at_the_end_are_dropped(tmp_path: Path, rest: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = finished(tmp_path, 3, 5)
    valid = path.read_bytes()
    path.write_bytes(valid + rest)
    assert resumed(tmp_path) == [3, 5]
    assert path.read_bytes() == valid
    assert "dropped 1 damaged or incomplete lines" in caplog.text


def test_no_flipped_bit_changes_what_is_resumed(tmp_path: Path) -> None:
    path = finished(tmp_path, 3, 5)
    valid = path.read_bytes()
    for place in range(len(valid)):
        for bit in range(8):
            path.write_bytes(valid[:place] + bytes([valid[place] ^ 1 << bit]) + valid[place + 1 :])
            assert resumed(tmp_path) in ([], [3])


@pytest.mark.parametrize(("again", "line"), [(5, 3), (12, 3)], ids=["twice", "unknown"])
def test_work_that_is_finished_or_unknown_is_refused(tmp_path: Path, again: int, line: int) -> None:
    path = finished(tmp_path, 3, 5)
    other = finished(tmp_path / "other", 1)
    with ProgressLog(tmp_path / "other", {"plan": 1}, lambda entry: None) as log:
        log.append({"number": again})
    path.write_bytes(path.read_bytes() + other.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(DataError, match=rf"line {line}: {again} is finished or unknown.* rm {path}"):
        resumed(tmp_path)
    assert len(path.read_bytes().splitlines()) == 3


def test_a_full_disk_is_reported_and_finished_work_is_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    path = finished(tmp_path, 3, 5)
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with ProgressLog(tmp_path, {"plan": 1}, Work().restore) as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
            with pytest.raises(OutputError, match=r"cannot write .*work is kept.*run the same command to resume"):
                log.append({"number": 7})
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert resumed(tmp_path) == [3, 5]


def test_another_plan_is_another_file(tmp_path: Path) -> None:
    with ProgressLog(tmp_path, {"a": 1, "b": 2}, Work().restore) as log:
        log.append({"number": 3})
    other, same = Work(), Work()
    with ProgressLog(tmp_path, {"a": 1, "b": 3}, other.restore):
        assert other.done == []
    with ProgressLog(tmp_path, {"b": 2, "a": 1}, same.restore) as log:  # the order of keys does not matter
        assert same.done == [3]
        log.remove()
    assert not log.path.exists()


def test_only_one_process_may_run_a_plan(tmp_path: Path) -> None:
    with ProgressLog(tmp_path, {"plan": 1}, Work().restore):
        with pytest.raises(OutputError, match=r"another process runs the same evaluation .* or stop it, or shard"):
            ProgressLog(tmp_path, {"plan": 1}, Work().restore, advice=", or shard")
        ProgressLog(tmp_path, {"plan": 2}, Work().restore).remove()
    with ProgressLog(tmp_path, {"plan": 1}, Work().restore) as log:
        log.append({"number": 1})
