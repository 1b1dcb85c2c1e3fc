import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.errors import OutputError
from runtime.system.locks import file_lock, reserved_folder
from tests.support import ROOT

HOLD = """
import sys, time
from pathlib import Path
from runtime.system.locks import file_lock
with file_lock(Path(sys.argv[1]), timeout_s=0) as held:
    print(held, flush=True)
    time.sleep(600)
"""


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    """The file is removed on release, and the threads that wait for it must notice."""
    holders, largest, waits = 0, 0, []

    def work() -> None:
        nonlocal holders, largest
        for _ in range(20):
            with file_lock(tmp_path / "a.lock", timeout_s=60, on_wait=lambda: waits.append(1)) as held:
                assert held
                holders += 1
                largest = max(largest, holders)
                time.sleep(0.0005)
                holders -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert largest == 1
    assert waits
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_stays_held_times_out(tmp_path: Path) -> None:
    waits: list[int] = []
    with file_lock(tmp_path / "a.lock", timeout_s=0) as first:
        start = time.monotonic()
        with file_lock(tmp_path / "a.lock", timeout_s=0.2, on_wait=lambda: waits.append(1)) as second:
            assert (first, second) == (True, False)
            assert time.monotonic() - start >= 0.2
        assert (tmp_path / "a.lock").exists()  # the second one did not remove it
    assert waits == [1]


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_lock_that_cannot_be_created_is_not_held(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with file_lock(tmp_path / folder / "a.lock", timeout_s=60) as held:
        assert not held
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with file_lock(lock, timeout_s=0) as held:
            assert not held
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert lock.exists()
    with file_lock(lock, timeout_s=5) as held:
        assert held
    assert not lock.exists()


def test_a_reserved_folder_names_its_process(tmp_path: Path) -> None:
    with (
        reserved_folder(tmp_path),
        pytest.raises(OutputError, match=rf"in use by process {os.getpid()} on .*wait until"),
        reserved_folder(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with reserved_folder(tmp_path):
        pass


def test_a_folder_that_was_reserved_by_a_killed_process_is_free(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".lock.owner").write_text("process 1")
    with reserved_folder(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock.owner").read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_holder(tmp_path: Path) -> None:
    """Its name may be lost, or written by others: control characters do not reach the terminal."""
    with file_lock(tmp_path / ".lock", timeout_s=0) as held:
        assert held
        with pytest.raises(OutputError, match="is in use by another process"), reserved_folder(tmp_path):
            pass
        (tmp_path / ".lock.owner").write_text("\x1b[31mme")
        with pytest.raises(OutputError, match=r"is in use by \[31mme;"), reserved_folder(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with reserved_folder(tmp_path / "missing"):
        assert "make sure that no other process writes to it" in caplog.text
