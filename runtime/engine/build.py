"""`build`: ONNX file → engine and sidecar, by one code path over every TensorRT.

Precision is in the graph, never in a builder flag: the network is strongly typed, so an
FP16 graph becomes an FP16 engine on TensorRT 10, TensorRT 11 and TensorRT-RTX alike, or
the build fails.
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
from runtime.engine.flavors import Flavor, check_targets, choose_flavor, native_logger
from runtime.engine.int8 import LayerReport, int8_layers, warn_of_floats, warn_of_padding, warn_of_size
from runtime.engine.layers import inspected_layers, layers_of_log
from runtime.engine.options import BuildOptions, check_options, flag_names
from runtime.engine.plan import PlanRequest, make_plan
from runtime.engine.progress import BuildProgress, ProgressCallback, run_interruptibly
from runtime.engine.sidecar import EngineInfo, put_engine
from runtime.errors import ConfigError, ModelFileError
from runtime.graph.read import read_onnx, sha256_onnx
from runtime.graph.summary import OnnxSummary, summarize
from runtime.graph.validation import check_volumes
from runtime.sizes import ImageSizes
from runtime.system.files import output_dir, write_bytes
from runtime.system.gpu import find_gpu

__all__ = ["build"]

log = logging.getLogger(__name__)

_LEAST_SHARE = 0.5
"""An engine may carry the name of a precision that holds at least this share of weights."""
_MOST_ELEMENTS = 2**31 - 1
"""Of a tensor, as TensorRT has it."""
_DEFAULTS = BuildOptions()
_ONE_BUILD = threading.Lock()
"""A process has one native logger, which collects the errors and layers of one build."""


def build(
    onnx: str | PathLike[str],
    engine: str | PathLike[str] | None = None,
    *,
    precision: str | None = None,
    batch: tuple[int, int, int] = (1, 8, 32),
    sizes: ImageSizes | None = None,
    sm: Sequence[int] = (),
    flavor: str = "auto",
    timing_cache: Path | None = None,
    options: BuildOptions = _DEFAULTS,
    cache: bool = False,
    progress: ProgressCallback | None = None,
) -> EngineInfo:
    """Builds an engine from an ONNX classifier.

    Ctrl-C stops it at the builder's next step; engine and sidecar are then as they were.

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
        flavor: `tensorrt`, `tensorrt_rtx`, or `auto`: full TensorRT where it and a GPU
            are there, else TensorRT-RTX.
        timing_cache: full TensorRT's kernel timings, used where the file is there and written
            after the build; TensorRT-RTX has none.
        options: workspace, compatibility, refitting.
        cache: take the engine from the cache where the same one was built before, and keep it there; the folder
            `engines` below `ADVPROP_CACHE` or `~/.cache/advprop`, of at most `ADVPROP_CACHE_GB` (10). Neither the
            builder nor its timing cache is used then.
        progress: called with what the builder does and the share done, 0 to 1; not from the calling thread. What it
            raises stops the build and is raised here.

    Returns:
        What was built, as the sidecar says it.

    Raises:
        BackendUnavailable: no builder is installed.
        ConfigError: impossible batch sizes, or an `sm` or option the builder does not have.
        EngineBuildError: the builder refused the graph; the message has node, operator and reason.
        ModelFileError: not an ONNX classifier, one that claims what no builder can hold, or of another precision
            than asked for.
        OutputError: the engine's folder cannot be written.
    """
    source = Path(onnx)
    target = Path(engine) if engine is not None else source.with_suffix(".engine")
    if target.is_dir() or target.resolve() == source.resolve() or target.suffix not in (".engine", ".plan"):
        raise ConfigError(f"the engine is a file of its own, NAME.engine or NAME.plan; found {target}")
    summary = summarize(source)
    _check_precision(source, summary, precision)
    profile = _profile(summary, batch, sizes)
    if math.prod(profile["max"]) > _MOST_ELEMENTS:
        raise ConfigError(f"the largest input, {profile['max']}, has more than {_MOST_ELEMENTS:,} elements")
    chosen = choose_flavor(flavor, tuple(sm))
    check_targets(chosen, tuple(sm))
    check_options(chosen, options, quantized=_is_quantized(summary))
    output_dir(target.parent)
    if timing_cache is not None:
        output_dir(timing_cache.parent)
    _warn_where_it_will_not_run(chosen, tuple(sm))
    log.info("building %s with %s %s", target.name, chosen.name, chosen.version)
    if timing_cache is not None and chosen.name != "tensorrt":
        log.warning("%s times no kernels when it builds: --timing-cache has no effect", chosen.name)
        timing_cache = None
    wanted = EngineInfo(
        plan_sha256="",
        onnx_sha256=summary.sha256,
        flavor=chosen.name,
        version=chosen.version,
        compute_capabilities=_capabilities(chosen, tuple(sm)),
        gpu=_gpu_name(chosen),
        profiles=({summary.input_name: profile},),
        flags=flag_names(chosen.module, options),
        precision=summary.precision,
        precision_shares=summary.shares,
        calibration_sha256=summary.calibration_sha256,
        spec=summary.spec,
    )
    request = PlanRequest(
        flavor=chosen,
        source=source,
        input_name=summary.input_name,
        profile=profile,
        sms=tuple(sm),
        options=options,
        timing_cache=timing_cache,
    )
    info = _obtain(request, wanted, summary, target, EngineCache.default() if cache else None, progress)
    if info.layers:
        warn_of_floats(info.layers)
        warn_of_padding(info.layers)
        warn_of_size(target.stat().st_size, sum(summary.weights.values()))
    return info


def _obtain(
    request: PlanRequest,
    wanted: EngineInfo,
    summary: OnnxSummary,
    target: Path,
    cache: EngineCache | None,
    progress: ProgressCallback | None,
) -> EngineInfo:
    """Takes the engine from the cache, or builds it and keeps it there; either way it is written to `target`."""
    with cache.claim(engine_key(wanted)) if cache is not None else nullcontext():
        found = cache.fetch(wanted, target) if cache is not None else None
        if found is not None:
            log.info("the same engine was built before; taken from the cache")
            return found
        source = request.source
        check_volumes(read_onnx(source), source)
        state = BuildProgress(progress)
        with _ONE_BUILD:
            plan = run_interruptibly(lambda: make_plan(request, state), state)
            layers = _report(request, summary, plan)
        if sha256_onnx(source) != summary.sha256:
            raise ModelFileError(f"{source} was changed while its engine was built; build again")
        info = dataclasses.replace(wanted, plan_sha256=hashlib.sha256(plan).hexdigest(), layers=layers)
        put_engine(target, info, lambda: write_bytes(target, plan))
        if cache is not None:
            cache.store(info, target)
        return info


def _warn_where_it_will_not_run(flavor: Flavor, sms: tuple[int, ...]) -> None:
    """TensorRT-RTX leaves out some GPUs; say so when the one at hand is among them."""
    gpu = find_gpu()
    if gpu is None or flavor.name != "tensorrt_rtx" or sms:
        return
    here = gpu.sm
    if f"SM{here}" not in flavor.module.ComputeCapability.__members__:
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
    if len(summary.input_shape) != 4 or 0 in summary.input_shape:
        raise ModelFileError(
            f"the input {summary.input_name} has the shape {list(summary.input_shape)}, expected images: four sizes, "
            "none of them 0"
        )
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


def _is_quantized(summary: OnnxSummary) -> bool:
    return "DequantizeLinear" in summary.ops


def _report(request: PlanRequest, summary: OnnxSummary, plan: memoryview) -> tuple[LayerReport, ...]:
    """What became of the quantized layers."""
    if not _is_quantized(summary):
        return ()
    flavor = request.flavor
    logger = native_logger(flavor)
    if flavor.name == "tensorrt_rtx":
        found = layers_of_log(logger.listing)
    else:
        found = inspected_layers(flavor.module, logger, plan, host_code=request.options.version_compatible)
    if not found:
        log.info("%s %s does not tell what it made of the quantized layers", flavor.name, flavor.version)
        return ()
    return int8_layers(request.source, found, flavor=flavor.name, sms=request.sms)


def _capabilities(flavor: Flavor, sms: tuple[int, ...]) -> tuple[str, ...]:
    gpu = find_gpu()
    if flavor.name == "tensorrt" and gpu:
        return (f"sm_{gpu.sm}",)
    return tuple(f"sm_{sm}" for sm in sms) or ("default",)


def _gpu_name(flavor: Flavor) -> str:
    gpu = find_gpu()
    return gpu.name if flavor.name == "tensorrt" and gpu else ""
