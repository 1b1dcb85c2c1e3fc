"""The output folder of a run: which run it belongs to, leftovers of killed runs, and `best.pt`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import CheckpointError, ConfigError, OutputError, TrainingDiverged
from runtime.system.files import link_or_copy, output_dir, write_text
from runtime.system.locks import reserved_folder
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.config_file import to_toml
from train.reporting import EpochMetrics, best_epoch, plot_curves, write_metrics
from train.resume import Change, find_checkpoint
from train.split import Split

__all__ = ["RunFolder"]

log = logging.getLogger(__name__)

_DERIVED = ("metrics.csv", "curves.png")
_CHECKPOINTS = ("best.pt", "last.pt")
_SPLIT = "split.csv"
_FILES = (*_DERIVED, *_CHECKPOINTS, _SPLIT, "config.toml")


class RunFolder:
    """The files of one run."""

    def __init__(self, config: TrainConfig) -> None:
        """Check that the run may write to its output folder. Nothing is changed.

        Raises:
            ConfigError: the folder holds another run, which is neither resumed nor overwritten.
            CheckpointError: there is no checkpoint to resume at the given path.
            OutputError: the folder cannot be written.
        """
        self.config = config
        self.source = find_checkpoint(config.resume, config.resolved_out)
        """The checkpoint that the run resumes, or None for a new run. It can be in another folder."""
        self._created = _missing_folders(config.resolved_out)
        self.path = output_dir(config.resolved_out)
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self.best_epoch: EpochMetrics | None = None
        """The epoch that `best.pt` holds."""
        for name in _FILES:
            if (self.path / name).is_dir():
                raise OutputError(
                    f"cannot write {self.path / name}: a folder with that name exists",
                    fix="remove it, or choose another folder with --out",
                )
        resumes = self.source is not None and self.source.resolve() == self.last.resolve()
        other = next((file for file in (self.last, self.best) if file.exists()), None)
        if other is not None and not resumes and not config.overwrite:
            raise ConfigError(
                f"{other} belongs to another run: continue that run with --resume {self.path}, choose another folder "
                "with --out, or replace its files with --overwrite"
                if other is self.last
                else f"{other} belongs to a run whose last.pt is missing, so it cannot be resumed: choose another "
                "folder with --out, or replace its files with --overwrite"
            )

    @property
    def resume_option(self) -> str:
        """The option that continues this run, for messages."""
        here = self.config.resume in ("auto", "never")
        return "--resume" if here else f"--resume {shlex.quote(str(self.path))}"

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove the folder if this run created it and fails before it saved a checkpoint."""
        try:
            yield
        except TrainingDiverged:  # its curves may explain why
            raise
        except BaseException:
            if self._created and not self.last.exists():
                shutil.rmtree(self.path, ignore_errors=True)
                for parent in self._created[1:]:
                    with contextlib.suppress(OSError):  # another run uses it
                        parent.rmdir()
            raise

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Reserve the folder for this process, and remove temporary files of killed runs.

        Raises:
            OutputError: another process is using the folder.
        """
        with reserved_folder(self.path):
            for name in _FILES:
                for leftover in self.path.glob(f".{name}.*.tmp"):
                    with contextlib.suppress(OSError):
                        leftover.unlink()
            yield

    def start(self, config: TrainConfig, split: Split | None, changes: Sequence[Change], *, resumed: bool) -> None:
        """Write `config.toml`; before, remove the files of the run that this one replaces.

        Args:
            config: settings of the run, with the values that apply.
            split: the images of the run, if they are to be recorded.
            changes: settings that changed since the run started.
            resumed: whether the run resumes.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not resumed:
            for name in (*_DERIVED, *_CHECKPOINTS, _SPLIT):
                with contextlib.suppress(FileNotFoundError):
                    (self.path / name).unlink()
        if split is not None:
            split.write(self.path)
        notes = [f"# changed after epoch {change.epoch}, step {change.step}: {change}\n" for change in changes]
        write_text(self.path / "config.toml", "".join(notes) + to_toml(config))

    def adopt(self) -> None:
        """Copy the `best.pt` of the run in another folder that continues in this one."""
        assert self.source is not None
        if self.source.parent.resolve() == self.path.resolve():
            return
        with contextlib.suppress(FileNotFoundError):
            self.best.unlink()
        with contextlib.suppress(FileNotFoundError):
            link_or_copy(self.source.with_name(self.best.name), self.best)

    def publish(self, rows: Sequence[EpochMetrics], title: str, save_weights: Callable[[Path], None]) -> None:
        """Write the files that are derived from `last.pt` at the end of an epoch.

        Args:
            rows: metrics of the finished epochs.
            title: heading of the plots.
            save_weights: writes the weights of the last epoch to a file.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self.best_epoch is None or rows[-1].top1 > self.best_epoch.top1:
            save_weights(self.best)
            self.best_epoch = rows[-1]
        write_metrics(self.path / "metrics.csv", rows)
        plot_curves(self.path / "curves.png", rows, title)

    def find_best(self, rows: Sequence[EpochMetrics], *, between_epochs: bool) -> None:
        """Find the epoch that `best.pt` holds when a run resumes, and warn if the file is lost.

        Args:
            rows: metrics of the finished epochs.
            between_epochs: whether the run resumes at the start of an epoch.
        """
        if not rows or (between_epochs and best_epoch(rows) is rows[-1]):
            return  # `publish` writes the first or a new `best.pt`
        try:
            saved = load_checkpoint(self.best, device="meta")["epoch"]
            self.best_epoch = next((row for row in rows if row.epoch == saved), None)
            problem = f"{self.best} belongs to another run"
        except CheckpointError as error:
            problem = str(error)
        if self.best_epoch is None:
            lost = best_epoch(rows)
            new = f"epoch {rows[-1].epoch} ({rows[-1].top1:.1%})" if between_epochs else "the epoch in progress"
            log.warning(
                "%s. It held epoch %d, the best so far (clean accuracy %.1f%%), whose weights are in no other file. "
                "best.pt now becomes %s, until a later epoch is better. To keep epoch %d, restore best.pt from a "
                "backup and resume again",
                problem,
                lost.epoch,
                100 * lost.top1,
                new,
                lost.epoch,
            )


def _missing_folders(path: Path) -> list[Path]:
    """Return the folders that do not exist, from `path` upward."""
    missing = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing.append(folder)
    return missing
