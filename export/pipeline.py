"""`export_checkpoint`: checkpoint → ONNX → FP16 ONNX → engine, verified at each stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from calib.collect import collect_amax
from export.precision import Decision, to_fp16
from export.rounding import with_fp16_roundings
from export.source import Source, load_source
from export.to_onnx import INPUT, OUTPUT, save_onnx, to_onnx
from export.verify import FP16_TOLERANCE, FP32_TOLERANCE, Parity, compare, require
from runtime.engine.build import build
from runtime.engine.flavours import check_targets, choose_flavour
from runtime.engine.sidecar import EngineInfo
from runtime.errors import BackendUnavailable, ConfigError, DataError
from runtime.files import output_dir
from runtime.images import normalise
from runtime.session import load

__all__ = ["ExportResult", "export_checkpoint"]

log = logging.getLogger(__name__)

_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What an export wrote."""

    onnx: Path
    """The FP32 ONNX file."""
    onnx_parity: Parity
    """Checkpoint against FP32 ONNX."""
    fp16_onnx: Path | None = None
    """The FP16 ONNX file, where asked for."""
    fp16_parity: Parity | None = None
    """FP32 ONNX against FP16 ONNX, every FP16 tensor rounded as a GPU would."""
    kept_fp32: tuple[Decision, ...] = ()
    """Nodes of the FP16 file that stay in FP32."""
    engine: Path | None = None
    """The engine, where asked for."""
    engine_info: EngineInfo | None = None
    """Its sidecar."""


def export_checkpoint(
    checkpoint: Path,
    *,
    out: Path | None = None,
    precision: str = "fp32",
    engine: bool = False,
    batch: tuple[int, int, int] = (1, 8, 32),
    sm: Sequence[int] = (),
    flavour: str = "auto",
    arch: str | None = None,
    data: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Exports a checkpoint as `model.onnx`, `model.fp16.onnx`, `model.fp16.engine` (+ `.json`).

    Args:
        checkpoint: one of ours, or a plain timm state dict together with `arch`.
        out: folder of the results; default: the checkpoint's.
        precision: `fp32` or `fp16`: the last ONNX file to make, and the engine's.
        engine: build an engine too.
        batch: smallest, most usual and largest batch size of the engine.
        sm: compute capabilities to build for; see `runtime.build`.
        flavour: engine builder; see `runtime.build`.
        arch: timm's name of the architecture, for a plain state dict.
        data: folder of real images to verify on, instead of the checkpoint's sample.
        progress: called with the name of each stage as it starts.

    Raises:
        AdvPropError: see `load_source`, `to_onnx`, `runtime.build`.
        DataError: there are no real images to verify on.
        VerificationError: a stage does not agree with the one before; files are kept.
    """
    if precision not in ("fp32", "fp16"):
        raise ConfigError(f"precision must be fp32 or fp16; found {precision!r}")
    progress = progress or log.debug
    if engine:
        _check_wishes(flavour, tuple(sm))
    progress("reading the checkpoint")
    source = load_source(checkpoint, arch, data)
    folder = output_dir(out if out is not None else checkpoint.parent)
    if not len(source.images_NHWC):
        raise DataError(f"{checkpoint} carries no images to verify the export on; give some: --data DIR")
    progress("tracing and folding")
    model = to_onnx(source.model, source.spec)
    onnx_path = folder / "model.onnx"
    save_onnx(model, onnx_path)
    progress(f"verifying on {len(source.images_NHWC)} images")
    reference_NK = _torch_logits(source)
    logits_NK = _onnx_logits(onnx_path, source)
    onnx_parity = compare(reference_NK, logits_NK)
    require(onnx_parity, FP32_TOLERANCE, str(onnx_path), "the checkpoint")
    engine_source, fp16_path, fp16_parity = onnx_path, None, None
    decisions: list[Decision] = []
    if precision == "fp16":
        progress("measuring ranges, converting to FP16")
        half, decisions = to_fp16(model, collect_amax(model, _batches(source)))
        engine_source = fp16_path = folder / "model.fp16.onnx"
        save_onnx(half, fp16_path)
        fp16_parity = compare(logits_NK, _rounded_logits(half, source))
        require(fp16_parity, FP16_TOLERANCE, str(fp16_path), onnx_path.name)
    engine_path, info = None, None
    if engine:
        progress("building the engine")
        engine_path = folder / f"model.{precision}.engine"
        info = build(engine_source, engine_path, precision=precision, batch=batch, sm=sm, flavour=flavour)
    _warn_of_leftovers(folder, [fp16_path, engine_path])
    return ExportResult(
        onnx=onnx_path,
        onnx_parity=onnx_parity,
        fp16_onnx=fp16_path,
        fp16_parity=fp16_parity,
        kept_fp32=tuple(decisions),
        engine=engine_path,
        engine_info=info,
    )


def _check_wishes(flavour: str, sm: tuple[int, ...]) -> None:
    """Refuses impossible targets before the work; a missing builder is told after the ONNX files."""
    try:
        check_targets(choose_flavour(flavour, sm), sm)
    except BackendUnavailable:
        log.debug("no engine builder here")


def _warn_of_leftovers(folder: Path, written: Sequence[Path | None]) -> None:
    for name in ("model.fp16.onnx", "model.fp16.engine", "model.fp32.engine"):
        if (folder / name).exists() and folder / name not in written:
            log.warning("%s is of an earlier export, not of this checkpoint", folder / name)


def _batches(source: Source) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(source.images_NHWC), _BATCH):
        yield normalise(source.images_NHWC[start : start + _BATCH], source.spec.preprocessing)


@torch.no_grad()
def _torch_logits(source: Source) -> NDArray[np.float32]:
    return np.concatenate([source.model(torch.from_numpy(batch)).numpy() for batch in _batches(source)])


def _rounded_logits(half: onnx.ModelProto, source: Source) -> NDArray[np.float32]:
    """Logits of an FP16 graph with every FP16 rounding done, which ONNX Runtime leaves out on a CPU."""
    session = ort.InferenceSession(with_fp16_roundings(half).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in _batches(source)])


def _onnx_logits(path: Path, source: Source) -> NDArray[np.float32]:
    with load(path, device="cpu") as session:
        return np.concatenate([session.run(batch) for batch in _batches(source)])
