"""Triton's clients and curl, each in a process of its own, against `advprop serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from tests.support import ROOT
from tests.support.server import Server


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc", "aio-http", "aio-grpc"])
def test_clients_of_triton(
    server: Server, session: runtime.Session, triton_python: Path, tmp_path: Path, protocol: str
) -> None:
    """Each client runs in a process of its own, because `tritonclient` needs an older protobuf."""
    images_NCHW = np.random.default_rng(5).normal(size=(2, 3, 4, 4)).astype(np.float32)
    np.save(tmp_path / "images.npy", images_NCHW)
    Image.new("RGB", (30, 20), (0, 200, 0)).save(tmp_path / "a.png")
    address = server.grpc if protocol.endswith("grpc") else f"127.0.0.1:{server.http_port}"
    script = str(ROOT / "tests" / "support" / "triton_client.py")
    command = [str(triton_python), script, protocol, address, str(tmp_path / "images.npy"), str(tmp_path / "a.png")]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": ""}, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    logits_NK = session.run(images_NCHW)
    assert (found["live"], found["ready"], found["model_ready"], found["input"]) == (True, True, True, "input")
    assert {value for key, value in found.items() if key.startswith("logits_")} == {logits_NK.tobytes().hex()}
    assert found["label"] == "green"
    index = int(logits_NK[0].argmax())
    assert found["classification"] == [str(index), session.spec.classes[index]]
    assert "there is no model 'tay'" in found["error"]


@pytest.mark.slow
def test_schemathesis_finds_no_answer_that_the_openapi_document_does_not_list(server: Server, tmp_path: Path) -> None:
    """A request may ask for a deadline of a microsecond, so 503 is allowed. Models stay loaded."""
    (tmp_path / "schemathesis.toml").write_text(
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 503]\n'
    )
    command = [str(Path(sys.executable).with_name("schemathesis"))]
    command += ["--config-file", str(tmp_path / "schemathesis.toml"), "run", "--max-examples", "20", "--seed", "0"]
    checks = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    checks += ["response_headers_conformance", "response_schema_conformance"]
    command += ["--exclude-path-regex", "^/v2/repository/models/", "--checks", ",".join(checks)]
    url = f"http://127.0.0.1:{server.http_port}/openapi.json"
    run = subprocess.run([*command, url], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert re.search(r"Tested: +13\n", run.stdout)
    generated = re.search(r"(\d+) generated", run.stdout)
    assert generated is not None
    assert int(generated[1]) > 300


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_sends_images_and_is_refused_above_the_limit(server: Server, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.http_port}/predict"
    Image.new("RGB", (30, 20), (0, 200, 0)).save(tmp_path / "a.png")
    sent = ["--data-binary", f"@{tmp_path / 'a.png'}"], ["-F", f"image=@{tmp_path / 'a.png'}"]
    for options in sent:
        run = subprocess.run(["curl", "-s", *options, url], capture_output=True, text=True, timeout=60)
        assert json.loads(run.stdout)["predictions"][0]["label"] == "green"
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    run = subprocess.run(
        ["curl", "-s", "-w", "%{http_code}", "--data-binary", f"@{tmp_path / 'large'}", url],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.endswith("413")
