"""`ProgressLog`: what is restored, what is dropped, and who may write."""

from pathlib import Path
from typing import Any

import pytest

from runtime.errors import OutputError
from runtime.evaluate.progress_log import ProgressLog


class Work:
    """Finished work: numbers from 0 to 9."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def restore(self, entry: Any) -> None:
        number = int(entry["number"])
        if not 0 <= number < 10:
            raise ValueError(number)
        self.done.append(number)


def test_entries_are_restored_until_the_first_invalid_line(tmp_path: Path) -> None:
    first = Work()
    with ProgressLog(tmp_path, {"plan": 1}, first.restore) as log:
        log.append({"number": 3})
        log.append({"number": 5})
    assert first.done == [3, 5]
    for rest in (b'{"number": 6', b'{"number": 12}\n{"number": 7}\n', b'{"other": 1}\n', b"[]\n", b"\xff\n"):
        valid = log.path.read_bytes()
        log.path.write_bytes(valid + rest)
        resumed = Work()
        with ProgressLog(tmp_path, {"plan": 1}, resumed.restore):
            assert resumed.done == [3, 5]
        assert log.path.read_bytes() == valid


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
