"""`build`: build an engine and its sidecar from an ONNX file.

The graph defines the precision, not a builder flag: the network is strongly typed. An FP16 graph
becomes an FP16 engine on TensorRT 10, TensorRT 11 and TensorRT-RTX alike, or the build fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path

from runtime.engine.cache import EngineCache, engine_key
from runtime.engine.flavors import Flavor, native_logger
from runtime.engine.int8 import LayerReport, int8_layers, warn_about_floats, warn_about_padding, warn_about_size
from runtime.engine.layers import inspected_layers, layers_of_log
from runtime.engine.options import BuildOptions, choose_builder, flag_names
from runtime.engine.plan import PlanRequest, make_plan
from runtime.engine.progress import BuildProgress, ProgressCallback, run_interruptibly
from runtime.engine.sidecar import EngineInfo, put_engine
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.read import read_onnx, sha256_onnx
from runtime.graph.summary import OnnxSummary, summarize
from runtime.graph.validation import check_volumes
from runtime.spec import ImageSizes
from runtime.system.files import output_dir, write_bytes
from runtime.system.gpu import find_gpu

__all__ = ["build"]

log = logging.getLogger(__name__)

_MIN_SHARE = 0.5
"""Minimum share of the weights with a precision in an engine that is built for that precision."""
_MAX_ELEMENTS = 2**31 - 1
"""TensorRT's limit for the elements of a tensor."""
_DEFAULTS = BuildOptions()
_BUILD_LOCK = threading.Lock()
"""A process has one native logger, which collects the errors and layers of one build at a time."""


def build(
    onnx: str | PathLike[str],
    engine: str | PathLike[str] | None = None,
    *,
    batch: tuple[int, int, int] = (1, 8, 32),
    sm: Sequence[int] = (),
    flavor: str = "auto",
    options: BuildOptions = _DEFAULTS,
    cache: bool = False,
    progress: ProgressCallback | None = None,
) -> EngineInfo:
    """Build an engine from an ONNX classifier.

    Ctrl-C stops the build at the builder's next step. Existing files then stay unchanged.

    Args:
        onnx: the ONNX file; the types of its tensors define the engine's precision.
        engine: path of the engine (default: the ONNX file's name with `.engine`). The sidecar
            `NAME.engine.json` is written next to it.
        batch: smallest, optimal and largest batch size of the engine.
        sm: target compute capabilities, e.g. (86, 89). TensorRT-RTX supports several; full TensorRT
            builds only for the GPU of this machine.
        flavor: `tensorrt`, `tensorrt_rtx`, or `auto`: full TensorRT if it and a GPU are available,
            otherwise TensorRT-RTX.
        options: all other settings.
        cache: use the engine cache, and add the engine to it. The cache is the folder `engines`
            in `ADVPROP_CACHE` or `~/.cache/advprop`, with at most `ADVPROP_CACHE_GB` gigabytes
            (default: 10). If it contains the engine, no builder runs.
        progress: called with the builder's current phase and the completed share, 0 to 1, in
            another thread. An error that it raises stops the build and is raised here.

    Returns:
        The contents of the sidecar.

    Raises:
        BackendUnavailable: no builder is installed.
        ConfigError: the batch sizes are invalid, or the builder does not support an `sm` or option.
        EngineBuildError: the builder rejected the graph; the message has node, operator and reason.
        ModelFileError: the file is not an ONNX classifier, declares sizes that no builder supports,
            or has another precision than requested.
        OutputError: the engine's folder cannot be written.
    """
    source, sms = Path(onnx), tuple(sm)
    target = _target(source, engine)
    summary = summarize(source)
    _check_precision(source, summary, options.precision)
    profile = _profile(summary, batch, options.image_sizes)
    chosen = choose_builder(flavor, sms, options, quantized=_is_quantized(summary))
    options = _prepare_folders(target, chosen, options)
    _warn_if_not_runnable(chosen, sms)
    log.info("building %s with %s %s", target.name, chosen.name, chosen.version)
    request = PlanRequest(
        flavor=chosen, source=source, input_name=summary.input_name, profile=profile, sms=sms, options=options
    )
    info = _fetch_or_build(request, summary, target, EngineCache.default() if cache else None, progress)
    if info.layers:
        warn_about_floats(info.layers)
        warn_about_padding(info.layers)
        warn_about_size(target.stat().st_size, sum(summary.weights.values()))
    return info


def _target(source: Path, engine: str | PathLike[str] | None) -> Path:
    target = Path(engine) if engine is not None else source.with_suffix(".engine")
    if target.is_dir() or target.resolve() == source.resolve() or target.suffix not in (".engine", ".plan"):
        raise ConfigError(f"the engine must be a new file NAME.engine or NAME.plan; found {target}")
    return target


def _prepare_folders(target: Path, flavor: Flavor, options: BuildOptions) -> BuildOptions:
    """Create the output folders. Return the options, without a timing cache if it has no effect."""
    output_dir(target.parent)
    if options.timing_cache is None:
        return options
    output_dir(options.timing_cache.parent)
    if flavor.name == "tensorrt":
        return options
    log.warning("%s does not time kernels during the build: --timing-cache has no effect", flavor.name)
    return dataclasses.replace(options, timing_cache=None)


def _fetch_or_build(
    request: PlanRequest,
    summary: OnnxSummary,
    target: Path,
    cache: EngineCache | None,
    progress: ProgressCallback | None,
) -> EngineInfo:
    """Write the engine to `target`: copy it from the cache, or build it and add it to the cache."""
    requested = _requested_engine(request, summary)
    with cache.lock(engine_key(requested)) if cache is not None else nullcontext():
        found = cache.fetch(requested, target) if cache is not None else None
        if found is not None:
            log.info("using the cached engine of an earlier build")
            return found
        source = request.source
        check_volumes(read_onnx(source), source)
        state = BuildProgress(progress)
        with _BUILD_LOCK:
            plan = run_interruptibly(lambda: make_plan(request, state), state)
            layers = _layer_reports(request, summary, plan)
        if sha256_onnx(source) != summary.sha256:
            raise ModelFileError(f"{source} changed while its engine was built", fix="build it again")
        info = dataclasses.replace(requested, plan_sha256=hashlib.sha256(plan).hexdigest(), layers=layers)
        put_engine(target, info, lambda: write_bytes(target, plan))
        if cache is not None:
            cache.store(info, target)
        return info


def _requested_engine(request: PlanRequest, summary: OnnxSummary) -> EngineInfo:
    """Return the sidecar of the engine to build, without the plan's hash and the layers."""
    return EngineInfo(
        plan_sha256="",
        onnx_sha256=summary.sha256,
        flavor=request.flavor.name,
        version=request.flavor.version,
        compute_capabilities=_capabilities(request.flavor, request.sms),
        gpu=_gpu_name(request.flavor),
        profiles=({summary.input_name: request.profile},),
        flags=flag_names(request.flavor.module, request.options),
        precision=summary.precision,
        precision_shares=summary.shares,
        calibration_sha256=summary.calibration_sha256,
        spec=summary.spec,
    )


def _warn_if_not_runnable(flavor: Flavor, sms: tuple[int, ...]) -> None:
    """Warn if TensorRT-RTX's default targets do not include this machine's GPU."""
    gpu = find_gpu()
    if gpu is None or flavor.name != "tensorrt_rtx" or sms:
        return
    if f"SM{gpu.sm}" not in flavor.module.ComputeCapability.__members__:
        log.warning(
            "this engine will not run on this machine's GPU, %s (SM %d), which TensorRT-RTX does not support; install "
            "full TensorRT: pip install tensorrt cuda-bindings",
            gpu.name,
            gpu.sm,
        )
    elif gpu.sm < 80:
        log.warning(
            "this engine will not run on this machine's GPU, %s (SM %d), which is not a default target; add --sm %d",
            gpu.name,
            gpu.sm,
            gpu.sm,
        )


def _check_precision(source: Path, summary: OnnxSummary, precision: str | None) -> None:
    if precision is None or summary.share(precision) >= _MIN_SHARE or not summary.weights:
        return
    found = ", ".join(f"{share:.0%} {name}" for name, share in summary.shares.items())
    raise ModelFileError(
        f"an {precision} engine was requested, but the weights of {source} are {found}, and the graph defines an "
        "engine's precision",
        fix=f"make an {precision} graph with advprop-export CHECKPOINT --trt {precision}, which also lists the nodes "
        "that must stay in FP32",
    )


def _profile(summary: OnnxSummary, batch: tuple[int, int, int], sizes: ImageSizes | None) -> dict[str, list[int]]:
    """Return the smallest, optimal and largest shape of the input."""
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise ConfigError(f"batch sizes must be min:opt:max with 1 ≤ min ≤ opt ≤ max; found {batch}")
    _check_input(summary, sizes)
    fixed_batch, *image = summary.input_shape
    counts = (fixed_batch,) * 3 if fixed_batch > 0 else batch
    chosen: tuple[tuple[int, ...], ...] = ((), (), ())
    if sizes is not None:
        chosen = (sizes.smallest, sizes.usual, sizes.largest)
    profile = {}
    for name, count, size in zip(("min", "opt", "max"), counts, chosen, strict=True):
        dynamic = iter(size)
        profile[name] = [count, *(length if length > 0 else next(dynamic) for length in image)]
    if math.prod(profile["max"]) > _MAX_ELEMENTS:
        raise ConfigError(f"the largest input, {profile['max']}, has more than {_MAX_ELEMENTS:,} elements")
    return profile


def _check_input(summary: OnnxSummary, sizes: ImageSizes | None) -> None:
    """Check that the input holds images, and that sizes are given if and only if it needs them."""
    name, shape = summary.input_name, summary.input_shape
    if len(shape) != 4 or 0 in shape:
        raise ModelFileError(
            f"the input {name} has the shape {list(shape)}, expected images: four dimensions, none of them 0"
        )
    image = list(shape[1:])
    dynamic = sum(length < 1 for length in image)
    if sizes is not None and not dynamic:
        raise ConfigError(f"the input {name} has the fixed size {image}", fix="remove --img-size")
    if dynamic and sizes is None:
        raise ModelFileError(
            f"the input {name} has a dynamic size, {image}", fix="set the engine's sizes with --img-size MIN:OPT:MAX"
        )
    if dynamic and dynamic != 2:
        raise ModelFileError(f"the input {name} has the dynamic sizes {image}; expected dynamic height and width")


def _is_quantized(summary: OnnxSummary) -> bool:
    return "DequantizeLinear" in summary.ops


def _layer_reports(request: PlanRequest, summary: OnnxSummary, plan: memoryview) -> tuple[LayerReport, ...]:
    """Return the precision of a quantized graph's layers; () if the builder reports none."""
    if not _is_quantized(summary):
        return ()
    flavor = request.flavor
    logger = native_logger(flavor)
    if flavor.name == "tensorrt_rtx":
        layers = layers_of_log(logger.listing)
    else:
        layers = inspected_layers(flavor.module, logger, plan, host_code=request.options.version_compatible)
    if not layers:
        log.info("%s %s does not report how the quantized layers are computed", flavor.name, flavor.version)
        return ()
    return int8_layers(request.source, layers, flavor=flavor.name, sms=request.sms)


def _capabilities(flavor: Flavor, sms: tuple[int, ...]) -> tuple[str, ...]:
    gpu = find_gpu()
    if flavor.name == "tensorrt" and gpu:
        return (f"sm_{gpu.sm}",)
    return tuple(f"sm_{sm}" for sm in sms) or ("default",)


def _gpu_name(flavor: Flavor) -> str:
    gpu = find_gpu()
    return gpu.name if flavor.name == "tensorrt" and gpu else ""
