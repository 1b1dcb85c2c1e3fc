"""Build a plan from an ONNX file: the native part of a build, shared by all TensorRT libraries."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.engine.flavors import Flavor, native_logger
from runtime.engine.options import BuildOptions, apply_options
from runtime.engine.progress import BuildProgress, native_monitor
from runtime.errors import EngineBuildError
from runtime.graph.engine_form import engine_form
from runtime.system.files import write_bytes

if TYPE_CHECKING:
    import tensorrt

__all__ = ["PlanRequest", "make_plan"]

log = logging.getLogger(__name__)

_MAX_REASONS = 5
# The parser's error codes are the same for many causes. The texts add an explanation; no decision
# depends on them.
_EXPLANATIONS = (
    ("Plugin not found", "{flavor} has no such operator"),
    ("Node input was not registered", "one of its inputs is not the output of a node, a graph input or a weight"),
)
"""Part of a parser message → explanation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """All inputs of the native builder."""

    flavor: Flavor
    """The TensorRT library."""
    source: Path
    """The ONNX file."""
    input_name: str
    """Its image input."""
    profile: dict[str, list[int]]
    """`min`, `opt` and `max` shape of the input."""
    sms: tuple[int, ...]
    """Target compute capabilities; empty for the default."""
    options: BuildOptions
    """The other settings."""

    @property
    def builder(self) -> str:
        """The library's name and version, for messages."""
        return f"{self.flavor.name} {self.flavor.version}"


def make_plan(request: PlanRequest, progress: BuildProgress) -> memoryview:
    """Build a plan in the calling thread.

    Raises:
        EngineBuildError: the parser or the builder rejected the graph; the message has their
            reasons.
        ModelFileError: the graph does not work with the engine's batch sizes.
        OutputError: the timing cache cannot be written.
    """
    trt = request.flavor.module
    logger = native_logger(request.flavor)
    logger.reset()
    builder: tensorrt.Builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    with _parsed_file(request) as (content, path):
        parsed = parser.parse(content, os.fspath(path))
    if not parsed:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise EngineBuildError(f"{request.builder} cannot read {request.source}: {_reasons(request, errors)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the report of INT8 layers
    apply_options(trt, config, request.options)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(request.input_name, *(trt.Dims(request.profile[name]) for name in ("min", "opt", "max")))
    config.add_optimization_profile(shapes)
    if request.sms and request.flavor.name == "tensorrt_rtx":
        _set_targets(trt, config, request.sms)
    # These two must live until the plan is built.
    timing_cache = request.options.timing_cache
    timings = _load_timings(config, timing_cache) if timing_cache is not None else None
    monitor = native_monitor(trt, progress)
    config.progress_monitor = monitor
    plan = None if progress.stopped else builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_error(request, logger)
    if timing_cache is not None and timings is not None:
        write_bytes(timing_cache, bytes(timings.serialize()))
    return memoryview(plan)


@contextmanager
def _parsed_file(request: PlanRequest) -> Iterator[tuple[bytes, Path]]:
    """Yield the bytes for the parser, and the path next to which it finds external weights."""
    graph = engine_form(request.source, list(request.profile.values()))
    if graph is None:
        yield request.source.read_bytes(), request.source
        return
    from runtime.graph.model import save_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / request.source.name
        save_onnx(graph, path)
        yield path.read_bytes(), path


def _load_timings(config: tensorrt.IBuilderConfig, path: Path) -> tensorrt.ITimingCache:
    """Load the timings of earlier builds, except those of another GPU or version."""
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(timings, ignore_mismatch=False):
        log.warning("%s is for another GPU or TensorRT, and will be replaced", path)
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _network_flags(trt: Any) -> int:
    """Return the flag STRONGLY_TYPED for TensorRT 10. Later versions have no other networks."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_targets(trt: Any, config: Any, sms: tuple[int, ...]) -> None:
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], index):
            raise EngineBuildError(f"TensorRT-RTX {trt.__version__} rejected the target SM {sm}")


def _reasons(request: PlanRequest, errors: list[tensorrt.ParserError]) -> str:
    """Return node, operator and reason of each error."""
    found = list(dict.fromkeys(_describe(request, error) for error in errors)) or ["the parser gave no reason"]
    more = f"; and {len(found) - _MAX_REASONS} more" if len(found) > _MAX_REASONS else ""
    return "; ".join(found[:_MAX_REASONS]) + more


def _describe(request: PlanRequest, error: tensorrt.ParserError) -> str:
    reason = " ".join(str(error.desc()).split())
    for text, explanation in _EXPLANATIONS:
        if text in reason:
            reason = f"{explanation.format(flavor=request.flavor.name)} ({reason})"
    if not hasattr(error, "node_operator"):  # the first releases of TensorRT 10
        return f"node {error.node()}: {reason}"
    name, operator = error.node_name(), error.node_operator()
    if not (name or operator):
        return reason
    return f"node {name!r} ({operator}): {reason}" if name else f"node {error.node()} ({operator}): {reason}"


def _build_error(request: PlanRequest, logger: Any) -> EngineBuildError:
    reason = "; ".join(logger.errors) or "the builder gave no reason"
    fix = ""
    # The builder reports the required memory in its log only. The number becomes a suggestion.
    required = re.search(r"OutOfMemory.*?(\d+) bytes", reason)
    if required and request.options.workspace_mib:
        needed = -(-int(required[1]) // (1 << 20))
        fix = f"the workspace of {request.options.workspace_mib} MiB is too small: try --workspace-mib {needed} or more"
    return EngineBuildError(f"{request.builder} could not build {request.source}: {reason}", fix=fix)
