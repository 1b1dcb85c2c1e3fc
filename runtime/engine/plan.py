"""ONNX file → plan: the native part of a build, by the calls that every TensorRT has."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.engine.flavors import Flavor, native_logger
from runtime.engine.options import BuildOptions, apply_options
from runtime.engine.progress import BuildProgress, native_monitor
from runtime.errors import EngineBuildError
from runtime.system.files import write_bytes

if TYPE_CHECKING:
    import tensorrt

__all__ = ["PlanRequest", "make_plan"]

log = logging.getLogger(__name__)

_MOST_REASONS = 5
_HINTS = (
    ("Plugin not found", "{flavor} has no such operator"),
    ("Node input was not registered", "one of its inputs is given by no node, input or weight"),
)
"""What the parser's most usual messages mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything that the native builder is told."""

    flavor: Flavor
    """The library."""
    source: Path
    """The ONNX file."""
    input_name: str
    """Its image input."""
    profile: dict[str, list[int]]
    """`min`, `opt` and `max` shapes of it."""
    sms: tuple[int, ...]
    """Compute capabilities; empty for the default."""
    options: BuildOptions
    """The rest."""
    timing_cache: Path | None
    """Of full TensorRT."""

    @property
    def builder(self) -> str:
        """The library's name and version, for messages."""
        return f"{self.flavor.name} {self.flavor.version}"


def make_plan(request: PlanRequest, progress: BuildProgress) -> memoryview:
    """Builds a plan, in the calling thread.

    Raises:
        EngineBuildError: the parser or the builder refused; the message has their reasons.
        OutputError: the timing cache cannot be written.
    """
    trt = request.flavor.module
    logger = native_logger(request.flavor)
    logger.reset()
    builder: tensorrt.Builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse(request.source.read_bytes(), os.fspath(request.source)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise EngineBuildError(f"{request.builder} cannot read {request.source}: {_reasons(request, errors)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the report of INT8 layers reads
    apply_options(trt, config, request.options)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(request.input_name, *(trt.Dims(request.profile[name]) for name in ("min", "opt", "max")))
    config.add_optimization_profile(shapes)
    if request.sms and request.flavor.name == "tensorrt_rtx":
        _set_targets(trt, config, request.sms)
    # These two must live until it is built.
    timings = _timings(config, request.timing_cache) if request.timing_cache is not None else None
    monitor = native_monitor(trt, progress)
    config.progress_monitor = monitor
    plan = None if progress.stopped else builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineBuildError(f"{request.builder} could not build {request.source}: {_refusal(request, logger)}")
    if request.timing_cache is not None and timings is not None:
        write_bytes(request.timing_cache, bytes(timings.serialize()))
    return memoryview(plan)


def _timings(config: tensorrt.IBuilderConfig, path: Path) -> tensorrt.ITimingCache:
    """Gives the builder the timings of earlier builds; those of another GPU or version it leaves aside."""
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(timings, ignore_mismatch=False):
        log.warning("%s is of another GPU or TensorRT; it is written anew", path)
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _network_flags(trt: Any) -> int:
    """STRONGLY_TYPED is needed on TensorRT 10, and ignored where it is the only way."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_targets(trt: Any, config: Any, sms: tuple[int, ...]) -> None:
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], index):
            raise EngineBuildError(f"TensorRT-RTX {trt.__version__} refused the target SM {sm}")


def _reasons(request: PlanRequest, errors: list[tensorrt.ParserError]) -> str:
    """Node, operator and reason of each error."""
    found = list(dict.fromkeys(_parser_error(request, error) for error in errors)) or ["it gave no reason"]
    more = f"; and {len(found) - _MOST_REASONS} more" if len(found) > _MOST_REASONS else ""
    return "; ".join(found[:_MOST_REASONS]) + more


def _parser_error(request: PlanRequest, error: tensorrt.ParserError) -> str:
    reason = " ".join(str(error.desc()).split())
    for text, meaning in _HINTS:
        if text in reason:
            reason = f"{meaning.format(flavor=request.flavor.name)} ({reason})"
    if not hasattr(error, "node_operator"):  # the first releases of TensorRT 10
        return f"node {error.node()}: {reason}"
    name, operator = error.node_name(), error.node_operator()
    if not (name or operator):
        return reason
    return f"node {name!r} ({operator}): {reason}" if name else f"node {error.node()} ({operator}): {reason}"


def _refusal(request: PlanRequest, logger: Any) -> str:
    reason = "; ".join(logger.errors) or "it gave no reason"
    asked = re.search(r"OutOfMemory.*?(\d+) bytes", reason)
    if asked and request.options.workspace_mib:
        needed = -(-int(asked[1]) // (1 << 20))
        reason += (
            f". The workspace of {request.options.workspace_mib} MiB is too small: try --workspace-mib {needed} or more"
        )
    return reason
