"""Sessions in forked processes, at interpreter exit, and when closed under load."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import pytest

import runtime
from runtime.errors import SessionClosed
from tests.support import ROOT
from tests.support.serving_models import SLOW, images_of, serving_model

_QUIET_VARIABLES = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")

START = """
import os, sys
import numpy as np
import runtime
session = runtime.load(sys.argv[1], threads=2)
images = np.ones((3, 3, 4, 4), np.float32)
session.submit(images).result(); session.run(images)
"""
FORK = """
child = os.fork()
if child == 0:
    for call in (session.run, session.submit, lambda images: session.predict([images[0]])):
        try:
            call(images)
        except runtime.errors.InputError as error:
            assert "is a fork of it; threads do not survive a fork" in str(error), error
        except BaseException as error:
            os._exit(3)
        else:
            os._exit(2)
    try:
        again = runtime.load(sys.argv[1], threads=2)
        assert again.run(images).shape == (3, 3)
        assert again.submit(images).result(5).shape == (3, 3)
        again.close()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(4)
    session.close()
    os._exit(7)  # at a normal exit, ONNX Runtime would wait for threads that do not exist here
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), session.run(images)[0, 0], session.submit(images).result()[0, 0])
"""
MULTIPROCESSING = """
import multiprocessing
def run(number):
    try:
        session.run(images)
    except runtime.errors.InputError as error:
        return str(error)
with multiprocessing.get_context("fork").Pool(2) as pool:
    messages = pool.map(run, range(4))
assert all("is a fork" in message for message in messages), messages
print("done")
"""
LEFT_OPEN = """
for number in range(20):
    session.submit(images)
late = session.submit(np.full((1, 3, 4, 4), 3e5, np.float32), timeout_s=60)
print("end")
"""


def python(program: str, model: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-W",
            "ignore:This process:DeprecationWarning",
            "-c",
            START + program,
            str(model),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(serving_model(SLOW), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
@pytest.mark.parametrize(("program", "expected"), [(FORK, "7 1.0 1.0"), (MULTIPROCESSING, "done")])
def test_a_forked_process_gets_an_error_and_can_load_its_own_session(model: Path, program: str, expected: str) -> None:
    run = python(program, model)
    assert (run.stdout.strip(), run.stderr) == (expected, "")


def test_an_open_session_does_not_keep_the_interpreter_alive(model: Path) -> None:
    run = python(LEFT_OPEN, model)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "end", "")


def test_close_waits_for_calls_in_flight(model: Path) -> None:
    """Calls in flight complete, and later calls raise SessionClosed."""
    session = runtime.load(model, threads=1)
    start = threading.Barrier(9)
    results: list[object] = []

    def run_until_closed() -> None:
        start.wait()
        try:
            while True:
                results.append(session.run(images_of(2000))[0, 0])
        except BaseException as error:
            results.append(type(error))

    threads = [threading.Thread(target=run_until_closed) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    while session.stats.calls < 20:
        time.sleep(0.001)
    session.close()
    assert session.stats.running == 0
    calls = session.stats.calls
    for thread in threads:
        thread.join()
    assert session.stats.calls == calls
    assert results.count(2000) == calls
    assert results.count(SessionClosed) == 8
    assert len(results) == calls + 8


def test_onnx_runtime_reports_nothing(tmp_path: Path) -> None:
    """Its telemetry writes an identifier of the machine to the home folder, before it sends anything.

    Its own protection against continuous integration is switched off here.
    """
    onnx.save(serving_model(), tmp_path / "m.onnx")
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in _QUIET_VARIABLES}
    program = "import sys, runtime; runtime.load(sys.argv[1]).close()"
    command = [sys.executable, "-c", program, str(tmp_path / "m.onnx")]
    environment = {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert [path.name for path in home.rglob("deviceid")] == []
