"""Write the Hugging Face model card of a checkpoint."""

from __future__ import annotations

import hashlib
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from export.results import Evaluation
from runtime.errors import AdvPropError
from runtime.spec import ModelSpec
from train.checkpoint import FORMAT, read_torch_file
from train.config import TrainConfig
from train.config_file import flatten, to_mapping

__all__ = ["is_unedited", "model_card"]

_MARK = "<!-- Written by advprop-export --hub. Edited cards are kept. sha256:"
_MACHINE = ("out", "device", "resume", "overwrite", "tensorboard", "wandb", "save_every", "log_every", "data.root")
"""Settings of a run that do not affect its weights, or that name a folder."""
_PUBLISHED = ("imagenet-c", "imagenet-a", "imagenet-r", "stylized-imagenet")


def model_card(checkpoint: Path, spec: ModelSpec, evaluations: Sequence[Evaluation]) -> str:
    """Return a card: metadata with a `model-index`, and a text on use, training and results.

    Args:
        checkpoint: the checkpoint, whose settings the card quotes.
        spec: its spec.
        evaluations: results for the card.
    """
    name = f"{spec.arch}-{spec.recipe}" if spec.recipe else spec.arch
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "advprop", *(["robustness"] if spec.recipe != "vanilla" else [])],
        model_name=name,
        eval_results=[figure for each in evaluations for figure in _figures(each)] or None,
    )
    text = "\n".join((f"# {name}", "", *_body(checkpoint, spec, evaluations), ""))
    mark = f"{_MARK}{_digest(text)} -->"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{mark}\n{text}"))


def is_unedited(path: Path) -> bool:
    """Return whether a card may be replaced: it does not exist, or nobody has changed its text."""
    if not path.exists():
        return True
    _, found, tail = path.read_text(encoding="utf-8", errors="replace").partition(_MARK)
    digest, _, text = tail.partition(" -->\n")
    return bool(found) and digest == _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _figures(result: Evaluation) -> Iterator[EvalResult]:
    """Yield the entries of the `model-index`. Accuracies and errors are 0 to 1, mCE in percent."""
    for corrupted, kind, title, value in (
        (False, "accuracy", "top-1 accuracy", result.top1),
        (True, "mean_corruption_error", "mean error over corruptions", result.mean_error),
        (True, "mce", "mCE (AlexNet = 100)", result.mce),
    ):
        if value is not None:
            yield EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                dataset_type=result.suite if result.suite in _PUBLISHED else "imagefolder",
                dataset_name=f"{result.dataset}, corruptions" if corrupted else result.dataset,
                dataset_config="corruptions" if corrupted else None,
                metric_type=kind,
                metric_name=title,
                metric_value=round(value, 4),
            )


def _body(checkpoint: Path, spec: ModelSpec, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    size = spec.preprocessing
    classes = ", ".join(spec.classes[:10]) + (", …" if len(spec.classes) > 10 else "")
    recipe = f" with the recipe `{spec.recipe}` of advprop" if spec.recipe else ""
    data = f" on {spec.dataset}" if spec.dataset else ""
    yield f"`{spec.arch}`, trained{recipe}{data}: {len(spec.classes)} classes ({classes})."
    yield "Only the clean set of BatchNorms is included, so it is a stock timm network."
    yield from ("", "## Use", "", "```python", "import timm", "")
    yield 'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"'
    yield "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    yield from ("```", "")
    yield f"Input: {size.height}×{size.width} pixels, {size.interpolation}, {size.crop_mode} crop {size.crop_pct:g}."
    if size.exif == "upright":
        yield "Photographs were rotated upright in training: apply `PIL.ImageOps.exif_transpose` first."
    yield from _training(checkpoint)
    yield from ("", "## Results", "")
    if evaluations:
        yield from _table(checkpoint, evaluations)
    else:
        yield f"None yet. Measure them with `advprop eval {checkpoint.name} --suite corruptions --data DIR`, then"
        yield "export again."


def _training(checkpoint: Path) -> Iterator[str]:
    content = _content(checkpoint)
    if not isinstance(content.get("config"), str):
        return
    yield from ("", "## Training", "", "```sh", _train_command(tomllib.loads(content["config"])), "```")
    rows = [row for row in content.get("metrics") or () if isinstance(row.get("top1"), float)]
    if rows:
        best = max(rows, key=lambda row: row["top1"])
        yield ""
        yield f"Best validation accuracy during training: {best['top1']:.1%}, in epoch {best['epoch']} of {len(rows)}."


def _content(checkpoint: Path) -> Mapping[str, Any]:
    """Return the content of an advprop checkpoint; {} for other sources."""
    try:
        content = read_torch_file(checkpoint, device="meta")
    except AdvPropError:  # timm:NAME
        return {}
    return content if isinstance(content, Mapping) and content.get("format") == FORMAT else {}


def _train_command(settings: Mapping[str, Any]) -> str:
    """Return the command of a run, without paths of its machine."""
    found, arch = flatten(settings), str(settings.get("arch", "ARCH"))
    defaults = flatten(to_mapping(TrainConfig(arch=arch)))
    words = ["advprop", "train", "--arch", arch, "--recipe", str(found.pop("recipe", "advprop"))]
    if "epochs" in found:
        words += ["--epochs", str(found.pop("epochs"))]
    if "data.root" in found:
        words += ["--data", Path(str(found["data.root"])).name]
    for name, value in found.items():
        if name != "arch" and name not in _MACHINE and defaults.get(name) != value and not _is_path(value):
            words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join(words)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _table(checkpoint: Path, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield "| test set | images | metric | value | 95% interval |"
    yield "|---|--:|---|--:|--:|"
    for each in evaluations:
        name = each.dataset.replace("|", "/")
        for data, metric, value, interval, scale in (
            (name, "top-1 accuracy", each.top1, each.top1_interval, "%"),
            (f"{name}, corruptions", "mean error", each.mean_error, each.mean_error_interval, "%"),
            (f"{name}, corruptions", "mCE (AlexNet = 100)", each.mce, each.mce_interval, ""),
        ):
            if value is not None:
                bounds = f"{_scaled(interval[0], scale)} to {_scaled(interval[1], scale)}" if interval else "unknown"
                yield f"| {data} | {each.images} | {metric} | {_scaled(value, scale)} | {bounds} |"
    yield from ("", "```sh")
    for each in evaluations:
        limit = f" --limit {each.settings['limit']}" if each.settings["limit"] else ""
        command = f"advprop eval {checkpoint.name} --suite {each.suite} --data {shlex.quote(each.dataset)}{limit}"
        yield f"{command} --seed {each.settings['seed']}"
    yield "```"


def _scaled(value: float, scale: str) -> str:
    return f"{100 * value:.1f} %" if scale == "%" else f"{value:.1f}"
