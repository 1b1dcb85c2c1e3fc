"""The sidecar `NAME.engine.json`, which describes an engine and detects changes to it.

An engine is a raw plan that any TensorRT tool can load. It contains native code for one TensorRT
version and certain GPUs, so it is deserialized only after its SHA-256 has been compared with the
sidecar's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.engine.int8 import LayerReport
from runtime.engine.options import HOST_CODE_FLAG
from runtime.errors import ModelFileError, SpecError
from runtime.spec import ModelSpec
from runtime.system.files import sha256_file, write_text

__all__ = ["EngineInfo", "put_engine", "read_sidecar", "sidecar_path", "write_sidecar"]

FORMAT = "advprop.engine/1"
_FORMER_NAMES = {"flavour": "flavor", "quantised": "quantized"}
"""Names of fields in sidecars of version 0.1 → their current names."""
_MAX_BYTES = 2**26
"""Maximum size of a sidecar, in bytes. A sidecar with a thousand classes and a hundred layers has
half a megabyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """The facts that determine where an engine can run and what it computes."""

    plan_sha256: str
    """SHA-256 of the plan."""
    onnx_sha256: str
    """SHA-256 of the ONNX file that it was built from."""
    flavor: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    """Full version of the library that built it. The same version must run it."""
    compute_capabilities: tuple[str, ...]
    """Target GPU generations, e.g. `sm_86`; `default` for TensorRT-RTX's default (all supported
    generations since Ampere)."""
    gpu: str
    """Name of the GPU it was built on; empty if it was built without one."""
    profiles: tuple[dict[str, dict[str, list[int]]], ...]
    """Optimization profiles: input name → {`min`, `opt`, `max`} → shape."""
    flags: tuple[str, ...]
    """Builder and network flags."""
    precision: str
    """Precision of most weights: `fp32`, `fp16`, `bf16` or `int8`."""
    precision_shares: dict[str, float]
    """Precision → fraction of the weight elements."""
    calibration_sha256: str
    """Hash of the INT8 calibration set; empty without calibration."""
    spec: ModelSpec | None
    """The model's spec; None if advprop did not write the ONNX file."""
    layers: tuple[LayerReport, ...] = ()
    """How each layer of a quantized graph is computed; empty if the builder does not report it."""

    @property
    def has_host_code(self) -> bool:
        """Whether the plan contains code for the CPU, which needs `engine_host_code_allowed`."""
        return HOST_CODE_FLAG in self.flags


def sidecar_path(engine: Path) -> Path:
    """Return the path of an engine's sidecar: `m.engine` → `m.engine.json`."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: Path, info: EngineInfo) -> None:
    """Write the sidecar of `engine` atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    content = {"format": FORMAT, **dataclasses.asdict(info)}
    content["spec"] = json.loads(info.spec.to_json()) if info.spec else None
    write_text(sidecar_path(engine), json.dumps(content, indent=2, sort_keys=True) + "\n")


def put_engine(engine: Path, info: EngineInfo, write_plan: Callable[[], None]) -> None:
    """Write an engine and its sidecar.

    The old sidecar is removed first: if the process stops in between, it must not stay next to the
    new plan.

    Args:
        engine: path of the plan.
        info: contents of the sidecar.
        write_plan: writes the plan to `engine`.

    Raises:
        OutputError: the folder cannot be written.
    """
    sidecar_path(engine).unlink(missing_ok=True)
    write_plan()
    write_sidecar(engine, info)


def read_sidecar(engine: Path) -> EngineInfo:
    """Read the sidecar of `engine`, and compare the plan's hash with it.

    Raises:
        ModelFileError: the plan or its sidecar is missing, the sidecar is invalid, or the plan
            changed since the build.
    """
    info = _read(engine)
    found = sha256_file(engine)
    if found != info.plan_sha256:
        raise ModelFileError(
            f"{engine} is not the plan that its sidecar describes: found sha256 {found[:16]}…, expected "
            f"{info.plan_sha256[:16]}…; it was modified or truncated",
            fix=_rebuild(engine),
        )
    return info


def _rebuild(engine: Path) -> str:
    return f"build it again: advprop build MODEL.onnx --out {engine}"


def _read(engine: Path) -> EngineInfo:
    path = sidecar_path(engine)
    rebuild = _rebuild(engine)
    for file in (engine, path):
        if not file.is_file():
            raise ModelFileError(f"no such file: {file}", fix=rebuild)
    if path.stat().st_size > _MAX_BYTES:
        raise ModelFileError(f"{path} is not an engine's sidecar: it has {path.stat().st_size:,} bytes", fix=rebuild)
    try:
        content = json.loads(path.read_text())
        found = content.pop("format")
        if found != FORMAT:
            raise ModelFileError(f"{path} has format {found!r}, expected {FORMAT!r}", fix=rebuild)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in _with_current_names(content).items()
        }
        spec = fields.pop("spec")
        layers = fields.pop("layers", ())
        info = EngineInfo(
            spec=ModelSpec.from_json(json.dumps(spec), where=str(path)) if spec else None,
            layers=tuple(LayerReport.from_json(_with_current_names(layer)) for layer in layers),
            **fields,
        )
        _check_types(info)
    except (ModelFileError, SpecError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path} is not an engine's sidecar ({error})", fix=rebuild) from error
    return info


def _with_current_names(fields: dict[str, Any]) -> dict[str, Any]:
    return {_FORMER_NAMES.get(name, name): value for name, value in fields.items()}


def _check_types(info: EngineInfo) -> None:
    """Raise TypeError if a field does not have its declared type."""
    texts = (info.plan_sha256, info.onnx_sha256, info.flavor, info.version, info.gpu, info.precision)
    if not all(
        isinstance(text, str) for text in (*texts, info.calibration_sha256, *info.compute_capabilities, *info.flags)
    ):
        raise TypeError("a text field is not text")
    if info.flavor not in ("tensorrt", "tensorrt_rtx"):
        raise TypeError(f"flavor is {info.flavor!r}")
    if not all(isinstance(share, int | float) for share in info.precision_shares.values()):
        raise TypeError("precision_shares are not numbers")
    for profile in info.profiles:
        for shapes in profile.values():
            if set(shapes) != {"min", "opt", "max"}:
                raise TypeError("a profile needs min, opt and max")
            if not all(isinstance(size, int) for shape in shapes.values() for size in shape):
                raise TypeError("a profile's shape does not consist of integers")
    for layer in info.layers:
        words = (layer.node, layer.op, layer.computes, layer.why)
        numbers = (layer.macs, layer.channels, layer.padded_channels)
        if not all(isinstance(word, str) for word in words) or not all(isinstance(number, int) for number in numbers):
            raise TypeError("a layer's field has the wrong type")
