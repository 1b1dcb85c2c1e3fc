"""What runs in each process of a Ray cluster: it loads models once, and counts the units that it is sent.

Errors of ours travel back as values, with the node that they happened on: what Ray makes of an exception hides its
kind.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import AdvPropError, DataError
from runtime.evaluate.image_workers import Workers, one_core
from runtime.evaluate.measure import Counted, Measurement
from runtime.evaluate.models import Model, ModelSource
from runtime.evaluate.progress_log import Unit
from runtime.preprocessing import decode

__all__ = ["ClusterWorker", "Elsewhere", "Failure"]

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of ours, on some node."""

    error: AdvPropError
    node: str

    def throw(self) -> NoReturn:
        """Raises the error here, with the node in its message."""
        raise type(self.error)(f"on node {self.node}: {self.error}") from self.error


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Stands for the logits of a model that is loaded in the workers only."""

    source: ModelSource

    def __call__(self, images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        raise AssertionError(f"{self.source.path} was not loaded in this process")


def _told(method: Callable[..., _Value]) -> Callable[..., _Value | Failure]:
    """Makes a worker's method return our errors."""

    @functools.wraps(method)
    def wrapped(self: ClusterWorker, *arguments: Any) -> _Value | Failure:
        try:
            return method(self, *arguments)
        except AdvPropError as error:
            return Failure(error, self.node)

    return wrapped


class ClusterWorker:
    """A Ray actor. It keeps models, and what it was last told to measure."""

    def __init__(self) -> None:
        self.node = platform.node()
        self._loaded: dict[ModelSource, Model] = {}
        self._measurement: Measurement | None = None
        one_core()

    @_told
    def describe(self, source: ModelSource) -> Model:
        """Loads a model. Returns all of it but the model itself. Raises as `load_model` does."""
        return dataclasses.replace(self._load(source), logits=Elsewhere(source))

    @_told
    def begin(self, measurement: Measurement, cells: Container[str]) -> tuple[str, list[dict[str, Any]]]:
        """Gets ready to count blocks of `cells`: loads the models and looks for the images.

        Returns:
            This node's name, and everything that counts made here follow from.

        Raises:
            InputError: a model or an image file is not here, or cannot be read.
            BackendUnavailable: what runs a model or makes a corruption is missing here.
        """
        own = {id(model): self._own(model) for model in (*measurement.models, measurement.reference) if model}
        reference = measurement.reference
        self._measurement = dataclasses.replace(
            measurement,
            models=[own[id(model)] for model in measurement.models],
            reference=None if reference is None else own[id(reference)],
        )
        for cell in measurement.suite.cells:
            if cell.id in cells:
                self._look_for(cell.images.source.read(cell.images.names[0]))
        self._measurement.probe(cells)
        return self.node, self._measurement.describe("1/1")

    @_told
    def count(self, units: Sequence[Unit]) -> list[Counted]:
        """Counts units of what `begin` was told. Raises as `Measurement.counts` does."""
        assert self._measurement is not None
        with Workers(0) as workers:
            return list(self._measurement.counts(units, workers))

    def _own(self, model: Model) -> Model:
        assert isinstance(model.logits, Elsewhere)
        return dataclasses.replace(self._load(model.logits.source), name=model.name)

    def _load(self, source: ModelSource) -> Model:
        if source not in self._loaded:
            self._loaded[source] = source.load()
        return self._loaded[source]

    def _look_for(self, image: Any) -> None:
        try:
            decode(image)
        except DataError as error:
            raise DataError(f"{error}. Every node must see the images under the same path") from error
