"""Code blocks of documents, and a shell that runs the commands in them quickly.

A block is run by a test unless the line before it is a marker with the reason why not:

    <!-- not run: needs a GPU -->
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

__all__ = ["Block", "Shell", "blocks_of"]

_TIMEOUT_S = 300
_FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block of a document."""

    language: str
    """The word after the fence, such as `sh`."""
    code: str
    """The lines between the fences."""
    reason: str
    """Why no test runs it; empty for a block that a test runs."""


def blocks_of(document: Path) -> list[Block]:
    """Return the fenced code blocks of a Markdown file."""
    found = _FENCE.finditer(document.read_text())
    return [Block(match["language"], match["code"], match["reason"] or "") for match in found]


def _serve_preloaded(words: list[str], folder: Path, log: Path) -> None:
    """Run one of our commands in this process, which has just been forked, with its output in a file."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = ["advprop", *words]
    from advprop.cli import main

    main(prog_name="advprop")


class Shell:
    """Runs lines of a document in a folder.

    Our own commands run in children of a process that has imported torch, ONNX Runtime and the others
    once. Each child is a process of its own with the exit code and signals of a command. All other
    commands run as they are.
    """

    def __init__(self, folder: Path, rewrite: Callable[[str], str]) -> None:
        """
        Args:
            folder: working folder of the commands.
            rewrite: changes the code of a block, for example to a smaller network.
        """
        self.folder = folder
        self.rewrite = rewrite
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["timm", "onnx", "onnxruntime", "export.pipeline", "runtime.evaluate"])

    def run(self, code: str, *, stop: Path | None = None) -> str:
        """Run the lines of a block. Return what they print.

        Args:
            code: the block.
            stop: sends Ctrl-C to the first command when this file exists.
        """
        output = []
        for line in _lines(code):
            words = shlex.split(self.rewrite(line), comments=True)
            if words[:1] == ["advprop-export"]:
                words = ["advprop", "export", *words[1:]]
            if words[:1] == ["advprop"]:
                output.append(self._run_ours(words[1:], stop))
            else:
                output.append(self._run_other(self.rewrite(line)))
        return "".join(output)

    def start_server(self, code: str, address: str) -> Callable[[], int]:
        """Start `advprop serve` as it is in a block, and wait until it is ready.

        Args:
            code: the block.
            address: URL of the server.

        Returns:
            A function that sends SIGTERM to the server and returns its exit code.
        """
        (line,) = _lines(code)
        words = shlex.split(self.rewrite(line), comments=True)
        log = self.folder / "serve.log"
        server = self._processes.Process(target=_serve_preloaded, args=(words[1:], self.folder, log))
        server.start()
        deadline = time.monotonic() + 120
        while not _answers(f"{address}/v2/health/ready"):
            if server.exitcode is not None or time.monotonic() > deadline:
                server.kill()
                raise AssertionError(log.read_text())
            time.sleep(0.1)

        def stop() -> int:
            server.terminate()
            server.join(60)
            server.kill()
            return server.exitcode if server.exitcode is not None else -1

        return stop

    def _run_ours(self, words: list[str], stop: Path | None) -> str:
        log = self.folder / "output.log"
        process = self._processes.Process(target=_serve_preloaded, args=(words, self.folder, log))
        process.start()
        try:
            while stop is not None and not stop.exists():
                assert process.exitcode is None, log.read_text()[-4000:]
                time.sleep(0.02)
            if stop is not None and process.pid is not None:
                os.kill(process.pid, signal.SIGINT)
            process.join(_TIMEOUT_S)
            expected = (0,) if stop is None else (0, 130)
            assert process.exitcode in expected, (words, process.exitcode, log.read_text()[-4000:])
            return log.read_text()
        finally:
            process.kill()

    def _run_other(self, line: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
        command = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def _lines(code: str) -> list[str]:
    """Return the commands of a block: continued lines and here-documents are one command each."""
    commands: list[str] = []
    rest = code.replace("\\\n", " ")
    while rest:
        line, _, rest = rest.partition("\n")
        here = re.search(r"<<-? *'?(\w+)'?", line)
        if here:
            body, _, rest = rest.partition(f"\n{here[1]}\n")
            line = f"{line}\n{body}\n{here[1]}"
        if line.strip() and not line.startswith("#"):
            commands.append(line)
    return commands
