"""Read and hash ONNX files, which may be damaged or malicious."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import BackendUnavailable, ModelFileError
from runtime.graph.validation import check_file, check_nodes, check_tensors, external_files, external_tensors
from runtime.system.files import no_such, sha256_file
from runtime.system.slices import missing_package

__all__ = ["OnnxFile", "load_onnx", "read_onnx", "read_onnx_file", "sha256_onnx"]


class OnnxFile(NamedTuple):
    """An ONNX file and its identity."""

    model: Any
    """The `onnx.ModelProto`; external weights are not loaded."""
    sha256: str
    """Hash of the file. If weights are stored externally: the hash of the hashes of all files."""
    size_bytes: int
    """Size of the file, external weights included."""


def read_onnx(path: Path) -> Any:
    """Read an ONNX file and return its `onnx.ModelProto`; external weights are not loaded.

    Raises:
        BackendUnavailable: the `onnx` package is missing.
        ModelFileError: the file does not exist, is not ONNX, or lacks data that it declares.
    """
    return _parse(path, _content(path))


def load_onnx(path: Path) -> Any:
    """Read an ONNX file with its external weights, which may be links next to the file.

    Raises:
        BackendUnavailable, ModelFileError: see `read_onnx_file`.
    """
    model = read_onnx(path)
    external_files(model, path)
    for tensor in external_tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        with (path.parent / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset") or 0))
            tensor.raw_data = file.read(int(entries["length"])) if entries.get("length") else file.read()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    check_tensors(model, path)
    return model


def read_onnx_file(path: Path) -> OnnxFile:
    """Read an ONNX file together with its hash and size.

    Raises:
        BackendUnavailable, ModelFileError: see `read_onnx`; also if a file of external weights is
            unusable.
    """
    content = _content(path)
    with ThreadPoolExecutor(1) as pool:
        own_hash = pool.submit(lambda: hashlib.sha256(content).hexdigest())  # while the file is parsed
        model = _parse(path, content)
    external = external_files(model, path)
    size = len(content) + sum(file.stat().st_size for file in external)
    return OnnxFile(model, _combined_hash(own_hash.result(), external), size)


def sha256_onnx(path: Path) -> str:
    """Return the hash of an ONNX file, `OnnxFile.sha256`.

    Raises:
        BackendUnavailable, ModelFileError: see `read_onnx_file`.
    """
    return read_onnx_file(path).sha256


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise ModelFileError(no_such("ONNX file", path))
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(path: Path, content: bytes) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise missing_package(error) or BackendUnavailable(f"the package onnx cannot be imported: {error}") from error
    try:
        model = onnx.ModelProto.FromString(content)
    except Exception as error:  # the class of protobuf's DecodeError differs between releases
        raise ModelFileError(f"{path} is not an ONNX file, or is truncated: {error}") from error
    if not model.ir_version or not model.HasField("graph"):
        raise ModelFileError(f"{path} is not an ONNX file: it has no graph or no IR version")
    check_nodes(model, path)
    check_tensors(model, path)
    return model


def _combined_hash(own: str, external: list[Path]) -> str:
    if not external:
        return own
    return hashlib.sha256("".join([own, *map(sha256_file, external)]).encode()).hexdigest()
