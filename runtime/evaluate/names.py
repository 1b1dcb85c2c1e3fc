"""Names of models in tables, file names and pages: the name of the training run, or NAME=FILE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.backends.open import CHECKPOINT_SUFFIXES
from runtime.errors import ConfigError, DataError

__all__ = ["ModelPath", "find_model", "unique_names"]

_RUN_FILES = ("config.toml", "last.pt", "export.json")
"""Files that only the folder of a training run or an export contains."""
_CHECKPOINTS = ("best.pt", "last.pt")
"""Checkpoints of a run, in order of preference."""
_GENERIC = ("best", "last", "model")
"""Names that `train` and `export` give to files of every run."""
_MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPath:
    """A model that a user named."""

    path: Path
    """The file."""
    name: str = ""
    """NAME of NAME=FILE; "" if only the file was passed."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether the file is a checkpoint."""
        return self.path.suffix in CHECKPOINT_SUFFIXES

    def default_name(self, route: str = _MAIN) -> str:
        """Return the model's name: the run's name and whatever distinguishes the file in the run.

        `runs/advprop/best.pt` is `advprop`, `runs/advprop/model.int8.onnx` is `advprop.int8`, and
        files outside of runs keep their names. A route other than the main one is appended.
        """
        kind, _, rest = self.path.stem.partition(".")
        folder = self.path.absolute().parent
        name = self.path.stem
        if self.name:
            name = self.name
        elif kind in _GENERIC and folder.name and any((folder / file).is_file() for file in _RUN_FILES):
            parts = (folder.name, "last" if kind == "last" else "", rest)
            name = ".".join(part for part in parts if part)
        return name if route == _MAIN or not self.is_checkpoint else f"{name}.{route}"


def find_model(text: Path | str) -> ModelPath:
    """Return the model of FILE, RUN or NAME=FILE; a RUN is the folder of a training run.

    Raises:
        ConfigError: the name cannot be part of a file name.
        DataError: the folder contains no checkpoint.
    """
    path, name = Path(text), ""
    before, equals, after = str(text).partition("=")
    if equals and not path.exists():
        path, name = Path(after), before
        if not after or not name or set(name) & set('/\\\0:*?"<>|') or name.startswith("."):
            raise ConfigError(f"expected NAME=FILE, with a NAME that can be part of a file name; found {str(text)!r}")
    if path.is_dir():
        checkpoint = next((path / file for file in _CHECKPOINTS if (path / file).is_file()), None)
        if checkpoint is None:
            raise DataError(
                f"{path} is a folder without a checkpoint (best.pt or last.pt); pass the folder of a training run, or "
                "a model file"
            )
        path = checkpoint
    return ModelPath(path=path, name=name)


def unique_names(models: Sequence[tuple[ModelPath, str]]) -> list[str]:
    """Return a different name for each model.

    Equal names are followed by the file's suffix or by the folder that distinguishes the files.

    Args:
        models: different models, as (path, route).

    Raises:
        ConfigError: two models have the same NAME.
    """
    names = [model.default_name(route) for model, route in models]
    counts = Counter(names)
    for name in [name for name, number in counts.items() if number > 1]:
        places = [place for place, other in enumerate(names) if other == name]
        if sum(bool(models[place][0].name) for place in places) > 1:
            raise ConfigError(f"two models have the name {name}; pass another NAME=FILE")
        extras = _distinctions([models[place][0].path for place in places])
        for place, extra in zip(places, extras, strict=True):
            names[place] = name if models[place][0].name else f"{name}-{extra}"
    return names


def _distinctions(paths: Sequence[Path]) -> list[str]:
    """Return what distinguishes files: their suffix, a folder, or else their number."""
    suffixes = [path.suffix.removeprefix(".") for path in paths]
    if len(set(suffixes)) == len(paths):
        return suffixes
    parents = [path.absolute().parent.parts[::-1] for path in paths]
    for depth in range(min(map(len, parents))):
        folders = [parts[depth] for parts in parents]
        if len(set(folders)) == len(paths):
            return folders
    return [str(number) for number in range(1, len(paths) + 1)]
