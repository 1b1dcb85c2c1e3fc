"""Arrays of other libraries, in and out without a copy: with real NumPy and torch on the CPU, and as dictionaries."""

import ctypes
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import runtime
from runtime.backends.base import TensorInfo
from runtime.backends.onnxruntime.binding import run_bound
from runtime.device.arrays import CUDA
from runtime.device.dlpack import Tensor, make_capsule, read_capsule
from runtime.device.views import DeviceView, array_or_view, stream_handle, view_of_interface
from runtime.errors import InputError
from tests.support.serving_models import images_of, serving_model

FLOAT = np.dtype(np.float32)


class Interface:
    """What has a `__cuda_array_interface__`, like pycuda's GPUArray."""

    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (2, 3, 4, 4),
            "typestr": "<f4",
            "data": (4096, False),
            "version": 3,
            **changes,
        }


class Exporter:
    """What has `__dlpack__` of memory on a GPU, and notes whom it was asked to let wait; like torch and CuPy."""

    def __init__(self, shape: tuple[int, ...] = (2, 3, 4, 4), pointer: int = 4096, **changes: Any) -> None:
        fields = {"strides": None, "dtype": FLOAT, "kind": CUDA, "device": 0, "read_only": True, **changes}
        self.tensor = Tensor(pointer=pointer, shape=shape, **fields)
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.kind, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> Any:
        self.streams.append(stream)
        return make_capsule(self.tensor, self, versioned=True)


class Older(Exporter):
    """Of the time before DLPack had versions."""

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        return make_capsule(self.tensor, self, versioned=False)


@pytest.mark.parametrize(
    ("changes", "stream"),
    [
        ({}, None),
        ({"stream": None}, None),
        ({"stream": 1}, 1),
        ({"stream": 2}, 2),
        ({"stream": 0x7F00}, 0x7F00),
        ({"version": 2}, 1),  # pycuda and torch: the default stream is waited for
        ({"version": 2, "stream": 7}, 1),
        ({"version": 0}, 1),
    ],
)
def test_the_stream_of_a_cuda_array_interface(changes: dict[str, Any], stream: int | None) -> None:
    owner = Interface(**changes)
    view = array_or_view(owner)
    assert isinstance(view, DeviceView)
    assert (view.pointer, view.shape, view.dtype, view.stream) == (4096, (2, 3, 4, 4), FLOAT, stream)
    assert (view.owner, view.by_dlpack, view.size, view.nbytes, len(view)) == (owner, False, 96, 384, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": (4096, True)},  # read-only: we only read
        {"strides": None},
        {"strides": (192, 64, 16, 4)},
        {"shape": (1, 3, 4, 4), "strides": (7, 64, 16, 4)},  # of a dimension of size 1 it does not matter
        {"shape": (0, 3, 4, 4), "strides": (1, 2, 3, 4), "data": (0, False)},
        {"mask": None},
        {"descr": [("", "<f4")]},
    ],
)
def test_interfaces_that_are_taken(changes: dict[str, Any]) -> None:
    assert isinstance(array_or_view(Interface(**changes)), DeviceView)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strides": (192, 4, 48, 12)}, r"is not contiguous; copy it to one that is \(torch: images.contiguous"),
        ({"strides": (-192, 64, 16, 4)}, "not contiguous"),
        ({"strides": (64, 16, 4)}, "different lengths"),
        ({"stream": 0}, r"found the stream 0; expected 1 \(the legacy default\)"),
        ({"stream": True}, "found the stream True"),
        ({"stream": "s"}, "found the stream 's'"),
        ({"mask": object()}, "masked arrays are not taken"),
        ({"typestr": ">f4"}, "found elements of type '>f4'"),
        ({"typestr": "|V8"}, "expected plain numbers"),
        ({"typestr": "float?"}, "__cuda_array_interface__ of a Interface is not one"),
        ({"data": (0, False)}, "its address is 0"),
        ({"data": 4096}, "is not one"),
        ({"data": None}, "is not one"),
        ({"version": None}, "is not one"),
        ({"version": -1}, "is not one"),
        ({"shape": (2, -1)}, "is not one"),
        ({"shape": 2}, "is not one"),
    ],
)
def test_interfaces_that_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        array_or_view(Interface(**changes))


def test_an_interface_must_be_a_dictionary() -> None:
    for wrong in (None, 3, [], {}, {"shape": (1,)}):
        with pytest.raises(InputError, match="is not one"):
            view_of_interface(wrong, object())


def test_slices_of_a_view() -> None:
    view = array_or_view(Interface(shape=(5, 3, 4, 4)))
    part = view[2:4]
    assert (part.pointer, part.shape, len(part)) == (4096 + 2 * 192, (2, 3, 4, 4), 2)
    assert view[4:9].shape == (1, 3, 4, 4)
    assert part.owner is view.owner


@pytest.mark.parametrize("kind", [Exporter, Older])
def test_dlpack_of_a_gpu_is_looked_at_first_and_ordered_later(kind: type[Exporter]) -> None:
    owner = kind()
    view = array_or_view(owner)
    assert (view.pointer, view.shape, view.dtype, view.by_dlpack) == (4096, (2, 3, 4, 4), FLOAT, True)
    assert owner.streams == [-1]
    view.order(None, 555, 0)
    assert owner.streams == [-1, 555]
    gc.collect()
    alive = weakref.ref(owner)
    del owner, view
    assert alive() is None  # no capsule is left behind


def test_a_stream_that_is_given_is_the_one_that_is_waited_for() -> None:
    waits: list[tuple[int, ...]] = []
    cuda = SimpleNamespace(wait_for=lambda *numbers: waits.append(numbers))
    for owner in (Interface(stream=9), Interface(version=2), Exporter()):
        array_or_view(owner, SimpleNamespace(handle=44)).order(cuda, 5, 6)
    array_or_view(Interface(stream=None)).order(cuda, 5, 6)
    assert waits == [(5, 44, 6)] * 3


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (1, 1),
        (140_000, 140_000),
        (SimpleNamespace(cuda_stream=33), 33),
        (SimpleNamespace(cuda_stream=0), 1),  # torch's name for the default one
        (SimpleNamespace(ptr=34), 34),
        (SimpleNamespace(handle=35), 35),
        (SimpleNamespace(handle=ctypes.c_void_p(36)), 36),
        (SimpleNamespace(handle=ctypes.c_void_p()), 1),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 37)), 37),
        (SimpleNamespace(__cuda_stream__=(0, 38)), 38),
    ],
)
def test_streams_of_other_libraries(stream: object, expected: int) -> None:
    assert stream_handle(stream) == expected


@pytest.mark.parametrize("stream", [0, -1, True, "s", object()])
def test_what_is_no_stream(stream: object) -> None:
    with pytest.raises(InputError, match=r"found"):
        stream_handle(stream)


def test_bad_dlpack_of_a_gpu() -> None:
    with pytest.raises(InputError, match="no DLPack capsule"):
        read_capsule("capsule")

    class Refuses(Exporter):
        def __dlpack__(self, **how: Any) -> Any:
            raise BufferError("not now")

    with pytest.raises(InputError, match="the Refuses cannot be taken by DLPack: not now"):
        array_or_view(Refuses())


@pytest.fixture
def session(tmp_path: Path) -> runtime.Session:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    return runtime.load(tmp_path / "m.onnx", device="cpu", threads=1)


def test_torch_tensors_are_run_where_they_lie(session: runtime.Session) -> None:
    images = torch.from_numpy(images_of(1.0, 2.0))
    accepted = session.backend.accept(images)
    assert accepted.ctypes.data == images.data_ptr()
    expected = session.run(images.numpy())
    for ask in (session.run, lambda batch: session.submit(batch).result()):
        assert np.array_equal(ask(images), expected)
    last = images.contiguous(memory_format=torch.channels_last)
    assert np.array_equal(session.run(last), expected)  # NumPy has strides too
    assert session.backend.accept(last).ctypes.data == last.data_ptr()
    assert session.stats.images == 6
    session.close()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.zeros(1, 3, 4, 4, requires_grad=True), "the Tensor cannot be read as a NumPy array: .*detach"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), "the Tensor cannot be read as a NumPy array"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), "found dtype float64"),
        (torch.full((1, 3, 4, 4), torch.nan), "holds NaN"),
        (torch.zeros(3, 4, 4), r"give images\[None\]"),
        (Interface(), r"on the GPU and the model runs on the CPU, by onnxruntime; bring them here \(torch"),
        (Exporter(), "on the GPU and the model runs on the CPU"),
        ([[1.0]], "run takes an array of NumPy, .*found list"),
        (None, "found NoneType"),
    ],
)
def test_what_a_cpu_backend_does_not_take(session: runtime.Session, images: object, expected: str) -> None:
    for ask in (session.run, session.run_outputs, session.submit):
        with pytest.raises(InputError, match=expected):
            ask(images)
    session.close()


def test_outputs_cannot_stay_on_a_gpu_that_is_not_used(session: runtime.Session) -> None:
    with pytest.raises(InputError, match="onnxruntime runs on the CPU: use run"):
        session.run_on_device(images_of(1.0))
    assert session.stats.device_bytes == 0
    session.close()


def test_io_binding_reads_and_leaves_memory_where_it_is(tmp_path: Path) -> None:
    """The CUDA provider's path, on the CPU provider: the same calls with `cpu` for `cuda`."""
    onnx.save(serving_model(), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    native = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    images = images_of(1.0, 5.0)
    tensors = TensorInfo("input", FLOAT, (-1, 3, 4, 4)), (TensorInfo("logits", FLOAT, (-1, 3)),)
    view = DeviceView(images.ctypes.data, images.shape, images.dtype, images)
    for source in (images, view, view[1:]):
        (answers,) = run_bound(native, *tensors, source, "cpu")
        expected = [[1.0] * 3, [5.0] * 3][-len(source) :]
        taken = torch.from_dlpack(answers)
        assert taken.data_ptr() == answers.pointer
        assert answers.numpy().tolist() == expected
        del answers
        gc.collect()
        assert taken.tolist() == expected
