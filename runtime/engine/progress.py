"""How far a native build is, and a Ctrl-C that stops it.

A native build keeps the thread that called it: Python would see a Ctrl-C only when it is over. It therefore runs in a
thread of its own, and the caller's thread waits for it in Python.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["BuildProgress", "ProgressCallback", "native_monitor", "run_interruptibly"]

log = logging.getLogger(__name__)

ProgressCallback = Callable[[str, float], None]
"""Called with the builder's name for what it does, and the share that is done, 0 to 1, never less than before."""

_Result = TypeVar("_Result")
_POLL_S = 0.1


@dataclass(slots=True)
class _Phase:
    parent: str
    steps: int
    done: int = 0


class BuildProgress:
    """Adds up the builder's nested phases, and stops it: an `IProgressMonitor` without its native part.

    TensorRT may call it from several threads at once.
    """

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self._phases: dict[str, _Phase] = {}
        self._share = 0.0
        self._told: tuple[str, int] = ("", -1)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.error: BaseException | None = None
        """What the callback raised; the build is then stopped."""

    @property
    def stopped(self) -> bool:
        """Whether the build is to end at its next step."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Ends the build at its next step."""
        self._stopped.set()

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, within another or by itself."""
        with self._lock:
            self._phases[name] = _Phase(parent or "", max(steps, 1))
        self._tell(name)

    def step_complete(self, name: str, step: int) -> bool:
        """A step of a phase is done. Returns whether to go on."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
        self._tell(name)
        return not self.stopped

    def phase_finish(self, name: str) -> None:
        """A phase is done, or was stopped."""
        with self._lock:
            self._phases.pop(name, None)

    def _tell(self, name: str) -> None:
        """Calls the callback where something changed that a person would see."""
        if self._callback is None or self.stopped:
            return
        with self._lock:
            self._share = max(self._share, self._share_of(name))
            now = (name, int(self._share * 100))
            if now == self._told:
                return
            self._told = now
            try:
                self._callback(name, self._share)
            except BaseException as error:  # nothing may pass through the native code between us and the caller
                self.error = error
                self.stop()

    def _share_of(self, name: str) -> float:
        """Share of the whole build: each phase is a part of a step of the phase that it is in."""
        share = 0.0
        for _ in range(len(self._phases)):  # no deeper than that, whatever the parents are
            phase = self._phases.get(name)
            if phase is None:
                break
            share = min((phase.done + share) / phase.steps, 1.0)
            name = phase.parent
        return share


def native_monitor(trt: Any, progress: BuildProgress) -> Any:
    """Returns `progress` as an `IProgressMonitor` of that TensorRT; it must live as long as the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step_complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.phase_finish(phase_name)

    return Monitor()


def run_interruptibly(work: Callable[[], _Result], progress: BuildProgress) -> _Result:
    """Runs `work` in another thread and waits for it; Ctrl-C stops it at the builder's next step.

    Further Ctrl-C are not heard until it has stopped: native code cannot be left half-way.

    Raises:
        BaseException: what `work` raised, what the progress callback raised, or what a signal's handler raised
            here (KeyboardInterrupt), which comes first.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    go, ended = threading.Event(), threading.Event()  # not `join`: Python 3.11 takes an interrupted one for the end

    def run() -> None:
        go.wait()
        try:
            results.append(work())
        except BaseException as error:  # passed on below
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="advprop-build", daemon=True).start()
    interrupt: BaseException | None = None
    while not results and not errors:
        try:
            go.set()
            if interrupt is not None:
                log.warning("stopping the build at its next step")
            while not ended.wait(_POLL_S):  # Windows hears no Ctrl-C in a wait without end
                pass
        except BaseException as error:  # raised by a signal's handler
            interrupt = error if interrupt is None else interrupt
            progress.stop()
    raised = [error for error in (interrupt, progress.error, *errors) if error is not None]
    if raised:
        raise raised[0]
    return results[0]
