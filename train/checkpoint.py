"""Checkpoints: one atomic file that a run resumes from and the exporter reads.

Format `advprop.checkpoint/1`, a dict of plain values and tensors that
`torch.load(weights_only=True)` reads:

    format, arch, model_kwargs, recipe (name), spec (ModelSpec as JSON), state_dict,
    ema_state_dict | None, optimizer, scheduler, scaler | None, epoch (finished epochs),
    batch (finished batches of the epoch after), step (updates), rng, metrics, versions,
    config (TrainConfig as JSON), sample (uint8 NHWC validation images and their labels)

Untrusted files stay untrusted: nothing is ever unpickled beyond tensors and plain values.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.errors import CheckpointError, OutputError
from runtime.system.files import atomic_write

__all__ = ["FORMAT", "load_checkpoint", "read_torch_file", "rng_kept", "rng_state", "save_checkpoint", "set_rng_state"]

FORMAT = "advprop.checkpoint/1"
_NEEDED = ("arch", "model_kwargs", "recipe", "spec", "state_dict", "epoch", "step", "sample")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as a checkpoint: to a temporary file, fsynced, renamed.

    Raises:
        OutputError: the place cannot be written; a checkpoint that was there stays whole.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        except RuntimeError as error:  # torch's zip writer hides the OSError of a full disk
            raise OutputError(f"cannot write {path}: {error}; is the disk full?") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one of our checkpoints onto the CPU.

    Raises:
        CheckpointError: not a file, truncated, holding pickled code, or not ours; the
            message says what was found.
    """
    return check_checkpoint(read_torch_file(path), path)


def check_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    """Returns `content`, read from `path`, if it is one of our checkpoints.

    Raises:
        CheckpointError: it is something else; the message says what.
    """
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path} is not an advprop checkpoint: {describe(content)}; expected format {FORMAT!r}")
    missing = [key for key in _NEEDED if key not in content]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; train again, or use another checkpoint")
    checkpoint: dict[str, Any] = content
    return checkpoint


def read_torch_file(path: Path) -> Any:
    """Reads what `torch.save` wrote, refusing anything but tensors and plain values.

    Raises:
        CheckpointError: no such file, not a torch file, truncated, or holding pickled code.
    """
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty (0 bytes); the copy or download did not finish")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: refused or read, the outcome says all
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle stream raises nearly anything
        if "Unsupported " in str(error) or "Trying to " in str(error):  # global, class or operand
            raise CheckpointError(
                f"{path} holds pickled Python objects, which could run code when loaded; refused, nothing was "
                f"executed ({_refused(error)}). If you trust its author, save its plain state_dict again"
            ) from error
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path} is a TorchScript archive; expected a checkpoint or a state_dict") from error
        kind = "is truncated or damaged" if head[:2] == b"PK" else "is not a torch file, or is damaged"
        raise CheckpointError(f"{path} {kind} ({type(error).__name__}); copy or download it again") from error


def describe(content: Any) -> str:
    """Says in a few words what a torch file holds."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"it is a plain state_dict of {len(content)} tensors (give its architecture with --arch)"
    keys = ", ".join(sorted(str(key) for key in content)[:6])
    return f"it is a dict with {keys or 'no keys'}"


def rng_state() -> dict[str, Any]:
    """Returns the state of every random generator that training draws from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts `rng_state`'s result back."""
    random.setstate(_as_tuple(state["python"]))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def rng_kept() -> Iterator[None]:
    """What runs within leaves the generators as they were: a library that draws at its first
    import must not make a resumed run another one."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _refused(error: Exception) -> str:
    """The line of torch's long message that says what was refused."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if "Unsupported " in line or "Trying to " in line]
    return told[0].removeprefix("WeightsUnpickler error: ")[:160]
