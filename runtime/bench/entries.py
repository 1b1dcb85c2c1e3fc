"""Open model files, and the peers that they are compared with, as targets."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from runtime.backends.open import CHECKPOINT_SUFFIXES, ENGINE_SUFFIXES
from runtime.backends.options import EngineOptions, Threads
from runtime.bench.targets import BenchTarget, TorchOpener, bare_onnxruntime, session_target, torch_target
from runtime.engine.sidecar import read_sidecar
from runtime.errors import ConfigError, InputError, ModelFileError
from runtime.graph.foreign import convert_command
from runtime.graph.read import sha256_onnx
from runtime.graph.summary import summarize
from runtime.loading import load
from runtime.session import Session
from runtime.spec import ModelSpec
from runtime.system.files import no_such

__all__ = ["PEERS", "LoadOptions", "find_onnx_of", "open_targets"]

log = logging.getLogger(__name__)

PEERS = ("torch", "ort")
"""Peers of a file: the same architecture in PyTorch, and ONNX Runtime itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Settings for loading files. None leaves a setting to the backend."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`, for files and peers."""
    threads: int = 0
    """CPU threads per run of ONNX Runtime and PyTorch; 0 leaves the number to each library."""
    spin: bool | None = None
    """Whether idle threads of ONNX Runtime spin; by default they do."""
    cuda_graphs: bool | None = None
    """Whether engines replay CUDA graphs; by default they do."""
    contexts: int | None = None
    """Batches that an engine runs concurrently; by default the maximum number of callers."""

    @property
    def threading(self) -> Threads:
        """The settings of ONNX Runtime's threads."""
        return Threads(intra=self.threads, spin=self.spin is not False)


def open_targets(
    paths: Sequence[Path],
    against: Sequence[str],
    options: LoadOptions,
    *,
    max_callers: int = 1,
    torch_opener: TorchOpener | None = None,
) -> list[BenchTarget]:
    """Load files, each followed by its peers.

    Args:
        paths: ONNX files, engines with their sidecars, and checkpoints, which PyTorch runs.
        against: peers to open as well, from PEERS.
        options: settings for loading the files.
        max_callers: maximum number of threads that call a target concurrently.
        torch_opener: opens checkpoints and PyTorch peers, such as
            `advprop.checkpoints.open_torch_peer`.

    Raises:
        InputError: a file does not exist, is not a model or is passed twice; the ONNX file of an
            engine is missing for `ort`; or PyTorch is needed and no opener is passed.
        BackendUnavailable: a library or GPU that a target needs is missing.
    """
    unknown = [peer for peer in against if peer not in PEERS]
    if unknown or len(set(against)) < len(against):
        raise ConfigError(f"--against takes {' and '.join(PEERS)}, each once; found {','.join(against)!r}")
    files = list(dict.fromkeys(path.resolve() for path in paths))
    if not paths or len(files) < len(paths):
        raise ConfigError(
            "the same file was passed twice; pass each file once" if paths else "expected a file; found none"
        )
    for path in paths:
        if not path.is_file():
            raise ModelFileError(no_such("model file", path))
    opener = _Opener(_distinct_names(paths), against, options, max_callers, torch_opener)
    try:
        for path in paths:
            opener.add(path)
    except BaseException:
        for target in opener.targets:
            target.close()
        raise
    return opener.targets


class _Opener:
    """Opens files and peers one after another."""

    def __init__(
        self,
        names: dict[Path, str],
        against: Sequence[str],
        options: LoadOptions,
        max_callers: int,
        torch_opener: TorchOpener | None,
    ) -> None:
        self.targets: list[BenchTarget] = []
        self._names, self._against, self._options = names, against, options
        self._max_callers, self._torch_opener = max_callers, torch_opener

    def add(self, path: Path) -> None:
        """Open a file and its peers, except PyTorch peers that are open already."""
        name = self._names[path]
        if path.suffix in CHECKPOINT_SUFFIXES:
            self._add_torch(name, None, checkpoint=path)
            return
        session, facts = self._open(path)
        size = _image_size(session, path)
        self.targets.append(session_target(name, session, facts, size))
        if "ort" in self._against:
            self._add_ort(path, session, size)
        if "torch" in self._against:
            spec = session.backend.spec
            if spec is None:
                raise InputError(
                    f"{path} has no spec, so its architecture is unknown: export it with advprop-export, or remove "
                    "--against torch"
                )
            known = any(target.facts.get("arch") == spec.arch and "peer" in target.facts for target in self.targets)
            if not known:
                half = facts["precision"] in ("fp16", "int8")
                self._add_torch(self._unique_name(f"{_slug(spec.arch)}-torch"), spec, half=half)

    def _add_ort(self, path: Path, session: Session, size: tuple[int, int]) -> None:
        name = self._unique_name(f"{self._names[path]}-ort")
        backend, threads = session.backend, self._options.threading
        if path.suffix in ENGINE_SUFFIXES:
            onnx = find_onnx_of(path)
            other = load(onnx, device=self._options.device, threads=threads)
            facts = {**_onnx_facts(onnx), "peer": f"{onnx.name}, which the engine was built from, in ONNX Runtime"}
            self.targets.append(session_target(name, other, {**facts, **self._settings(other)}, size))
        else:
            assert isinstance(backend, OnnxRuntimeBackend)
            self.targets.append(bare_onnxruntime(name, path, backend, threads, size))

    def _add_torch(
        self, name: str, spec: ModelSpec | None, *, half: bool = False, checkpoint: Path | None = None
    ) -> None:
        """Open a network in PyTorch, and on a GPU also a compiled copy."""
        if self._torch_opener is None:
            raise ConfigError(
                f"{name} runs in PyTorch, which the runtime does not import by itself: pass "
                "torch_opener=advprop.checkpoints.open_torch_peer, or remove it"
            )
        options = self._options
        if options.spin is not None:
            log.warning("spin settings have no effect on %s, which runs in PyTorch", name)
        if options.cuda_graphs is not None or options.contexts is not None:
            log.warning("engine options have no effect on %s, which runs in PyTorch", name)
        if options.threads == 0:
            log.warning("PyTorch chooses the number of CPU threads of %s; use --threads N for equal numbers", name)
        spec, peers = self._torch_opener(
            spec, checkpoint=checkpoint, half=half, device=options.device, threads=options.threads
        )
        self.targets.extend(torch_target(name + suffix, peer, spec) for suffix, peer in peers)

    def _open(self, path: Path) -> tuple[Session, dict[str, Any]]:
        options, is_engine = self._options, path.suffix in ENGINE_SUFFIXES
        engine = EngineOptions()
        if is_engine or options.cuda_graphs is not None or options.contexts is not None:
            # For ONNX files, `load` would warn that these options have no effect.
            engine = EngineOptions(
                cuda_graphs=options.cuda_graphs is not False,
                contexts=options.contexts or (self._max_callers if is_engine else engine.contexts),
            )
        session = load(path, device=options.device, engine=engine, threads=options.threading)
        if is_engine:
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
            facts = _onnx_facts(path)
            if session.backend.device == "cuda" and (options.threads or options.spin is not None):
                log.warning("thread settings have almost no effect on %s, which runs on the GPU", path)
        return session, {**facts, **self._settings(session), "reasons": list(session.backend.reasons)}

    def _settings(self, session: Session) -> dict[str, Any]:
        backend, options = session.backend, self._options
        facts: dict[str, Any] = {"arch": backend.spec.arch} if backend.spec else {}
        if backend.device == "cpu":
            facts |= {"threads": options.threads, "spin": options.spin is not False}
        return facts

    def _unique_name(self, name: str) -> str:
        """Return `name`, with a suffix if another target has this name."""
        known = {target.name for target in self.targets} | set(self._names.values())
        while name in known:
            name += "-peer"
        return name


def find_onnx_of(engine: Path) -> Path:
    """Return the ONNX file that an engine was built from; it must be in the engine's folder.

    Raises:
        ModelFileError: the folder does not contain the file.
    """
    wanted = read_sidecar(engine).onnx_sha256
    likely = engine.with_suffix(".onnx")
    files = [likely, *(path for path in sorted(engine.parent.glob("*.onnx")) if path != likely)]
    for path in files:
        if path.is_file() and sha256_onnx(path) == wanted:
            return path
    other = f", and {likely.name} is another file" if likely.is_file() else ""
    raise ModelFileError(
        f"--against ort needs the ONNX file that {engine} was built from, with SHA-256 {wanted[:16]}…, in the same "
        f"folder; the folder does not contain it{other}. Copy it there, or remove --against ort"
    )


def _onnx_facts(path: Path) -> dict[str, Any]:
    summary = summarize(path)
    return {
        "kind": "onnx",
        "sha256": summary.sha256,
        "precision": summary.precision,
        "calibration_sha256": summary.calibration_sha256,
    }


def _image_size(session: Session, path: Path) -> tuple[int, int]:
    """Return height and width of a file's images."""
    spec, shape = session.backend.spec, session.backend.input.shape
    if spec is not None:
        return spec.preprocessing.height, spec.preprocessing.width
    height, width = shape[1:3] if shape[-1] == 3 else shape[2:]
    if min(height, width) < 0:
        raise InputError(
            f"{path} accepts images of any size and has no spec that names one",
            fix=f"describe it with {convert_command(path)}",
        )
    return height, width


def _distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return distinct names for files: parts of their paths, as short as possible.

    Raises:
        ConfigError: two files cannot get distinct names.
    """
    candidates: tuple[Callable[[Path], str], ...] = (
        lambda path: path.stem,
        lambda path: path.name,
        lambda path: f"{path.resolve().parent.name}-{path.name}",
        lambda path: "-".join(path.resolve().parts[1:]),
    )
    named: dict[Path, str] = {}
    for path in paths:
        for candidate in candidates:
            slugs = Counter(_slug(candidate(other)) for other in paths)
            if slugs[_slug(candidate(path))] == 1:
                named[path] = _slug(candidate(path))
                break
    if len(set(named.values())) < len(paths):
        raise ConfigError("the names of two files cannot be distinguished; rename one of the files")
    return named


def _slug(text: str) -> str:
    """Return `text` with characters replaced that are unsafe in file names."""
    return re.sub(r"[^\w.-]", "_", text)
