"""Model files become contestants, and so do the peers that they are compared with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.backends.open import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES
from runtime.backends.options import EngineOptions, Threads
from runtime.bench.names import names_of, slug, unused
from runtime.bench.peers import bare_onnxruntime, onnx_beside, torch_peers
from runtime.bench.targets import Contestant, of_session
from runtime.engine.sidecar import read_sidecar
from runtime.errors import ConfigError, InputError, ModelFileError
from runtime.graph.summary import summarize
from runtime.loading import load
from runtime.session import Session
from runtime.spec import ModelSpec

__all__ = ["PEERS", "LoadOptions", "open_contestants"]

log = logging.getLogger(__name__)

PEERS = ("torch", "ort")
"""What files can be compared with: the same architecture in PyTorch, and ONNX Runtime by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How files are loaded. None leaves it to the backend; what has no effect on a file is told by a warning."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`; of the peers too."""
    threads: int = 0
    """CPU threads inside one run, of ONNX Runtime and PyTorch. 0: one a physical core, or each library's own choice."""
    spin: bool | None = None
    """Whether ONNX Runtime's idle threads spin; by default they do."""
    cuda_graphs: bool | None = None
    """Whether engines replay CUDA graphs; by default they do."""
    contexts: int | None = None
    """Batches that an engine runs at the same time. Default: as many as there are callers at the most."""


def open_contestants(
    paths: Sequence[Path], against: Sequence[str], options: LoadOptions, most_callers: int = 1
) -> list[Contestant]:
    """Loads everything that takes part, the files first, each with its peers behind it.

    Args:
        paths: ONNX files, engines with their sidecars, and checkpoints (in PyTorch).
        against: some of PEERS.
        options: how.
        most_callers: threads that will call a contestant at the same time.

    Raises:
        InputError: no such file, not a model, the same twice, or no ONNX file beside an engine for `ort`.
        BackendUnavailable: what runs one of them is missing.
    """
    unknown = [peer for peer in against if peer not in PEERS]
    if unknown or len(set(against)) < len(against):
        raise ConfigError(f"--against takes {' and '.join(PEERS)}, each once; found {','.join(against)!r}")
    files = list(dict.fromkeys(path.resolve() for path in paths))
    if not paths or len(files) < len(paths):
        raise ConfigError("no file to run" if not paths else "the same file is there twice; give each once")
    for path in paths:
        if not path.is_file():
            raise ModelFileError(f"no such model file: {path}")
    names = names_of(paths)
    found: list[Contestant] = []
    try:
        for path in paths:
            _add(found, path, names, against, options, most_callers)
    except BaseException:
        for contestant in found:
            contestant.close()
        raise
    return found


def _add(
    found: list[Contestant],
    path: Path,
    names: dict[Path, str],
    against: Sequence[str],
    options: LoadOptions,
    most_callers: int,
) -> None:
    """Adds a file and its peers, but for those that an earlier file has brought."""
    name = names[path]
    if path.suffix in CHECKPOINT_SUFFIXES:
        _warn_of_torch(name, options)
        found.extend(torch_peers(name, None, "", options.device, options.threads, checkpoint=path))
        return
    session, facts = _open(path, options, most_callers)
    size = _image_size(session, path)
    found.append(of_session(name, session, facts, size))
    spec = session.backend.spec
    known = {contestant.name for contestant in found} | set(names.values())
    if "ort" in against:
        _add_ort(found, path, session, unused(f"{name}-ort", known), options, size)
    if "torch" in against:
        _add_torch(found, path, spec, facts["precision"], options, known)


def _add_ort(
    found: list[Contestant], path: Path, session: Session, name: str, options: LoadOptions, size: tuple[int, int]
) -> None:
    backend = session.backend
    threads = Threads(intra=options.threads, spin=options.spin is not False)
    if path.suffix in ENGINE_SUFFIXES:
        onnx = onnx_beside(path)
        other = load(onnx, device=options.device, threads=threads)
        facts = {**_onnx_facts(onnx), "peer": f"{onnx.name}, which the engine was built from, in ONNX Runtime"}
        found.append(of_session(name, other, {**facts, **_settings(other, options)}, size))
    else:
        assert isinstance(backend, OnnxRuntimeBackend)
        found.append(bare_onnxruntime(name, path, backend, threads, size))


def _add_torch(
    found: list[Contestant],
    path: Path,
    spec: ModelSpec | None,
    precision: str,
    options: LoadOptions,
    known: set[str],
) -> None:
    if spec is None:
        raise InputError(
            f"{path} has no spec, so its architecture is unknown: export it with advprop-export, or leave "
            "--against torch out"
        )
    name = f"{slug(spec.arch)}-torch"
    if any(contestant.facts.get("arch") == spec.arch and "peer" in contestant.facts for contestant in found):
        return
    _warn_of_torch(name, options)
    found.extend(torch_peers(unused(name, known), spec, precision, options.device, options.threads))


def _warn_of_torch(name: str, options: LoadOptions) -> None:
    if options.spin is not None:
        log.warning("spin settings have no effect on %s, which PyTorch runs", name)
    if options.cuda_graphs is not None or options.contexts is not None:
        log.warning("EngineOptions have no effect on %s, which PyTorch runs", name)
    if options.threads == 0:
        log.warning("%s runs on as many CPU threads as PyTorch likes; --threads N gives all as many", name)


def _open(path: Path, options: LoadOptions, most_callers: int) -> tuple[Session, dict[str, Any]]:
    is_engine = path.suffix in ENGINE_SUFFIXES
    engine = EngineOptions()
    if is_engine or options.cuda_graphs is not None or options.contexts is not None:  # `load` warns of the rest
        engine = EngineOptions(
            cuda_graphs=options.cuda_graphs is not False,
            contexts=options.contexts or (most_callers if is_engine else engine.contexts),
        )
    threads = Threads(intra=options.threads, spin=options.spin is not False)
    if is_engine:
        session = load(path, device=options.device, engine=engine, threads=threads)
        info = read_sidecar(path)
        facts = {
            "kind": "engine",
            "sha256": info.plan_sha256,
            "onnx_sha256": info.onnx_sha256,
            "precision": info.precision,
            "flavor": info.flavor,
            "version": info.version,
            "cuda_graphs": engine.cuda_graphs,
            "contexts": engine.contexts,
        }
    else:
        session = load(path, device=options.device, threads=threads, engine=engine)
        facts = _onnx_facts(path)
        if session.backend.device == "cuda" and (options.threads or options.spin is not None):
            log.warning("threads have next to no effect on %s, which computes on the GPU", path)
    return session, {**facts, **_settings(session, options), "reasons": list(session.backend.reasons)}


def _onnx_facts(path: Path) -> dict[str, Any]:
    summary = summarize(path)
    return {
        "kind": "onnx",
        "sha256": summary.sha256,
        "precision": summary.precision,
        "calibration_sha256": summary.calibration_sha256,
    }


def _settings(session: Session, options: LoadOptions) -> dict[str, Any]:
    backend = session.backend
    arch = {"arch": backend.spec.arch} if backend.spec else {}
    return arch | ({"threads": options.threads, "spin": options.spin is not False} if backend.device == "cpu" else {})


def _image_size(session: Session, path: Path) -> tuple[int, int]:
    """Height and width of a file's images."""
    spec, shape = session.backend.spec, session.backend.input.shape
    if spec is not None:
        return spec.preprocessing.height, spec.preprocessing.width
    height, width = shape[1:3] if shape[-1] == 3 else shape[2:]
    if min(height, width) < 0:
        raise InputError(
            f"{path} takes images of any size and has no spec that names one; export it with advprop-export"
        )
    return height, width
