"""The sidecar `NAME.engine.json`: what an engine is, and the check that it still is.

An engine is a raw plan, loadable by any TensorRT tool. It holds native code for one
TensorRT version and certain GPUs, so it is never deserialized before its bytes have been
compared with the sidecar's SHA-256.
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
"""Fields of sidecars that version 0.1 wrote."""
_MOST_BYTES = 2**26
"""Of a sidecar; the largest have a thousand classes and a hundred layers, half a megabyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Everything that decides whether an engine may be used, and for what."""

    plan_sha256: str
    """SHA-256 of the plan's bytes."""
    onnx_sha256: str
    """SHA-256 of the ONNX file it was built from."""
    flavor: str
    """`tensorrt` or `tensorrt_rtx`."""
    version: str
    """Full version of the library that built it; the one that runs it must be the same."""
    compute_capabilities: tuple[str, ...]
    """GPU generations it runs on, e.g. `sm_86`; `default` for TensorRT-RTX's own choice
    (every generation it supports from Ampere on)."""
    gpu: str
    """Name of the GPU it was built on; empty when it was built without one."""
    profiles: tuple[dict[str, dict[str, list[int]]], ...]
    """Optimization profiles: input name → {`min`, `opt`, `max`} → shape."""
    flags: tuple[str, ...]
    """Builder and network flags."""
    precision: str
    """Type that most weights are computed in: `fp32`, `fp16`, `bf16` or `int8`."""
    precision_shares: dict[str, float]
    """Fraction of weight elements by the type they are computed in."""
    calibration_sha256: str
    """Hash of the INT8 calibration set; empty where the engine was not calibrated."""
    spec: ModelSpec | None
    """The model's description; None for an ONNX file that advprop did not write."""
    layers: tuple[LayerReport, ...] = ()
    """Of a quantized graph: what became of each layer; empty where the builder does not tell."""

    @property
    def has_host_code(self) -> bool:
        """Whether the plan carries code for the CPU, and loads only where `engine_host_code_allowed` is set."""
        return HOST_CODE_FLAG in self.flags


def sidecar_path(engine: Path) -> Path:
    """Returns the sidecar's place: `m.engine` → `m.engine.json`."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: Path, info: EngineInfo) -> None:
    """Writes the sidecar of `engine` atomically. Raises OutputError."""
    content = {"format": FORMAT, **dataclasses.asdict(info)}
    content["spec"] = json.loads(info.spec.to_json()) if info.spec else None
    write_text(sidecar_path(engine), json.dumps(content, indent=2, sort_keys=True) + "\n")


def put_engine(engine: Path, info: EngineInfo, write_plan: Callable[[], None]) -> None:
    """Lets `write_plan` write `engine`, and writes its sidecar.

    The old sidecar goes first: a stop between the two must not leave it beside a new plan.

    Raises:
        OutputError: the folder cannot be written.
    """
    sidecar_path(engine).unlink(missing_ok=True)
    write_plan()
    write_sidecar(engine, info)


def read_sidecar(engine: Path) -> EngineInfo:
    """Reads the sidecar of `engine` and compares the plan's bytes with it.

    Raises:
        ModelFileError: the plan or its sidecar is missing, the sidecar is not one, or the
            plan's bytes are not the ones that were built.
    """
    info = _read(engine)
    found = sha256_file(engine)
    if found != info.plan_sha256:
        raise ModelFileError(
            f"{engine} is not the plan its sidecar describes: found sha256 {found[:16]}…, expected "
            f"{info.plan_sha256[:16]}…; it was changed or cut short. {_rebuild(engine)}"
        )
    return info


def _rebuild(engine: Path) -> str:
    return f"build it again: advprop build MODEL.onnx --out {engine}"


def _read(engine: Path) -> EngineInfo:
    path = sidecar_path(engine)
    rebuild = _rebuild(engine)
    for file in (engine, path):
        if not file.is_file():
            raise ModelFileError(f"no such file: {file}; {rebuild}")
    if path.stat().st_size > _MOST_BYTES:
        raise ModelFileError(f"{path} is not an engine's sidecar: {path.stat().st_size:,} bytes; {rebuild}")
    try:
        content = json.loads(path.read_text())
        found = content.pop("format")
        if found != FORMAT:
            raise ModelFileError(f"{path} has format {found!r}, expected {FORMAT!r}; {rebuild}")
        fields: dict[str, Any] = {
            _FORMER_NAMES.get(name, name): tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        spec = fields.pop("spec")
        described = ModelSpec.from_json(json.dumps(spec), where=str(path)) if spec else None
        layers = tuple(
            LayerReport(**{_FORMER_NAMES.get(name, name): value for name, value in layer.items()})
            for layer in fields.pop("layers", ())
        )
        info = EngineInfo(spec=described, layers=layers, **fields)
        _check_types(info)
    except SpecError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} is not an engine's sidecar ({error}); {rebuild}") from error
    return info


def _check_types(info: EngineInfo) -> None:
    """Raises TypeError where a field is not what it is declared to be."""
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
                raise TypeError("a profile's shape is not of whole numbers")
    for layer in info.layers:
        words = (layer.node, layer.op, layer.computes, layer.why)
        if not all(isinstance(word, str) for word in words) or not isinstance(layer.macs, int):
            raise TypeError("a layer's field is of another type")
