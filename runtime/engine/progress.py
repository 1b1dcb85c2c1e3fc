"""The progress of a native build, and stopping it with Ctrl-C.

A native build blocks the thread that calls it, and Python would handle Ctrl-C only afterwards. It
therefore runs in its own thread, and the caller's thread waits for it in Python.
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
"""Called with the builder's name of the current phase, and the completed share, 0 to 1, which never
decreases."""

_Result = TypeVar("_Result")
_POLL_S = 0.1


@dataclass(slots=True)
class _Phase:
    parent: str
    steps: int
    done: int = 0


class BuildProgress:
    """Tracks the builder's nested phases, and can stop the build: `IProgressMonitor` in Python.

    TensorRT may call it from several threads at once.
    """

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self._phases: dict[str, _Phase] = {}
        self._share = 0.0
        self._reported: tuple[str, int] = ("", -1)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.error: BaseException | None = None
        """The error that the callback raised, which stops the build."""

    @property
    def stopped(self) -> bool:
        """Whether the build ends at its next step."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """End the build at its next step."""
        self._stopped.set()

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """Record that a phase with a number of steps starts, possibly inside another phase."""
        with self._lock:
            self._phases[name] = _Phase(parent or "", max(steps, 1))
        self._report(name)

    def step_complete(self, name: str, step: int) -> bool:
        """Record that a step is done, and return whether to continue."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
        self._report(name)
        return not self.stopped

    def phase_finish(self, name: str) -> None:
        """Record that a phase is done or was stopped."""
        with self._lock:
            self._phases.pop(name, None)

    def _report(self, name: str) -> None:
        """Call the callback if the phase or the percentage changed."""
        if self._callback is None or self.stopped:
            return
        with self._lock:
            self._share = max(self._share, self._total_share(name))
            now = (name, int(self._share * 100))
            if now == self._reported:
                return
            self._reported = now
            try:
                self._callback(name, self._share)
            except BaseException as error:  # must not pass through the native code above us
                self.error = error
                self.stop()

    def _total_share(self, name: str) -> float:
        """Return the completed share of the build: a phase is part of one step of its parent."""
        share = 0.0
        for _ in range(len(self._phases)):  # bounded, because the parents may form a cycle
            phase = self._phases.get(name)
            if phase is None:
                break
            share = min((phase.done + share) / phase.steps, 1.0)
            name = phase.parent
        return share


def native_monitor(trt: Any, progress: BuildProgress) -> Any:
    """Return an `IProgressMonitor` for `progress`. It must live as long as the build."""

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
    """Run `work` in another thread and wait for it. Ctrl-C stops it at the builder's next step.

    Further Ctrl-C are ignored until it has stopped, because native code cannot be aborted.

    Raises:
        BaseException: what a signal handler raised here (KeyboardInterrupt), or else what the
            progress callback or `work` raised.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    # Not `join`: Python 3.11 considers a thread finished if joining it is interrupted.
    go, ended = threading.Event(), threading.Event()

    def run() -> None:
        go.wait()
        try:
            results.append(work())
        except BaseException as error:  # raised again below
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
            while not ended.wait(_POLL_S):  # on Windows, an unlimited wait does not react to Ctrl-C
                pass
        except BaseException as error:  # raised by a signal handler
            interrupt = error if interrupt is None else interrupt
            progress.stop()
    raised = [error for error in (interrupt, progress.error, *errors) if error is not None]
    if raised:
        raise raised[0]
    return results[0]
