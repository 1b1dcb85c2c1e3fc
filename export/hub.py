"""Write a checkpoint as a folder for the Hugging Face Hub, which timm loads.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

from export.config import ExportConfig
from export.model_card import is_unedited, model_card
from export.results import Evaluation, find_results
from export.source import Source, load_source
from export.verify import FEW_IMAGES
from runtime.errors import OutputError, VerificationError
from runtime.preprocessing import normalize
from runtime.spec import ModelSpec
from runtime.system.files import atomic_folder, output_dir

__all__ = ["HubFolder", "export_hub"]

log = logging.getLogger(__name__)

_FOREIGN = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes")
"""Facts in timm's configuration of an architecture that are true for timm's own weights only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFolder:
    """A folder that can be uploaded to the Hugging Face Hub."""

    folder: Path
    """Contains `model.safetensors`, `config.json` and the card, `README.md`."""
    results: tuple[Evaluation, ...]
    """Evaluations in the card."""
    card_kept: bool
    """Whether an edited `README.md` was found, and kept."""


def export_hub(
    checkpoint: str | Path,
    folder: str | Path,
    config: ExportConfig | None = None,
    *,
    results: Sequence[str | Path] = (),
) -> HubFolder:
    """Write `model.safetensors`, `config.json` and a model card, `README.md`.

    The weights are those of the main BatchNorm route, under timm's names and not folded:
    `timm.create_model("local-dir:FOLDER", pretrained=True)` computes the same logits.

    Args:
        checkpoint: as for `export_checkpoint`.
        folder: folder to write. Its other files, and a README.md that a person has edited, stay.
        config: its `arch`, `weights`, `route`, `ema` and `sizes` apply.
        results: result files of `advprop eval`, or folders of them, for the card (default: those
            next to the checkpoint, or in a folder next to it).

    Raises:
        AdvPropError: see `load_source`.
        DataError: none of `results` is a result of this checkpoint.
        VerificationError: timm does not load the same network from the folder; nothing is written.
    """
    config, folder = config or ExportConfig(), Path(folder)
    source = load_source(
        checkpoint,
        config.arch,
        weights=config.weights,
        route=config.route,
        ema=config.ema,
        size=config.sizes.usual if config.sizes else None,
    )
    path = Path(checkpoint)
    evaluations = find_results(path, source.spec, results)
    card = model_card(path, source.spec, evaluations)
    existed = folder.exists()
    output_dir(folder)
    keep = not is_unedited(folder / "README.md")
    try:
        with atomic_folder(folder) as unfinished:
            _write_model(source, unfinished)
            _verify(source, unfinished)
            if not keep:
                (unfinished / "README.md").write_text(card, encoding="utf-8")
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    if keep:
        log.warning("%s was edited and is kept; delete it to write a new card", folder / "README.md")
    return HubFolder(folder=folder, results=evaluations, card_kept=keep)


def _write_model(source: Source, folder: Path) -> None:
    spec, size = source.spec, source.spec.preprocessing
    preprocessing = {
        "input_size": (3, size.height, size.width),
        "interpolation": size.interpolation,
        "mean": size.mean,
        "std": size.std,
        "crop_pct": size.crop_pct,
        "crop_mode": size.crop_mode,
    }
    try:
        save_for_hf(
            source.model,
            str(folder),
            model_config=_labels(spec),
            safe_serialization=True,
            data_config=preprocessing,
        )
    except OSError:
        raise
    except Exception as error:  # safetensors has its own errors, also for a full disk
        raise OutputError(f"cannot write the weights of {spec.arch} as safetensors: {error}") from error
    path = folder / "config.json"
    shutil.copymode(path, folder / "model.safetensors")  # safetensors lets nobody else read its files
    content = json.loads(path.read_text())
    for name in _FOREIGN:
        content["pretrained_cfg"].pop(name, None)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _labels(spec: ModelSpec) -> dict[str, object]:
    """Return the class names as timm stores them: WordNet ids with descriptions if there are ids."""
    if spec.wnids:
        return {
            "label_names": list(spec.wnids),
            "label_descriptions": dict(zip(spec.wnids, spec.classes, strict=True)),
        }
    return {"label_names": list(spec.classes)}


@torch.inference_mode()
def _verify(source: Source, folder: Path) -> None:
    """Check that timm loads a network with the same logits, bit by bit."""
    size = source.spec.preprocessing
    if len(source.images_NHWC):
        images_NCHW = torch.from_numpy(normalize(source.images_NHWC[:FEW_IMAGES], size))
    else:
        images_NCHW = torch.randn(FEW_IMAGES, 3, size.height, size.width, generator=torch.Generator().manual_seed(0))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not torch.equal(loaded(images_NCHW), source.model(images_NCHW)):
        raise VerificationError(
            f"timm's create_model does not load the network of the checkpoint from {folder.parent}; nothing was written"
        )
