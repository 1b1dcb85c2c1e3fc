"""Read and write checkpoint files, from which runs resume and exports start.

Format `advprop.checkpoint/1`: a dict of plain values and tensors that
`torch.load(weights_only=True)` reads:

    format, arch, model_kwargs, recipe (name), spec (ModelSpec as JSON), state_dict,
    ema_state_dict | None, optimizer, scheduler, scaler | None, epoch (finished epochs),
    batch (finished batches of the current epoch), step (updates), loss_sum, images and seconds
    (of the current epoch), lr (of the last update), train_images (their number), rng (by process),
    metrics, versions, config (TrainConfig as TOML),
    branch_loss_sums, changes (settings that changed on resume), schedule_start (epoch) and
    schedule_offset (updates) of the learning rate schedule,
    sample (uint8 NHWC validation images and their labels)

`best.pt` lacks the keys that only a resumed run needs: optimizer, scheduler, scaler, rng and the sums.
`train.state` writes and restores the content. Checkpoints may be untrusted files, so only tensors,
plain values and `argparse.Namespace`, which timm's train.py stores, are unpickled.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.errors import CheckpointError, OutputError
from runtime.system.files import atomic_write, no_such

__all__ = [
    "FORMAT",
    "check_checkpoint",
    "describe",
    "load_checkpoint",
    "plain_state_dict",
    "read_torch_file",
    "save_checkpoint",
]

log = logging.getLogger(__name__)

FORMAT = "advprop.checkpoint/1"
_MAGIC = (b"PK\x03\x04", b"\x80")
"""First bytes of the files that torch writes: a zip archive, or up to torch 1.5 a pickle."""
_REQUIRED = ("arch", "recipe", "spec", "model_kwargs", "state_dict", "sample", "epoch", "step")
"""Keys of every checkpoint."""
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Keys under which training scripts store the weights, the moving average first."""
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel, torch.compile and training frameworks add to all keys."""


def _are_weights(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_sample(value: object) -> bool:
    images = value.get("images") if isinstance(value, Mapping) else None
    return isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.dim() == 4


def _are_metrics(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(row, dict) for row in value))


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


_VALID: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "arch": (_is(str), "of type str"),
    "recipe": (_is(str), "of type str"),
    "spec": (_is(str), "of type str"),
    "model_kwargs": (_is(dict), "of type dict"),
    "state_dict": (_are_weights, "a dict of tensors"),
    "ema_state_dict": (lambda value: value is None or _are_weights(value), "a dict of tensors, or None"),
    "epoch": (_is(int), "of type int"),
    "step": (_is(int), "of type int"),
    "metrics": (_are_metrics, "a list of dicts, or None"),
    "sample": (_is_sample, "a dict with uint8 images, (N, H, W, C)"),
}
"""Key → whether a value is valid, and what is expected. Keys that only a resumed run reads are not
listed."""


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to a checkpoint file, atomically.

    Raises:
        OutputError: `path` cannot be written; an existing checkpoint is unchanged.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
            raise OutputError(f"cannot write {path}: {error}; is the disk full?") from error


def load_checkpoint(path: Path, *, device: str = "cpu") -> dict[str, Any]:
    """Read an advprop checkpoint.

    Args:
        path: the file.
        device: device for the tensors; `meta` reads shapes only.

    Raises:
        CheckpointError: the file is missing, truncated, holds pickled code or is not an advprop
            checkpoint; the message names what was found.
    """
    return check_checkpoint(read_torch_file(path, device=device), path)


def check_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    """Return `content`, read from `path`, after checking that it is an advprop checkpoint.

    Raises:
        CheckpointError: it is something else; the message names what was found.
    """
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path} is not an advprop checkpoint: {describe(content)}; expected format {FORMAT!r}")
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; train again, or use another checkpoint")
    for key, (is_valid, expected) in _VALID.items():
        if not is_valid(content.get(key)):
            raise CheckpointError(
                f"{path} is damaged: {key} must be {expected}; found {type(content.get(key)).__name__}",
                fix="train again, or use another checkpoint",
            )
    checkpoint: dict[str, Any] = content
    return checkpoint


def read_torch_file(path: Path, *, device: str = "cpu") -> Any:
    """Read a file that torch.save wrote. Reject anything except tensors and plain values.

    Raises:
        CheckpointError: the file is missing, is not a torch file, is truncated or holds pickled
            code.
    """
    if not path.is_file():
        raise CheckpointError(no_such("checkpoint", path))
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes): the copy or download did not finish")
    if not head.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a torch file; expected a checkpoint (.pt) or a state_dict")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; loading either works or raises
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle stream can raise almost any exception
        if "Unsupported " in str(error) or "Trying to " in str(error):  # torch has no exception type for rejected code
            raise CheckpointError(
                f"{path} holds pickled Python objects, which could run code when loaded. It was rejected and nothing "
                f"was executed ({_rejection(error)}). If you trust its author, save its plain state_dict to a new file"
            ) from error
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path} is a TorchScript archive; expected a checkpoint or a state_dict") from error
        raise CheckpointError(
            f"{path} is truncated or damaged ({type(error).__name__}); copy or download it again"
        ) from error


def plain_state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in the content of a torch file, under the keys of the bare network.

    timm's and torch's training scripts nest the weights in a dict. Prefixes of wrapped networks are
    removed from the keys, and logged.

    Raises:
        CheckpointError: there are no weights.
    """
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = {name: value for name, value in content[key].items() if name != "n_averaged"}
            break
    if not (isinstance(content, Mapping) and content and all(torch.is_tensor(value) for value in content.values())):
        raise CheckpointError(f"expected a state dict of weights in {path}: {describe(content)}")
    weights = {str(key): value for key, value in content.items()}
    removed = []
    while prefix := next((each for each in _WRAPPERS if all(key.startswith(each) for key in weights)), ""):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        removed.append(prefix)
    if any("._orig_mod." in key for key in weights):  # single layers were compiled
        weights = {key.replace("._orig_mod.", "."): value for key, value in weights.items()}
        removed.append("._orig_mod")
    if removed:
        log.info("%s: removed %s from the names of the weights", path, ", ".join(removed))
    return weights


def describe(content: Any) -> str:
    """Return a short description of a torch file's content, for error messages."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"it is a plain state_dict of {len(content)} tensors (pass its architecture with --arch)"
    keys = ", ".join(sorted(str(key) for key in content)[:6])
    return f"it is a dict with {keys or 'no keys'}"


def _rejection(error: Exception) -> str:
    """Return the line of torch's long message that names the rejected object."""
    lines = [line.strip() for line in str(error).splitlines()]
    relevant = [line for line in lines if "Unsupported " in line or "Trying to " in line]
    return relevant[0].removeprefix("WeightsUnpickler error: ")[:160]
