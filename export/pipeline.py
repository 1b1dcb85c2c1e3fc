"""`export_checkpoint`: checkpoint → ONNX → FP16 ONNX → engine, verified at each stage."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from calib.collect import collect
from export.io_forms import with_forms
from export.precision import LIMIT, Decision, to_fp16
from export.rounding import with_fp16_roundings
from export.source import Source, load_source
from export.to_onnx import INPUT, OUTPUT, save_onnx, to_onnx
from export.verify import FP16_TOLERANCE, FP32_TOLERANCE, Parity, compare, require
from runtime.engine.build import build
from runtime.engine.flavours import check_targets, choose_flavour
from runtime.engine.sidecar import EngineInfo
from runtime.errors import BackendUnavailable, ConfigError, DataError, VerificationError
from runtime.files import output_dir, write_text
from runtime.images import network_input, normalise
from runtime.session import load, softmax
from train.recipes import MAIN

__all__ = ["ExportResult", "default_folder", "export_checkpoint"]

log = logging.getLogger(__name__)

_BATCH = 32
_FEW = 8
"""Images that show whether a file is the network that was verified on all of them."""


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
    checkpoint: str | Path,
    *,
    out: Path | None = None,
    precision: str = "fp32",
    engine: bool = False,
    batch: tuple[int, int, int] = (1, 8, 32),
    sm: Sequence[int] = (),
    flavour: str = "auto",
    arch: str | None = None,
    weights: Path | None = None,
    bn: str = MAIN,
    ema: bool = True,
    data: Path | None = None,
    input_form: str = "float32 NCHW",
    output_form: str = "logits",
    progress: Callable[[str], None] | None = None,
) -> ExportResult:
    """Exports a checkpoint as `model.onnx`, `model.fp16.onnx`, `model.fp16.engine` (+ `.json`).

    Args:
        checkpoint: one of ours, a plain timm state dict together with `arch`, or `timm:NAME`.
        out: folder of the results; default: the checkpoint's, or NAME.
        precision: `fp32` or `fp16`: the last ONNX file to make, and the engine's.
        engine: build an engine too.
        batch: smallest, most usual and largest batch size of the engine.
        sm: compute capabilities to build for; see `runtime.build`.
        flavour: engine builder; see `runtime.build`.
        arch: timm's name of the architecture, for a plain state dict.
        weights: a file of the weights of `timm:NAME`; see `load_source`.
        bn: the BatchNorm route to export.
        ema: prefer the moving average of the weights.
        data: folder of real images to verify on, instead of the checkpoint's sample.
        input_form: what the files take, one of `runtime.spec.INPUT_FORMS`.
        output_form: what they give, one of `runtime.spec.OUTPUT_FORMS`.
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
    source = load_source(checkpoint, arch, weights=weights, bn=bn, ema=ema, data=data)
    folder = output_dir(out if out is not None else default_folder(checkpoint))
    if not len(source.images_NHWC):
        raise DataError(f"{checkpoint} carries no images to verify the export on; give some: --data DIR")
    progress("tracing and folding")
    spec = dataclasses.replace(source.spec, input_form=input_form, output_form=output_form)
    model = to_onnx(source.model, source.spec)
    onnx_path = folder / "model.onnx"
    save_onnx(with_forms(model, spec), onnx_path)
    progress(f"verifying on {len(source.images_NHWC)} images")
    # One pass for both: what FP16 needs to know, and the logits.
    ranges, logits_NK = collect(model, _batches(source)) if precision == "fp16" else ({}, _logits(model, source))
    onnx_parity = compare(_torch_logits(source), logits_NK)
    require(onnx_parity, FP32_TOLERANCE, str(onnx_path), "the checkpoint")
    _check_file(onnx_path, source, logits_NK[:_FEW])
    engine_source, fp16_path, fp16_parity = onnx_path, None, None
    decisions: list[Decision] = []
    if precision == "fp16":
        progress("converting to FP16")
        half, decisions = to_fp16(model, ranges)
        engine_source = fp16_path = folder / "model.fp16.onnx"
        save_onnx(with_forms(half, spec), fp16_path)
        _save_decisions(folder / "model.fp16.json", decisions, ranges, len(source.images_NHWC))
        fp16_parity = compare(logits_NK, _logits(with_fp16_roundings(half), source))
        require(fp16_parity, FP16_TOLERANCE, str(fp16_path), onnx_path.name)
        few = dataclasses.replace(source, images_NHWC=source.images_NHWC[:_FEW])
        _check_file(fp16_path, source, _logits(half, few))
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


def _save_decisions(path: Path, decisions: Sequence[Decision], amax: dict[str, float], images: int) -> None:
    """Writes which nodes stay in FP32 and why, and every measured range, the largest first."""
    content = {
        "format": "advprop.fp16/1",
        "images": images,
        "limit": LIMIT,
        "kept_fp32": [dataclasses.asdict(decision) for decision in decisions],
        "amax": {name: amax[name] for name in sorted(amax, key=lambda name: -amax[name])},
    }
    # A range that is not finite is written as JSON has no word for it: NaN, Infinity.
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def default_folder(checkpoint: str | Path) -> Path:
    """Where files go unless told otherwise: beside the checkpoint, or in a folder of timm's name."""
    name = str(checkpoint)
    return Path(name.removeprefix("timm:")) if name.startswith("timm:") else Path(checkpoint).parent


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


def _fitted(source: Source) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(source.images_NHWC), _BATCH):
        yield source.images_NHWC[start : start + _BATCH]


def _batches(source: Source) -> Iterator[NDArray[np.float32]]:
    for images_NHWC in _fitted(source):
        yield normalise(images_NHWC, source.spec.preprocessing)


@torch.no_grad()
def _torch_logits(source: Source) -> NDArray[np.float32]:
    return np.concatenate([source.model(torch.from_numpy(batch)).numpy() for batch in _batches(source)])


def _logits(model: onnx.ModelProto, source: Source) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in _batches(source)])


def _check_file(path: Path, source: Source, logits_NK: NDArray[np.float32]) -> None:
    """Runs the file that was written, as a user would, against its network's logits of the first N images."""
    with load(path, device="cpu") as session:
        spec = session.spec
        images_NHWC = source.images_NHWC[: len(logits_NK)]
        answers_NK = session.run(network_input(images_NHWC, spec.preprocessing, spec.input_form))
    expected_NK = softmax(logits_NK) if spec.output_form == "probs" else logits_NK
    difference = float(np.abs(answers_NK - expected_NK).max())
    if not difference <= FP32_TOLERANCE * max(1.0, float(np.abs(expected_NK).max())):
        raise VerificationError(
            f"{path} gives other {spec.output_form} than its network: max |Δ| {difference:.3g}. All files were kept"
        )
