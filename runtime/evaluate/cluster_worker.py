"""`ClusterWorker`: the process that loads models and counts units on a Ray cluster.

Ray wraps exceptions in its own type. Workers therefore return advprop's errors as values, together
with the name of their node.
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
from runtime.evaluate.image_workers import Workers, use_one_core
from runtime.evaluate.images import LabeledImages
from runtime.evaluate.measure import Counted, Measurement, Unit
from runtime.evaluate.models import Model, ModelSource
from runtime.system.decode import decode

__all__ = ["ClusterWorker", "Failure", "RemoteLogits"]

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of advprop on a node."""

    error: AdvPropError
    node: str

    def reraise(self) -> NoReturn:
        """Raise the error in this process, with the node in its message."""
        raise type(self.error)(f"on node {self.node}: {self.error}") from self.error


@dataclass(frozen=True, slots=True)
class RemoteLogits:
    """Placeholder for the logits of a model that only workers have loaded."""

    source: ModelSource

    def __call__(self, images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        raise AssertionError(f"{self.source.path} is not loaded in this process")


def _return_errors(method: Callable[..., _Value]) -> Callable[..., _Value | Failure]:
    """Make a worker's method return advprop's errors instead of raising them."""

    @functools.wraps(method)
    def wrapped(self: ClusterWorker, *arguments: Any) -> _Value | Failure:
        try:
            return method(self, *arguments)
        except AdvPropError as error:
            return Failure(error, self.node)

    return wrapped


class ClusterWorker:
    """A Ray actor with loaded models and one measurement."""

    def __init__(self) -> None:
        self.node = platform.node()
        self._loaded: dict[ModelSource, Model] = {}
        self._measurement: Measurement | None = None
        use_one_core()

    @_return_errors
    def describe(self, source: ModelSource) -> Model:
        """Load a model and return its description, without its logits.

        Raises:
            AdvPropError: see `load_model`.
        """
        return dataclasses.replace(self._load(source), logits=RemoteLogits(source))

    @_return_errors
    def begin(self, measurement: Measurement, cells: Container[str]) -> tuple[str, list[dict[str, Any]]]:
        """Prepare for units of `cells`: load the models and check that images are readable.

        Returns:
            Name of this node, and everything that the counts of this worker depend on.

        Raises:
            InputError: a model or an image file does not exist here or cannot be read.
            BackendUnavailable: a library that a model or corruption needs is missing here.
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
                self._check_readable(cell.images)
        self._measurement.probe(cells)
        return self.node, self._measurement.describe("1/1")

    @_return_errors
    def count(self, units: Sequence[Unit]) -> list[Counted]:
        """Count units of the current measurement.

        Raises:
            AdvPropError: see `Measurement.counts`.
        """
        assert self._measurement is not None
        with Workers(0) as workers:
            return list(self._measurement.counts(units, workers))

    def _own(self, model: Model) -> Model:
        assert isinstance(model.logits, RemoteLogits)
        return dataclasses.replace(self._load(model.logits.source), name=model.name)

    def _load(self, source: ModelSource) -> Model:
        if source not in self._loaded:
            self._loaded[source] = source.load()
        return self._loaded[source]

    def _check_readable(self, images: LabeledImages) -> None:
        name = images.names[0]
        try:
            decode(images.source.read(name), images.source.describe(name))
        except DataError as error:
            raise DataError(f"{error}. Every node needs the images under the same path") from error
