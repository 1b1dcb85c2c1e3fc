"""`build`: ONNX file → engine and sidecar, by one code path over every TensorRT.

Precision is in the graph, never in a builder flag: the network is strongly typed, so an
FP16 graph becomes an FP16 engine on TensorRT 10, TensorRT 11 and TensorRT-RTX alike, or
the build fails.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from runtime.cuda import find_gpu
from runtime.engine.flavours import Flavour, check_targets, choose_flavour, native_logger
from runtime.engine.graph import OnnxSummary, summarise
from runtime.engine.int8 import LayerReport, int8_layers, warn_of_floats, warn_of_padding, warn_of_size
from runtime.engine.layers import inspected_layers, layers_of_log
from runtime.engine.sidecar import EngineInfo, sidecar_path, write_sidecar
from runtime.errors import ConfigError, EngineBuildError, ModelFileError
from runtime.files import output_dir, write_bytes
from runtime.sizes import ImageSizes

__all__ = ["build"]

log = logging.getLogger(__name__)

_LEAST_SHARE = 0.5
"""An engine may carry the name of a precision that holds at least this share of weights."""


def build(
    onnx: str | PathLike[str],
    engine: str | PathLike[str] | None = None,
    *,
    precision: str | None = None,
    batch: tuple[int, int, int] = (1, 8, 32),
    sizes: ImageSizes | None = None,
    sm: Sequence[int] = (),
    flavour: str = "auto",
    timing_cache: Path | None = None,
    workspace_bytes: int = 0,
) -> EngineInfo:
    """Builds an engine from an ONNX classifier.

    Args:
        onnx: the ONNX file; its tensors' types decide the engine's precision.
        engine: where the plan goes; default: the ONNX file's name with `.engine`. The
            sidecar is written beside it, as `NAME.engine.json`.
        precision: where given (`fp32`, `fp16`, `bf16`, `int8`), the graph must have at
            least half its weights in it, or the build is refused before it starts.
        batch: smallest, most usual and largest batch size of the engine.
        sizes: image sizes of the engine, where the ONNX file leaves them open.
        sm: compute capabilities to build for, e.g. (86, 89). TensorRT-RTX takes several;
            full TensorRT builds for the GPU at hand only.
        flavour: `tensorrt`, `tensorrt_rtx`, or `auto`: full TensorRT where it and a GPU
            are there, else TensorRT-RTX.
        timing_cache: full TensorRT's kernel timings, used where the file is there and written
            after the build; TensorRT-RTX has none.
        workspace_bytes: memory the builder may use for scratch; 0 leaves it to the builder.

    Returns:
        What was built, as the sidecar says it.

    Raises:
        BackendUnavailable: no builder is installed.
        ConfigError: impossible batch sizes, or an `sm` the builder does not have.
        EngineBuildError: the builder refused the graph; the message has its reason.
        ModelFileError: not an ONNX classifier, or of another precision than asked for.
        OutputError: the engine's folder cannot be written.
    """
    source = Path(onnx)
    target = Path(engine) if engine is not None else source.with_suffix(".engine")
    if target.is_dir() or target.resolve() == source.resolve() or target.suffix not in (".engine", ".plan"):
        raise ConfigError(f"the engine is a file of its own, NAME.engine or NAME.plan; found {target}")
    summary = summarise(source)
    _check_precision(source, summary, precision)
    profile = _profile(summary, batch, sizes)
    chosen = choose_flavour(flavour, tuple(sm))
    check_targets(chosen, tuple(sm))
    output_dir(target.parent)
    if timing_cache is not None:
        output_dir(timing_cache.parent)
    _warn_where_it_will_not_run(chosen, tuple(sm))
    log.info("building %s with %s %s", target.name, chosen.name, chosen.version)
    if timing_cache is not None and chosen.name != "tensorrt":
        log.warning("%s times no kernels when it builds: --timing-cache has no effect", chosen.name)
        timing_cache = None
    plan, flags = _build_plan(chosen, source, summary, profile, tuple(sm), workspace_bytes, timing_cache)
    layers = _report(chosen, source, summary, plan, tuple(sm)) if _is_quantised(summary) else ()
    info = EngineInfo(
        plan_sha256=_sha256(plan),
        onnx_sha256=summary.sha256,
        flavour=chosen.name,
        version=chosen.version,
        compute_capabilities=_capabilities(chosen, tuple(sm)),
        gpu=_gpu_name(chosen),
        profiles=({summary.input_name: profile},),
        flags=flags,
        precision=summary.precision,
        precision_shares=summary.shares,
        calibration_sha256=summary.calibration_sha256,
        spec=summary.spec,
        layers=layers,
    )
    # A stop between the two writes must not leave an old sidecar beside a new plan.
    sidecar_path(target).unlink(missing_ok=True)
    write_bytes(target, plan)
    write_sidecar(target, info)
    return info


def _warn_where_it_will_not_run(flavour: Flavour, sms: tuple[int, ...]) -> None:
    """TensorRT-RTX leaves out some GPUs; say so when the one at hand is among them."""
    gpu = find_gpu()
    if gpu is None or flavour.name != "tensorrt_rtx" or sms:
        return
    here = gpu.sm
    if f"SM{here}" not in flavour.module.ComputeCapability.__members__:
        log.warning(
            "this engine will not run on the GPU here, %s (SM %d): TensorRT-RTX has no kernels for it; "
            "install full TensorRT: pip install 'advprop[tensorrt]'",
            gpu.name,
            here,
        )
    elif here < 80:
        log.warning(
            "this engine will not run on the GPU here, %s (SM %d), which the default leaves out; add --sm %d",
            gpu.name,
            here,
            here,
        )


def _check_precision(source: Path, summary: OnnxSummary, precision: str | None) -> None:
    if precision is None or summary.share(precision) >= _LEAST_SHARE or not summary.weights:
        return
    found = ", ".join(f"{share:.0%} {name}" for name, share in summary.shares.items())
    raise ModelFileError(
        f"an {precision} engine was asked for, but the weights of {source} are {found}; an engine "
        f"takes its precision from the graph (advprop-export CHECKPOINT --trt {precision} makes one, and lists "
        "the nodes that have to stay in FP32)"
    )


def _profile(summary: OnnxSummary, batch: tuple[int, int, int], sizes: ImageSizes | None) -> dict[str, list[int]]:
    smallest, usual, largest = batch
    if not 1 <= smallest <= usual <= largest:
        raise ConfigError(f"batch sizes are min:opt:max with 1 ≤ min ≤ opt ≤ max; found {batch}")
    fixed_batch, *size = summary.input_shape
    if fixed_batch > 0:
        smallest = usual = largest = fixed_batch
    is_open = any(length < 1 for length in size)
    if sizes is not None and not is_open:
        raise ConfigError(f"the input {summary.input_name} has the fixed size {size}; leave --img-size out")
    if is_open and sizes is None:
        raise ModelFileError(
            f"the input {summary.input_name} leaves its size open, {size}; say which the engine takes: "
            "--img-size MIN:OPT:MAX"
        )

    def shape(count: int, wanted: tuple[int, int] | None) -> list[int]:
        free = iter(wanted or ())
        return [count, *(length if length > 0 else next(free) for length in size)]

    if sizes is None:
        return {"min": shape(smallest, None), "opt": shape(usual, None), "max": shape(largest, None)}
    if sum(length < 1 for length in size) != 2:
        raise ModelFileError(f"the input {summary.input_name} has open sizes {size}; expected height and width")
    return {
        "min": shape(smallest, sizes.smallest),
        "opt": shape(usual, sizes.usual),
        "max": shape(largest, sizes.largest),
    }


def _build_plan(
    flavour: Flavour,
    source: Path,
    summary: OnnxSummary,
    profile: dict[str, list[int]],
    sms: tuple[int, ...],
    workspace_bytes: int,
    timing_cache: Path | None,
) -> tuple[memoryview, tuple[str, ...]]:
    trt = flavour.module
    logger = native_logger(flavour)
    logger.reset()
    builder = trt.Builder(logger)
    network_flags, flags = _network_flags(trt)
    network = builder.create_network(network_flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.read_bytes(), os.fspath(source)):
        reasons = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        raise EngineBuildError(f"{flavour.name} {flavour.version} cannot read {source}: {'; '.join(reasons)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what `_report` reads
    if workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    shapes = builder.create_optimization_profile()
    shapes.set_shape(summary.input_name, profile["min"], profile["opt"], profile["max"])
    config.add_optimization_profile(shapes)
    if sms and flavour.name == "tensorrt_rtx":
        _set_targets(trt, config, sms)
    timings = _timings(config, timing_cache) if timing_cache is not None else None  # must live until it is built
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = "; ".join(logger.errors) or "it gave no reason"
        raise EngineBuildError(f"{flavour.name} {flavour.version} could not build {source}: {reason}")
    if timing_cache is not None and timings is not None:
        write_bytes(timing_cache, bytes(timings.serialize()))
    return memoryview(plan), flags


def _is_quantised(summary: OnnxSummary) -> bool:
    return "DequantizeLinear" in summary.ops


def _report(
    flavour: Flavour, source: Path, summary: OnnxSummary, plan: memoryview, sms: tuple[int, ...]
) -> tuple[LayerReport, ...]:
    """What became of the quantised layers, and a warning where INT8 is not worth it."""
    logger = native_logger(flavour)
    if flavour.name == "tensorrt_rtx":
        found = layers_of_log(logger.listing)
    else:
        found = inspected_layers(flavour.module, logger, plan)
    if not found:
        log.info("%s %s does not tell what it made of the quantised layers", flavour.name, flavour.version)
        return ()
    layers = int8_layers(source, found, flavour=flavour.name, sms=sms)
    warn_of_floats(layers)
    warn_of_padding(layers)
    warn_of_size(plan.nbytes, sum(summary.weights.values()))
    return layers


def _timings(config: Any, path: Path) -> Any:
    """Gives the builder the timings of earlier builds; those of another GPU or version it leaves aside."""
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(timings, ignore_mismatch=False):
        log.warning("%s is of another GPU or TensorRT; it is written anew", path)
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _network_flags(trt: Any) -> tuple[int, tuple[str, ...]]:
    """STRONGLY_TYPED is needed on TensorRT 10, and ignored where it is the only way."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return (0, ()) if flag is None else (1 << int(flag), ("STRONGLY_TYPED",))


def _set_targets(trt: Any, config: Any, sms: tuple[int, ...]) -> None:
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if not config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], index):
            raise EngineBuildError(f"TensorRT-RTX {trt.__version__} refused the target SM {sm}")


def _parser_error(error: Any) -> str:
    node = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    place = f"node {node!r} ({operator}): " if node or operator else ""
    return place + str(error.desc())


def _capabilities(flavour: Flavour, sms: tuple[int, ...]) -> tuple[str, ...]:
    gpu = find_gpu()
    if flavour.name == "tensorrt" and gpu:
        return (f"sm_{gpu.sm}",)
    return tuple(f"sm_{sm}" for sm in sms) or ("default",)


def _gpu_name(flavour: Flavour) -> str:
    gpu = find_gpu()
    return gpu.name if flavour.name == "tensorrt" and gpu else ""


def _sha256(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
