"""The real Triton server on a CPU, from the wheel of nvidia-pytriton.

It contains the Python backend and ensembles only. A classifier of the ONNX Runtime backend is
therefore replaced by a model of the Python backend that runs the same file in ONNX Runtime.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

PACKAGES = ("nvidia-pytriton==0.7.0", "tritonclient[all]>=2.50", "numpy<2")
CORE = ("onnxruntime>=1.24", "Pillow>=10.4", "rich>=13.7", "click>=8.2", "filelock>=4.0", "platformdirs>=4.0")

CLASSIFIER = """
import json
from pathlib import Path
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        answers = []
        for request in requests:
            feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            outputs = self.session.run(self.outputs, feed)
            tensors = [pb_utils.Tensor(name, value) for name, value in zip(self.outputs, outputs)]
            answers.append(pb_utils.InferenceResponse(tensors))
        return answers
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonServer:
    """A running server."""

    python: Path
    """Python with `tritonclient`; it has another NumPy than the project."""
    http: str
    """Address of HTTP, as `tritonclient` expects it."""
    grpc: str
    """Address of gRPC."""

    def run_client(self, program: str, *arguments: str) -> str:
        """Run a Python program in the environment of the clients, and return what it prints."""
        command = [str(self.python), "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def make_environment(folder: Path) -> Path:
    """Create an environment with the server and its clients, and return its Python.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed.
    """
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, env=clean, timeout=120)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES, *CORE]
    subprocess.run(install, check=True, env=clean, capture_output=True, timeout=600)
    (_site_packages(python) / "advprop.pth").write_text(f"{ROOT}\n")
    return python


def run_classifiers_in_python(repository: Path) -> None:
    """Let the Python backend run the classifiers of the ONNX Runtime backend."""
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text()
        if 'backend: "onnxruntime"' in text:
            config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
            (config.parent / "1" / "model.py").write_text(CLASSIFIER)


@contextmanager
def serve(repository: Path, python: Path, folder: Path) -> Iterator[TritonServer]:
    """Run the server on a model repository until the context ends.

    Args:
        repository: the models.
        python: from `make_environment`.
        folder: for the backends and the log.
    """
    site = _site_packages(python)
    triton = site / "pytriton" / "tritonserver"
    backends = folder / "backends"
    if not backends.exists():
        shutil.copytree(triton / "backends", backends)
        stub = triton / "python_backend_stubs" / site.parent.name.removeprefix("python") / "triton_python_backend_stub"
        shutil.copy(stub, backends / "python")
    http, grpc = _free_port(), _free_port()
    libraries = [Path(sys.base_prefix) / "lib", *site.glob("nvidia_pytriton.libs")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        # The server finds its packages through the first `python3`, and ignores PYTHONPATH.
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(triton / "bin" / "tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={backends}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
    command += [f"--http-port={http}", f"--grpc-port={grpc}", "--allow-metrics=false"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, http, folder / "server.log")
        yield TritonServer(python=python, http=f"127.0.0.1:{http}", grpc=f"127.0.0.1:{grpc}")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _site_packages(python: Path) -> Path:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return python.parents[1] / "lib" / version / "site-packages"


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.1)
    raise AssertionError(f"the server is not ready after a minute: {log.read_text()[-3000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
