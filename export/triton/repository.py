"""Write model repositories for Triton: configurations, labels, and an ensemble for encoded images."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runtime
from export.triton.pbtxt import Enum, Map, to_pbtxt
from runtime.backends.base import TensorInfo
from runtime.engine.sidecar import read_sidecar
from runtime.errors import ConfigError, ModelFileError, OutputError
from runtime.graph.read import read_onnx
from runtime.graph.validation import external_files
from runtime.spec import ModelSpec

__all__ = ["RepositoryOptions", "write_repository"]

_TEMPLATES = Path(__file__).parent
_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8", "int64": "TYPE_INT64"}
_ENGINE_OUTPUTS = {"logits": ("logits",), "probs": ("probs",), "topk": ("probs", "classes")}
"""Names of an engine's outputs by `output_form`, as advprop-export writes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryOptions:
    """Settings of the models in a repository.

    Raises:
        ConfigError: a value is out of range.
    """

    max_batch: int = 32
    """Largest batch, if the file accepts any batch size."""
    max_delay_us: int = 500
    """Maximum time that a request waits for others, in microseconds."""
    max_queue: int = 1024
    """Maximum number of waiting requests. Others are rejected."""
    timeout_us: int = 1_000_000
    """Waiting requests are rejected after this time, in microseconds."""
    instances: int = 1
    """Instances of the classifier per GPU, or on the CPU."""
    preprocess_instances: int = 2
    """Processes that decode and preprocess images."""
    gpus: tuple[int, ...] = ()
    """GPUs to run on (default: all)."""
    cpu: bool = False
    """Run the classifier on the CPU."""
    top_k: int = 5
    """Number of labels that the ensemble returns."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "timeout_us", "instances", "preprocess_instances", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.max_delay_us < 0:
            raise ConfigError(f"max_delay_us must be at least 0; found {self.max_delay_us}")
        if self.cpu and self.gpus:
            raise ConfigError("choose the CPU or GPUs, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Classifier:
    """A model file and the facts that its configuration needs."""

    name: str
    files: dict[str, Path]
    """Compute capability, such as 8.6, → engine; the key is empty for an ONNX file."""
    input: TensorInfo
    outputs: tuple[TensorInfo, ...]
    spec: ModelSpec
    largest: int
    """Largest batch; 0 if the batch size is fixed to 1."""

    @property
    def is_engine(self) -> bool:
        return "" not in self.files


def write_repository(
    folder: Path, models: Sequence[tuple[str, Sequence[Path]]], options: RepositoryOptions | None = None
) -> list[str]:
    """Write a Triton model repository, or add models to one.

    Each model NAME becomes four: NAME, the classifier; NAME_preprocess, which runs the file's own
    preprocessing; NAME_labels; and the ensemble NAME_image, which takes encoded images and returns
    labels.

    Args:
        folder: the repository. It may exist, without models of these names.
        models: name → one ONNX file, or engines of full TensorRT for different GPU generations.
        options: settings (default: `RepositoryOptions()`).

    Returns:
        The names of the models in the repository that were written.

    Raises:
        ConfigError: a name is not valid or is used twice, or the files of a model do not fit together.
        ModelFileError: a file cannot be used by Triton.
        OutputError: a model exists in the folder, or the folder cannot be written.
    """
    options = options or RepositoryOptions()
    names = [name for name, _ in models]
    for name in names:
        if not name.replace("_", "a").replace("-", "a").replace(".", "a").isalnum() or names.count(name) > 1:
            raise ConfigError(f"model names must be different, of letters, digits, '_', '-' and '.'; found {name!r}")
    classifiers = [_read(name, files, options) for name, files in models]
    written = [f"{name}{suffix}" for name in names for suffix in ("", "_preprocess", "_labels", "_image")]
    existing = [name for name in written if (folder / name).exists()]
    if existing:
        raise OutputError(f"{folder} already contains {', '.join(existing)}", fix="remove them, or choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
            for classifier in classifiers:
                _write_models(Path(temporary), classifier, options)
            for name in written:
                (Path(temporary) / name).rename(folder / name)
        (folder / "README.md").write_text(_readme(folder, classifiers), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    return written


def _read(name: str, files: Sequence[Path], options: RepositoryOptions) -> _Classifier:
    engines = [file for file in files if file.suffix in (".engine", ".plan")]
    if engines:
        if len(engines) != len(files):
            raise ConfigError(f"{name}: found engines and ONNX files; expected one kind of file per model")
        return _read_engines(name, engines)
    if len(files) != 1:
        raise ConfigError(f"{name}: found {len(files)} ONNX files; expected one")
    with runtime.load(str(files[0]), device="cpu") as session:
        backend, spec = session.backend, session.spec
        fixed = backend.input.shape[0]
        if fixed > 1:
            raise ModelFileError(
                f"{files[0]} has a fixed batch of {fixed} images, which Triton cannot fill", fix="export an open batch"
            )
        return _Classifier(
            name=name,
            files={"": files[0]},
            input=backend.input,
            outputs=backend.outputs,
            spec=spec,
            largest=0 if fixed == 1 else options.max_batch,
        )


def _read_engines(name: str, engines: Sequence[Path]) -> _Classifier:
    infos = [read_sidecar(engine) for engine in engines]
    files: dict[str, Path] = {}
    for engine, info in zip(engines, infos, strict=True):
        if info.flavor != "tensorrt":
            raise ModelFileError(
                f"{engine} was built with TensorRT-RTX, whose plans Triton's TensorRT backend cannot load",
                fix="build it with full TensorRT (pip install 'advprop[tensorrt]'), or use the ONNX file",
            )
        if info.spec is None or info.spec != infos[0].spec:
            raise ConfigError(f"{name}: {engine} has no spec, or another one than {engines[0]}")
        for target in info.compute_capabilities:
            digits = target.removeprefix("sm_")
            files[f"{digits[:-1]}.{digits[-1]}"] = engine
    spec = infos[0].spec
    assert spec is not None
    ((input_name, shapes),) = infos[0].profiles[0].items()
    dtype, _ = spec.input_form.split()
    classes = len(spec.classes)
    return _Classifier(
        name=name,
        files=files,
        input=TensorInfo(input_name, np.dtype(dtype), (-1, *shapes["opt"][1:])),
        outputs=tuple(
            TensorInfo(output, np.dtype("int64" if output == "classes" else "float32"), (-1, classes))
            for output in _ENGINE_OUTPUTS[spec.output_form]
        ),
        spec=spec,
        largest=min(info.profiles[-1][input_name]["max"][0] for info in infos),
    )


def _write_models(folder: Path, classifier: _Classifier, options: RepositoryOptions) -> None:
    name = classifier.name
    for suffix, config in (
        ("", _classifier_config(classifier, options)),
        ("_preprocess", _preprocess_config(classifier, options)),
        ("_labels", _labels_config(classifier, options)),
        ("_image", _ensemble_config(classifier, options)),
    ):
        (folder / f"{name}{suffix}" / "1").mkdir(parents=True)
        text = to_pbtxt({"name": f"{name}{suffix}", **config})
        (folder / f"{name}{suffix}" / "config.pbtxt").write_text(text, encoding="utf-8")
    labels = "".join(f"{label}\n" for label in classifier.spec.classes)
    (folder / name / "labels.txt").write_text(labels, encoding="utf-8")
    for capability, file in classifier.files.items():
        target = folder / name / "1" / _file_name(classifier, capability)
        shutil.copyfile(file, target)
        for data in [] if classifier.is_engine else external_files(read_onnx(file), file):
            shutil.copyfile(data, target.with_name(data.name))
    for suffix, template in (("_preprocess", "preprocess_model.py"), ("_labels", "labels_model.py")):
        shutil.copyfile(_TEMPLATES / template, folder / f"{name}{suffix}" / "1" / "model.py")
        (folder / f"{name}{suffix}" / "1" / "spec.json").write_text(classifier.spec.to_json(), encoding="utf-8")


def _file_name(classifier: _Classifier, capability: str) -> str:
    if not classifier.is_engine:
        return "model.onnx"
    return "model.plan" if len(classifier.files) == 1 else f"model_sm{capability.replace('.', '')}.plan"


def _classifier_config(classifier: _Classifier, options: RepositoryOptions) -> dict[str, Any]:
    kind = "KIND_CPU" if options.cpu else "KIND_GPU" if options.gpus or classifier.is_engine else "KIND_AUTO"
    labels = {"label_filename": "labels.txt"} if classifier.spec.output_form != "topk" else {}
    return {
        "backend": "tensorrt" if classifier.is_engine else "onnxruntime",
        "max_batch_size": classifier.largest,
        "input": [_tensor(classifier.input, classifier)],
        "output": [_tensor(output, classifier) | labels for output in classifier.outputs],
        "instance_group": [{"kind": Enum(kind), "count": options.instances, "gpus": list(options.gpus)}],
        **_batching(classifier, options),
        "model_warmup": [_warm_up(classifier, size) for size in _usual_sizes(classifier)],
        **(_engine_config(classifier) if classifier.is_engine else {}),
    }


def _engine_config(classifier: _Classifier) -> dict[str, Any]:
    image = list(classifier.input.shape[1:])
    specs = [
        {"batch_size": size, "input": Map({classifier.input.name: {"dim": image}})} for size in _usual_sizes(classifier)
    ]
    files = {capability: _file_name(classifier, capability) for capability in classifier.files}
    several = {"cc_model_filenames": Map(files)} if len(files) > 1 else {}
    return {"optimization": {"cuda": {"graphs": True, "graph_spec": specs}}, **several}


def _preprocess_config(classifier: _Classifier, options: RepositoryOptions) -> dict[str, Any]:
    return {
        "backend": "python",
        "max_batch_size": classifier.largest,
        "input": [_encoded_images()],
        "output": [_tensor(classifier.input, classifier)],
        "instance_group": [{"kind": Enum("KIND_CPU"), "count": options.preprocess_instances}],
        **_batching(classifier, options),
    }


def _labels_config(classifier: _Classifier, options: RepositoryOptions) -> dict[str, Any]:
    return {
        "backend": "python",
        "max_batch_size": classifier.largest,
        "input": [_tensor(output, classifier) for output in classifier.outputs],
        "output": _label_outputs(classifier, options),
        "instance_group": [{"kind": Enum("KIND_CPU"), "count": 1}],
        "parameters": Map({"top_k": {"string_value": str(options.top_k)}}),
    }


def _ensemble_config(classifier: _Classifier, options: RepositoryOptions) -> dict[str, Any]:
    name, pixels = classifier.name, classifier.input.name
    outputs = {output.name: output.name for output in classifier.outputs}
    steps = (
        (f"{name}_preprocess", {"IMAGE": "IMAGE"}, {pixels: pixels}),
        (name, {pixels: pixels}, outputs),
        (f"{name}_labels", outputs, {"LABEL": "LABEL", "PROBABILITY": "PROBABILITY"}),
    )
    return {
        "platform": "ensemble",
        "max_batch_size": classifier.largest,
        "input": [_encoded_images()],
        "output": _label_outputs(classifier, options),
        "ensemble_scheduling": {
            "step": [
                {"model_name": model, "model_version": -1, "input_map": Map(inputs), "output_map": Map(results)}
                for model, inputs, results in steps
            ]
        },
    }


def _tensor(tensor: TensorInfo, classifier: _Classifier) -> dict[str, Any]:
    shape = tensor.shape[1:] if classifier.largest else (1, *tensor.shape[1:])
    return {"name": tensor.name, "data_type": Enum(_TYPES[tensor.dtype.name]), "dims": list(shape)}


def _encoded_images() -> dict[str, Any]:
    return {"name": "IMAGE", "data_type": Enum("TYPE_STRING"), "dims": [1]}


def _label_outputs(classifier: _Classifier, options: RepositoryOptions) -> list[dict[str, Any]]:
    count = min(options.top_k, len(classifier.spec.classes))
    dims = [count] if classifier.largest else [1, count]
    return [
        {"name": "LABEL", "data_type": Enum("TYPE_STRING"), "dims": dims},
        {"name": "PROBABILITY", "data_type": Enum("TYPE_FP32"), "dims": dims},
    ]


def _batching(classifier: _Classifier, options: RepositoryOptions) -> dict[str, Any]:
    if not classifier.largest:
        return {}
    policy = {
        "timeout_action": Enum("REJECT"),
        "default_timeout_microseconds": options.timeout_us,
        "max_queue_size": options.max_queue,
    }
    return {
        "dynamic_batching": {
            "preferred_batch_size": [size for size in _usual_sizes(classifier) if size > 1],
            "max_queue_delay_microseconds": options.max_delay_us,
            "default_queue_policy": policy,
        }
    }


def _usual_sizes(classifier: _Classifier) -> list[int]:
    """Return the powers of two up to the largest batch, and that batch."""
    largest = max(1, classifier.largest)
    return sorted({1 << power for power in range(largest.bit_length()) if 1 << power <= largest} | {largest})


def _warm_up(classifier: _Classifier, size: int) -> dict[str, Any]:
    tensor = _tensor(classifier.input, classifier)
    usual = iter((classifier.spec.preprocessing.height, classifier.spec.preprocessing.width))
    dims = [next(usual) if dimension < 0 else dimension for dimension in tensor["dims"]]  # an open image size
    content = {"data_type": tensor["data_type"], "dims": dims, "random_data": True}
    return {
        "name": f"batch of {size}",
        "batch_size": size if classifier.largest else 0,
        "inputs": Map({tensor["name"]: content}),
    }


_TABLE = "| model | backend | architecture | classes | largest batch |"


def _readme(folder: Path, classifiers: Sequence[_Classifier]) -> str:
    readme = folder / "README.md"
    kept = _rows(readme.read_text(encoding="utf-8")) if readme.exists() else []
    added = [
        f"| {each.name} | {'tensorrt' if each.is_engine else 'onnxruntime'} | {each.spec.arch} | "
        f"{len(each.spec.classes)} | {each.largest or 'fixed to 1'} |"
        for each in classifiers
    ]
    rows = "\n".join([*kept, *added])
    name, shape = classifiers[0].name, "(1, 1)" if classifiers[0].largest else "(1,)"
    return f"""# Models for Triton Inference Server

{_TABLE}
|---|---|---|---|---|
{rows}

Each MODEL has three companions: MODEL_preprocess decodes, resizes and normalizes images like the
training did; MODEL_labels turns the outputs into labels; MODEL_image is the ensemble of all.

The Python models need advprop in the server's Python:

```sh
docker run --gpus all --rm -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -v "$PWD:/models" \\
    nvcr.io/nvidia/tritonserver:26.07-py3 \\
    sh -c 'pip install advprop && tritonserver --model-repository=/models'
```

A client:

```python
import numpy as np
import tritonclient.http as http

client = http.InferenceServerClient("127.0.0.1:8000")
encoded = np.array([open("photo.jpg", "rb").read()], np.object_).reshape{shape}
image = http.InferInput("IMAGE", encoded.shape, "BYTES")
image.set_data_from_numpy(encoded)
answer = client.infer("{name}_image", [image])
print(answer.as_numpy("LABEL"), answer.as_numpy("PROBABILITY"))
```
"""


def _rows(readme: str) -> list[str]:
    """Return the rows of the models that an earlier call wrote."""
    _, _, table = readme.partition(f"{_TABLE}\n")
    rows = itertools.takewhile(lambda line: line.startswith("|"), table.splitlines())
    return [row for row in rows if not row.startswith("|---")]
