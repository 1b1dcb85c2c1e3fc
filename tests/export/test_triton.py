"""`advprop export-triton`: repositories that the real Triton server and its own parser accept."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

import runtime
from advprop.commands.export_triton import main
from export.triton.pbtxt import Enum, Map, to_pbtxt
from export.triton.repository import RepositoryOptions, write_repository
from runtime.engine.sidecar import EngineInfo, write_sidecar
from runtime.errors import ConfigError, ModelFileError, OutputError
from tests.support.serving_models import SPEC, serving_model
from tests.support.triton_server import run_classifiers_in_python, serve

COLORS = {"red": (200, 9, 9), "green": (9, 200, 9), "blue": (9, 9, 200)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(serving_model(), tmp_path / "colors.onnx")
    return tmp_path / "colors.onnx"


def engine(path: Path, capability: str, flavor: str = "tensorrt") -> Path:
    """Write a sidecar and a plan that is not loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"plan for {capability}".encode())
    shapes = {"min": [1, 3, 4, 4], "opt": [4, 3, 4, 4], "max": [16, 3, 4, 4]}
    info = EngineInfo(
        plan_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        onnx_sha256="0" * 64,
        flavor=flavor,
        version="10.13.0",
        compute_capabilities=(capability,),
        gpu="",
        profiles=({"input": shapes},),
        flags=(),
        precision="fp16",
        precision_shares={"fp16": 1.0},
        calibration_sha256="",
        spec=SPEC,
    )
    write_sidecar(path, info)
    return path


PARSE = """
import sys, json
from pathlib import Path
from google.protobuf import text_format, json_format
from tritonclient.grpc import model_config_pb2
configs = {}
for path in sorted(Path(sys.argv[1]).glob("*/config.pbtxt")):
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    configs[path.parent.name] = json_format.MessageToDict(config, preserving_proto_field_name=True)
print(json.dumps(configs))
"""


def parse(python: Path, repository: Path) -> dict[str, dict[str, object]]:
    command = [str(python), "-c", PARSE, str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    configs: dict[str, dict[str, object]] = json.loads(done.stdout)
    return configs


@pytest.mark.slow
def test_configurations_are_valid_for_the_real_definition(triton_python: Path, model: Path, tmp_path: Path) -> None:
    one, two = engine(tmp_path / "86" / "a.engine", "sm_86"), engine(tmp_path / "89" / "b.engine", "sm_89")
    repository = tmp_path / "repository"
    write_repository(repository, [("colors", [model]), ("fast", [one, two])], RepositoryOptions(gpus=(0, 1)))
    configs = parse(triton_python, repository)
    assert set(configs) == {
        f"{name}{end}" for name in ("colors", "fast") for end in ("", "_preprocess", "_labels", "_image")
    }
    assert configs["colors"]["backend"] == "onnxruntime" and configs["fast"]["backend"] == "tensorrt"
    assert configs["colors"]["instance_group"] == [{"kind": "KIND_GPU", "count": 1, "gpus": [0, 1]}]
    assert configs["fast"]["cc_model_filenames"] == {"8.6": "model_sm86.plan", "8.9": "model_sm89.plan"}
    assert (repository / "fast/1/model_sm89.plan").read_bytes() == two.read_bytes()
    assert configs["fast"]["max_batch_size"] == 16 and configs["colors"]["max_batch_size"] == 32
    assert [warm["batch_size"] for warm in configs["colors"]["model_warmup"]] == [1, 2, 4, 8, 16, 32]  # type: ignore[attr-defined]


CLIENT = """
import sys, json, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import tritonclient.grpc as grpc
import tritonclient.http as http
local, files = threading.local(), sys.argv[4:]

def ask(kind, url, number):
    if not hasattr(local, kind.__name__):
        setattr(local, kind.__name__, kind.InferenceServerClient(url))
    encoded = np.array([open(files[number % len(files)], "rb").read()], np.object_).reshape(1, 1)
    image = kind.InferInput("IMAGE", encoded.shape, "BYTES")
    image.set_data_from_numpy(encoded)
    try:
        answer = getattr(local, kind.__name__).infer("colors_image", [image])
    except Exception as error:
        return str(error)
    return answer.as_numpy("LABEL")[0, 0].decode(), float(answer.as_numpy("PROBABILITY")[0, 0])

answers = []
for kind, url in ((http, sys.argv[1]), (grpc, sys.argv[2])):
    with ThreadPoolExecutor(16) as pool:
        answers.append(list(pool.map(lambda number: ask(kind, url, number), range(int(sys.argv[3])))))
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_the_real_server_answers_as_predict_does(triton_python: Path, model: Path, tmp_path: Path) -> None:
    files = []
    for name, color in COLORS.items():
        files.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(np.full((9, 7, 3), color, np.uint8)).save(files[-1])
    with runtime.load(str(model)) as session:
        expected = [(answer.label, answer.probability) for answer in session.predict(files)]
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    repository = tmp_path / "repository"
    write_repository(repository, [("colors", [model])], RepositoryOptions(cpu=True))
    run_classifiers_in_python(repository)
    with serve(repository, triton_python, tmp_path) as server:
        answers = json.loads(server.run_client(CLIENT, server.http, server.grpc, "300", *files))
        (broken,), _ = json.loads(
            server.run_client(CLIENT, server.http, server.grpc, "1", str(tmp_path / "broken.jpg"))
        )
    for answered in answers:
        assert [tuple(answer) for answer in answered] == [expected[number % 3] for number in range(300)]
    assert "not a JPEG" in broken or "cannot" in broken, broken


def test_engines_of_tensorrt_rtx_are_refused_with_the_reason(tmp_path: Path) -> None:
    plan = engine(tmp_path / "m.engine", "sm_86", "tensorrt_rtx")
    with pytest.raises(ModelFileError, match="TensorRT-RTX, whose plans Triton's TensorRT backend cannot load"):
        write_repository(tmp_path / "repository", [("m", [plan])])
    assert not (tmp_path / "repository").exists()


def test_files_that_do_not_fit_together_are_refused(model: Path, tmp_path: Path) -> None:
    plan = engine(tmp_path / "m.engine", "sm_86")
    for files, expected in (([model, plan], "one kind of file per model"), ([model, model], "found 2 ONNX files")):
        with pytest.raises(ConfigError, match=expected):
            write_repository(tmp_path / "repository", [("m", files)])
    for name in ("", "a b", "../a", "a/b"):
        with pytest.raises(ConfigError, match="model names must be"):
            write_repository(tmp_path / "repository", [(name, [model])])
    onnx.save(serving_model(batch="4"), model)
    with pytest.raises(ModelFileError, match="fixed batch of 4 images"):
        write_repository(tmp_path / "repository", [("m", [model])])


def test_models_are_added_but_not_replaced(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_repository(repository, [("a", [model])])
    write_repository(repository, [("b", [model])])
    before = sorted(path.name for path in repository.iterdir())
    with pytest.raises(OutputError, match="already contains b, b_preprocess"):
        write_repository(repository, [("c", [model]), ("b", [model])])
    assert sorted(path.name for path in repository.iterdir()) == before
    readme = (repository / "README.md").read_text()
    assert [f"| {name} | onnxruntime |" in readme for name in "abc"] == [True, True, False]
    assert readme.count("|---|---|---|---|---|") == 1


def test_a_fixed_batch_of_one_is_served_without_batching(model: Path, tmp_path: Path) -> None:
    onnx.save(serving_model(batch="1"), model)
    write_repository(tmp_path / "repository", [("one", [model])])
    text = (tmp_path / "repository/one/config.pbtxt").read_text()
    assert "max_batch_size: 0" in text and "dims: [ 1, 3, 4, 4 ]" in text and "dynamic_batching" not in text


def test_the_command_names_models_by_their_files(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(tmp_path / "r"), str(model), f"other={model}", "--top-k", "2", "--cpu"])
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "r").iterdir()} >= {"colors", "colors_image", "other", "other_labels"}
    assert 'string_value: "2"' in (tmp_path / "r/other_labels/config.pbtxt").read_text()
    assert (tmp_path / "r/colors/labels.txt").read_text() == "red\ngreen\nblue\n"
    failed = CliRunner().invoke(main, [str(tmp_path / "r2"), "=x"])
    assert failed.exit_code == 2 and "expected FILE, NAME=FILE" in failed.output


def test_text_is_escaped() -> None:
    text = to_pbtxt({"name": 'a "b"\n', "kind": Enum("K"), "on": True, "none": [], "m": Map({"k": {"v": 1.5}})})
    assert text == 'name: "a \\"b\\"\\n"\nkind: K\non: true\nm {\n  key: "k"\n  value {\n    v: 1.5\n  }\n}\n'
