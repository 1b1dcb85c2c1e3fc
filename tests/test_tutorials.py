"""The tutorials and the README: every command in them runs, in the order of the pages, on one folder of photos."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import nbformat
import numpy as np
import onnx
import pytest
import timm
import torch
from jsonschema import Draft202012Validator
from nbclient import NotebookClient
from PIL import Image
from referencing import Registry, Resource

from runtime.spec import METADATA_KEY
from tests.support import ROOT
from tests.support.documents import Block, Shell, blocks_of

TRAIN, DEPLOY, INT8, ROBUSTNESS, EMBED, SERVE = TUTORIALS = tuple(
    f"docs/tutorials/{name}.md" for name in ("train", "deploy", "int8", "robustness", "embed", "serve")
)
ADAPT = "docs/tutorials/adapt.md"
PAGES = (*TUTORIALS, ADAPT, "README.md")
"""In the order in which they continue each other."""
COLORS = {
    "amber": (230, 150, 20),
    "blue": (30, 60, 220),
    "cyan": (20, 200, 200),
    "green": (30, 180, 40),
    "red": (220, 30, 30),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


PORT = free_port()


def smaller(code: str) -> str:
    """Change a command of a document to a network that trains in seconds, and to a free port."""
    code = re.sub(r"\s+# .*", "", code)
    code = re.sub(r"\b(resnet50|efficientnet_b3)\b(?!\.safetensors)", "resnet10t", code)
    code = code.replace("resnet50.safetensors", "weights.pt").replace("~/photos", "runs/robust/split")
    if "advprop train" in code and "--arch" in code:
        code += " --img-size 32 --workers 0"
        code += "" if "--epochs" in code else " --epochs 1"
    if re.match(r"advprop (compare|eval|report --from) ", code):
        code += " --workers 0"
        code += " --only fog" if "--adapt" in code else "" if "--limit" in code else " --limit 10"
        once = code.startswith("advprop report")  # `compare` covers corruptions and their page
        if (once or not find_spec("imagecorruptions")) and "--suite" not in code:
            code += " --suite clean"
    code = code.replace("photos/val", "runs/robust/split/val").replace("--adapt 32 --adapt 128", "--adapt 8 --adapt 16")
    code += " --force" if code.startswith("advprop adapt") else ""  # whatever the verdict on toy images is
    if code.startswith("advprop serve"):
        code += f" --http-port {PORT}"
    return code.replace("127.0.0.1:8000", f"127.0.0.1:{PORT}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 5 classes of 40 images in `photos`, one more photo, and a file of weights."""
    folder = tmp_path_factory.mktemp("tutorials")
    random = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(40):
            noise = random.normal(0, 40, (40, 48, 3))
            image = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "photos" / name / f"{number}.jpg")
    Image.new("RGB", (48, 40), COLORS["red"]).save(folder / "photo.jpg")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t").state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture(scope="module")
def read(folder: Path) -> Callable[[str], str]:
    """Return a function that follows a tutorial, after those before it, and returns what was printed."""
    shell = Shell(folder, smaller)
    outputs: dict[str, str] = {}

    def follow(name: str) -> str:
        for page in PAGES[: PAGES.index(name) + 1]:
            if page not in outputs:
                outputs[page] = FOLLOW.get(page, follow_blocks)(shell, page)
        return outputs[name]

    return follow


def blocks(page: str, language: str) -> list[Block]:
    """Return the blocks of a page in a language, except those with a reason not to run."""
    found = [block for block in blocks_of(ROOT / page) if block.language == language and not block.reason]
    assert found, page
    return found


def follow_blocks(shell: Shell, page: str) -> str:
    return "".join(shell.run(block.code) for block in blocks(page, "sh"))


def follow_training(shell: Shell, page: str) -> str:
    """Follow the tutorial on training: its first run is stopped with Ctrl-C after the first checkpoint."""
    first, *others = blocks(page, "sh")
    output = shell.run(first.code, stop=shell.folder / "runs" / "robust" / "last.pt")
    return output + "".join(shell.run(block.code) for block in others)


def follow_python(shell: Shell, page: str) -> str:
    """Run the Python of a page as one program."""
    code = "".join(block.code for block in blocks(page, "python"))
    (shell.folder / "program.py").write_text(code)
    return shell.run("python program.py")


def follow_serving(shell: Shell, page: str) -> str:
    """Follow the tutorial on serving: its first block starts the server, the others are its clients."""
    first, *others = blocks(page, "sh")
    return with_server(shell, first, others)


def with_server(shell: Shell, server: Block, clients: list[Block]) -> str:
    stop = shell.start_server(server.code, f"http://127.0.0.1:{PORT}")
    try:
        output = "".join(shell.run(block.code) for block in clients)
    finally:
        code = stop()
    assert code == 0
    return output


def follow_adapting(shell: Shell, page: str) -> str:
    """Follow the tutorial on adaptation, with dark versions of the photos as images of the field."""
    shutil.copy(shell.folder / "runs" / "robust" / "model.onnx", shell.folder)
    (shell.folder / "field").mkdir()
    for number, path in enumerate(sorted((shell.folder / "photos").rglob("*.jpg"))[::5]):
        with Image.open(path) as image:
            image.point(lambda level: level // 3).save(shell.folder / "field" / f"{number}.jpg")
    return follow_blocks(shell, page)


def follow_readme(shell: Shell, page: str) -> str:
    """Follow the README, whose last two blocks are a server and its client."""
    *first, server, client = blocks(page, "sh")
    output = "".join(shell.run(block.code) for block in first)
    return output + with_server(shell, server, [client])


FOLLOW = {
    TRAIN: follow_training,
    EMBED: follow_python,
    SERVE: follow_serving,
    ADAPT: follow_adapting,
    "README.md": follow_readme,
}


@pytest.mark.slow
def test_train(read: Callable[[str], str], folder: Path) -> None:
    output = read(TRAIN)
    assert "40 of 200 images for validation" in output
    epochs = [line.split(",")[0] for line in (folder / "runs/robust/metrics.csv").read_text().splitlines()]
    assert epochs == ["epoch", "1", "2", "3", "4"]
    assert (folder / "runs/vanilla/best.pt").exists()


@pytest.mark.slow
def test_deploy(read: Callable[[str], str], folder: Path) -> None:
    output = read(DEPLOY)
    assert "verified on" in output
    assert "ONNX classifier" in output
    assert len(list((folder / "deploy").glob("model.*"))) == 4
    assert (folder / "deploy/pixels/model.onnx").exists()


@pytest.mark.slow
def test_int8(read: Callable[[str], str], folder: Path) -> None:
    output = read(INT8)
    assert "layers in INT8" in output
    assert "budget of 0.50 points" in output
    original = folder / "runs/robust/model.int8.onnx"
    assert (folder / "deploy/model.int8.onnx").read_bytes() == original.read_bytes()


@pytest.mark.slow
def test_robustness(read: Callable[[str], str], folder: Path) -> None:
    output = read(ROBUSTNESS)
    assert "robust.int8" in output
    page = (folder / "report.html").read_text()
    for name in ("vanilla", "robust", "robust.fp16", "robust.int8"):
        assert f"<bdi>{name}</bdi>" in page, name
    assert str(folder) not in page
    assert (folder / "gate.xml").exists()


@pytest.mark.slow
def test_embed(read: Callable[[str], str]) -> None:
    output = read(EMBED)
    assert "ONNX Runtime" in output
    assert "(8, 5)" in output


@pytest.mark.slow
def test_serve(read: Callable[[str], str]) -> None:
    output = read(SERVE)
    (prediction,) = json.loads(output[: output.index("}]}]}") + 5])["predictions"]
    assert len(prediction["classes"]) == 3
    assert 'advprop_requests_total{model="flowers"' in output
    assert '"state":"READY"' in output.replace(" ", "")


@pytest.mark.slow
def test_adapt(read: Callable[[str], str], folder: Path) -> None:
    output = read(ADAPT)
    assert "verdict" in output
    for name in ("model.field.onnx", "model.field.fp16.onnx", "model.field.int8.onnx"):
        assert (folder / name).exists(), name


@pytest.mark.slow
def test_readme(read: Callable[[str], str], folder: Path) -> None:
    output = read("README.md")
    assert (folder / "report.html").stat().st_mtime > (folder / "gate.xml").stat().st_mtime
    assert output.rstrip().endswith("}]}]}"), output[-300:]  # the answer of the server


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_or_has_a_reason_not_to(page: str) -> None:
    text = (ROOT / page).read_text()
    found = blocks_of(ROOT / page)
    assert len(found) == text.count("\n```") // 2
    assert {block.language for block in found} <= {"sh", "python", ""}
    assert text.count("<!-- not run: ") == sum(bool(block.reason) for block in found)
    for block in found:
        installs = re.search(r"^(pip|make|git) ", block.code, re.M)
        assert not (block.language == "sh" and installs) or block.reason, block.code


@pytest.fixture(scope="module")
def schemas() -> dict[str, Draft202012Validator]:
    """Return a validator for each schema of the documentation, by its name."""
    contents = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "schemas").glob("*.json")}
    for content in contents.values():
        Draft202012Validator.check_schema(content)
    known = [(content["$id"], Resource.from_contents(content)) for content in contents.values()]
    registry = Registry().with_resources(known)
    return {name: Draft202012Validator(content, registry=registry) for name, content in contents.items()}


def format_of(schema: Draft202012Validator) -> str:
    value: str = schema.schema["properties"].get("format", {}).get("const", "")
    return value


@pytest.mark.slow
def test_files_fit_their_schemas(
    read: Callable[[str], str], folder: Path, schemas: dict[str, Draft202012Validator]
) -> None:
    read(ROBUSTNESS)
    quick = "--duration-s 0.05 --rounds 2 --warm-up-ms 0 --iterations 4 --batch-sizes 1 --threads 1 --out bench"
    Shell(folder, str).run(f"advprop bench runs/robust/model.onnx {quick}")
    by_format = {format_of(schema): name for name, schema in schemas.items() if format_of(schema)}
    valid = set()
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if content.get("format") in by_format:
            name = by_format[content["format"]]
            schemas[name].validate(content)
            valid.add(name)
            for key in schemas[name].schema["required"]:
                assert not schemas[name].is_valid({k: v for k, v in content.items() if k != key}), (name, key)
    assert valid == set(by_format.values())
    spec = next(p.value for p in onnx.load(folder / "runs/robust/model.onnx").metadata_props if p.key == METADATA_KEY)
    schemas["spec"].validate(json.loads(spec))


@pytest.mark.slow
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "tutorials" / "train.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:
        for long, short in (
            ("epochs=2", "epochs=1"),
            ("workers=0", "workers=0, img_size=32"),
            ("[400:800]", "[400:440]"),
        ):
            cell.source = cell.source.replace(long, short)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "epoch 1" in printed
    assert len(re.findall(r"^model\S*\.onnx +\d+\.\d%$", printed, re.M)) == 3
