"""The files of examples/deploy: valid for their tools, and for the server that they start."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from advprop.commands.serve import main
from runtime.serve.openapi import openapi_document
from tests.support import ROOT

DEPLOY = ROOT / "examples" / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def containers() -> list[dict[str, Any]]:
    deployment, _ = documents("kubernetes.yaml")
    runtime, _ = documents("kserve.yaml")
    return [*deployment["spec"]["template"]["spec"]["containers"], *runtime["spec"]["containers"]]


def entrypoint() -> list[str]:
    line = re.search(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert line
    arguments: list[str] = json.loads(line[1])
    return arguments


@pytest.mark.parametrize("index", [0, 1])
def test_the_kubernetes_documents_are_valid(index: int) -> None:
    kubernetes_validate.validate(documents("kubernetes.yaml")[index], "1.33", strict=True)


def test_a_misspelled_field_is_not_valid() -> None:
    deployment = documents("kubernetes.yaml")[0]
    deployment["spec"]["replica"] = deployment["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.33", strict=True)


def test_probes_are_paths_of_the_server() -> None:
    paths = set(openapi_document()["paths"])
    probes = [
        container[name]["httpGet"]["path"]
        for container in containers()
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
        if name in container
    ]
    assert len(probes) == 4 and set(probes) <= paths


def test_arguments_are_options_of_the_server(tmp_path: Path) -> None:
    """An unknown option ends with 2 before anything is loaded; a missing model also does, and names it."""
    unit = re.search(r"^ExecStart=\S+ serve (.*)$", (DEPLOY / "advprop.service").read_text(), re.MULTILINE)
    assert unit and entrypoint()[:2] == ["advprop", "serve"]
    calls = [[*entrypoint()[2:], *container["args"]] for container in containers()]
    for call in (*calls, unit[1].split()):
        arguments = [re.sub(r"^\S+=/\S+$", f"m={tmp_path / 'none.onnx'}", argument) for argument in call]
        assert arguments != call
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2 and "none.onnx does not exist" in done.output, (call, done.output)


def test_the_server_drains_before_it_is_killed() -> None:
    drain = float(str(next(option.default for option in main.params if option.name == "drain_s")))
    deployment, _ = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > drain + 5
    unit = (DEPLOY / "advprop.service").read_text()
    assert float(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > drain


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / "advprop.service"
    unit.write_text((DEPLOY / "advprop.service").read_text().replace("/opt/advprop/bin/advprop", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=sometimes"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert "kill mode" in done.stderr
