"""Triton's clients and curl, each in a process of its own, against `advprop serve`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
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
