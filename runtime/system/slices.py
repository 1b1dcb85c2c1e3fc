"""The slices of the installation: which extra of advprop provides a missing package.

`pip install advprop` installs what serving needs. Extras such as `advprop[train]` add the packages
of other commands. They are read from the metadata of the installed package, so pyproject.toml is the
only place that lists them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.errors import BackendUnavailable

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["SLICES", "install_command", "missing_package", "missing_requirements", "slice_command"]

SLICES = {
    "train": "train with AdvProp",
    "export": "export, calibrate, convert files, build engines",
    "eval": "measure accuracy, robustness and latency; reports",
    "serve": "serve models over HTTP and gRPC",
    "tensorrt": "engines of full TensorRT",
    "pycuda": "GPUArray inputs",
    "datasets": "datasets of Hugging Face and WebDataset",
    "wandb": "logging to Weights & Biases",
    "ray": "evaluation on a Ray cluster",
}
"""Extra → what it adds, in the order in which a missing package is looked up."""

_DISTRIBUTIONS = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "cv2": "opencv-python-headless",
    "grpc": "grpcio",
    "multipart": "python-multipart",
    "open_inference": "open-inference-grpc",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Module → distribution, if the names differ by more than a hyphen."""


def missing_package(error: BaseException | None, first: str = "") -> BackendUnavailable | None:
    """Return the error to raise if a package of a slice is missing.

    Args:
        error: what an import raised.
        first: the slice to recommend if it has the package (default: the first that has it).

    Returns:
        None if `error` has another cause, such as a damaged installation.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    module = error.name.partition(".")[0]
    command = install_command(module, first)
    if not command:
        return None
    return BackendUnavailable(f"the package {_distribution(module)} is not installed", fix=command)


def install_command(module: str, first: str = "") -> str:
    """Return the command that installs the first slice with `module`; empty if no slice has it."""
    distribution = _distribution(module)
    for name in (first, *SLICES):
        if any(_normalized(requirement.name) == distribution for requirement in _requirements(name)):
            return slice_command(name)
    return ""


def slice_command(name: str) -> str:
    """Return the command that installs a slice, from the clone if advprop is installed from one."""
    from importlib import metadata
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        origin = json.loads(metadata.distribution("advprop").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        origin = {}
    if "dir_info" not in origin:
        return f"pip install 'advprop[{name}]'"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {editable}'{url2pathname(urlsplit(origin['url']).path)}[{name}]'"


def missing_requirements(slice_name: str) -> list[str]:
    """Return the packages of a slice that are not installed, or whose version does not fit."""
    from importlib import metadata

    missing = []
    for requirement in _requirements(slice_name):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name} {requirement.specifier} (found {version})")
    return missing


def _requirements(slice_name: str) -> Iterator[Requirement]:
    """Yield the packages that only this slice and others, not the core, install here."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("advprop") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and marker.evaluate({"extra": slice_name}) and not marker.evaluate({"extra": ""}):
            yield requirement


def _distribution(module: str) -> str:
    return _DISTRIBUTIONS.get(module, _normalized(module))


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-")
