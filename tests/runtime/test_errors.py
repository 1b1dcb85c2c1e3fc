import copy
import pickle
from collections.abc import Callable

import pytest

from runtime.errors import (
    AdvPropError,
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    Interrupted,
    OutputError,
    first_line,
    nearest,
)


@pytest.mark.parametrize("kind", [ConfigError, OutputError, DeadlineExceeded, BackendUnavailable])
def test_a_message_ends_with_its_fix(kind: type[AdvPropError]) -> None:
    error = kind("the disk is full", fix="free some space")
    assert str(error) == "the disk is full; free some space"
    assert (error.message, error.fix) == ("the disk is full", "free some space")
    assert str(kind("the disk is full")) == "the disk is full"


@pytest.mark.parametrize("duplicate", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize(
    "error",
    [
        OutputError("cannot write", fix="free some space"),
        DeadlineExceeded("too late", fix="retry"),
        BackendUnavailable("no builder: no GPU", reason="no GPU", fix="pip install x"),
        Interrupted("stopped", 143),
    ],
)
def test_copies_and_pickles_keep_all_fields(
    error: AdvPropError, duplicate: Callable[[AdvPropError], AdvPropError]
) -> None:
    other = duplicate(error)
    assert type(other) is type(error)
    assert (str(other), vars(other), other.exit_code) == (str(error), vars(error), error.exit_code)


def test_the_reason_of_a_missing_backend_is_its_message_by_default() -> None:
    assert BackendUnavailable("no GPU", fix="buy one").reason == "no GPU"


def test_first_line() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(KeyError()) == "KeyError"


def test_nearest_suggests_similar_names() -> None:
    assert nearest("resnet5", ["resnet50", "vgg16"]) == "did you mean resnet50?"
    assert nearest("transformer", ["resnet50", "vgg16"]) == ""
