"""Zero-copy exchange with other libraries: real CPU arrays, and stand-ins for GPU arrays."""

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
from runtime.device.dlpack import read_capsule
from runtime.device.views import DeviceView, array_or_view, stream_handle, view_of_interface
from runtime.errors import InputError
from tests.support.gpu_arrays import FLOAT, Exporter, Interface, UnversionedExporter
from tests.support.serving_models import images_of, serving_model


def view_of(array: object, stream: object = None) -> DeviceView:
    view = array_or_view(array, stream)
    assert isinstance(view, DeviceView)
    return view


@pytest.mark.parametrize(
    ("changes", "stream"),
    [
        ({}, None),
        ({"stream": None}, None),
        ({"stream": 1}, 1),
        ({"stream": 2}, 2),
        ({"stream": 0x7F00}, 0x7F00),
        ({"version": 2}, 1),  # pycuda and torch: wait for the default stream
        ({"version": 2, "stream": 7}, 1),
        ({"version": 0}, 1),
    ],
)
def test_the_stream_of_a_cuda_array_interface(changes: dict[str, Any], stream: int | None) -> None:
    owner = Interface(**changes)
    view = view_of(owner)
    assert (view.pointer, view.shape, view.dtype, view.stream) == (4096, (2, 3, 4, 4), FLOAT, stream)
    assert (view.owner, view.by_dlpack, view.size, view.nbytes, len(view)) == (owner, False, 96, 384, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": (4096, True)},  # read-only memory is fine: we only read
        {"strides": None},
        {"strides": (192, 64, 16, 4)},
        {"shape": (1, 3, 4, 4), "strides": (7, 64, 16, 4)},  # any stride for a dimension of size 1
        {"shape": (0, 3, 4, 4), "strides": (1, 2, 3, 4), "data": (0, False)},
        {"mask": None},
        {"descr": [("", "<f4")]},
    ],
)
def test_valid_interfaces_are_accepted(changes: dict[str, Any]) -> None:
    view = view_of(Interface(**changes))
    assert view.pointer == changes.get("data", (4096,))[0]
    assert view.shape == changes.get("shape", (2, 3, 4, 4))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"strides": (192, 4, 48, 12)}, r"is not contiguous; copy it \(torch: images.contiguous"),
        ({"strides": (-192, 64, 16, 4)}, "not contiguous"),
        ({"strides": (64, 16, 4)}, "different lengths"),
        ({"stream": 0}, r"found the stream 0; expected 1 \(legacy default\)"),
        ({"stream": True}, "found the stream True"),
        ({"stream": "s"}, "found the stream 's'"),
        ({"mask": object()}, "masked arrays are not supported"),
        ({"typestr": ">f4"}, "found elements of type '>f4'"),
        ({"typestr": "|V8"}, "expected numbers in native byte order"),
        ({"typestr": "float?"}, "__cuda_array_interface__ of a Interface is invalid"),
        ({"data": (0, False)}, "its address is 0"),
        ({"data": 4096}, "is invalid"),
        ({"data": None}, "is invalid"),
        ({"version": None}, "is invalid"),
        ({"version": -1}, "is invalid"),
        ({"shape": (2, -1)}, "is invalid"),
        ({"shape": 2}, "is invalid"),
    ],
)
def test_invalid_interfaces_are_rejected(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        array_or_view(Interface(**changes))


def test_an_interface_must_be_a_dictionary() -> None:
    values: list[Any] = [None, 3, [], {}, {"shape": (1,)}]
    for wrong in values:
        with pytest.raises(InputError, match="is invalid"):
            view_of_interface(wrong, object())


def test_slices_of_a_view() -> None:
    view = view_of(Interface(shape=(5, 3, 4, 4)))
    part = view[2:4]
    assert (part.pointer, part.shape, len(part)) == (4096 + 2 * 192, (2, 3, 4, 4), 2)
    assert view[4:9].shape == (1, 3, 4, 4)
    assert part.owner is view.owner


@pytest.mark.parametrize("kind", [Exporter, UnversionedExporter])
def test_a_dlpack_array_is_read_first_and_synchronized_later(kind: type[Exporter]) -> None:
    owner = kind()
    view = view_of(owner)
    assert (view.pointer, view.shape, view.dtype, view.by_dlpack) == (4096, (2, 3, 4, 4), FLOAT, True)
    assert owner.streams == [-1]
    cuda: Any = None  # not needed: the exporter orders its own work
    view.order_after_writes(cuda, 555, 0)
    assert owner.streams == [-1, 555]
    gc.collect()
    alive = weakref.ref(owner)
    del owner, view
    assert alive() is None  # no capsule keeps it alive


def test_an_explicit_stream_overrides_the_arrays_own() -> None:
    waits: list[tuple[int, ...]] = []
    cuda: Any = SimpleNamespace(wait_for=lambda *numbers: waits.append(numbers))
    for owner in (Interface(stream=9), Interface(version=2), Exporter()):
        view_of(owner, SimpleNamespace(handle=44)).order_after_writes(cuda, 5, 6)
    view_of(Interface(stream=None)).order_after_writes(cuda, 5, 6)
    assert waits == [(5, 44, 6)] * 3


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (1, 1),
        (140_000, 140_000),
        (SimpleNamespace(cuda_stream=33), 33),
        (SimpleNamespace(cuda_stream=0), 1),  # torch's default stream
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
def test_other_objects_are_rejected_as_streams(stream: object) -> None:
    with pytest.raises(InputError, match=r"found"):
        stream_handle(stream)


def test_invalid_dlpack_arrays_are_rejected() -> None:
    with pytest.raises(InputError, match="no DLPack capsule"):
        read_capsule("capsule")

    class Refuses(Exporter):
        def __dlpack__(self, **how: Any) -> Any:
            raise BufferError("not now")

    with pytest.raises(InputError, match="the Refuses cannot be exported by DLPack: not now"):
        array_or_view(Refuses())


@pytest.fixture
def session(tmp_path: Path) -> runtime.Session:
    onnx.save(serving_model(), tmp_path / "m.onnx")
    return runtime.load(tmp_path / "m.onnx", device="cpu", threads=1)


def test_torch_tensors_are_read_in_place(session: runtime.Session) -> None:
    images = torch.from_numpy(images_of(1.0, 2.0))
    accepted = session.backend.accept(images)
    assert isinstance(accepted, np.ndarray)
    assert accepted.ctypes.data == images.data_ptr()
    expected = session.run(images.numpy())
    for found in (session.run(images), session.submit(images).result()):
        assert np.array_equal(found, expected)
    last = images.contiguous(memory_format=torch.channels_last)
    assert np.array_equal(session.run(last), expected)  # NumPy supports strides
    accepted = session.backend.accept(last)
    assert isinstance(accepted, np.ndarray)
    assert accepted.ctypes.data == last.data_ptr()
    assert (session.stats.calls, session.stats.images) == (4, 8)  # two images each
    session.close()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.zeros(1, 3, 4, 4, requires_grad=True), "the Tensor cannot be read as a NumPy array: .*detach"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), "the Tensor cannot be read as a NumPy array"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), "found dtype float64"),
        (torch.full((1, 3, 4, 4), torch.nan), "contains NaN"),
        (torch.zeros(3, 4, 4), r"pass images\[None\]"),
        (Interface(), r"on the GPU, but onnxruntime runs the model on the CPU; copy them to the CPU \(torch"),
        (Exporter(), "on the GPU, but onnxruntime runs the model on the CPU"),
        ([[1.0]], "run takes a NumPy array, .*found list"),
        (None, "found NoneType"),
    ],
)
def test_a_cpu_backend_rejects(session: runtime.Session, images: object, expected: str) -> None:
    for call in (session.run, session.run_outputs, session.submit):
        with pytest.raises(InputError, match=expected):
            call(images)
    session.close()


def test_outputs_cannot_stay_on_a_gpu_if_the_model_runs_on_the_cpu(session: runtime.Session) -> None:
    with pytest.raises(InputError, match="onnxruntime runs on the CPU, and cannot keep outputs on a GPU; use run"):
        session.run_on_device(images_of(1.0))
    assert session.stats.device_bytes == 0
    session.close()


def test_io_binding_does_not_copy_inputs_and_outputs(tmp_path: Path) -> None:
    """The CPU provider stands in for the CUDA provider: the calls are the same."""
    onnx.save(serving_model(), tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    native = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    images = images_of(1.0, 5.0)
    tensors = TensorInfo("input", FLOAT, (-1, 3, 4, 4)), (TensorInfo("logits", FLOAT, (-1, 3)),)
    view = DeviceView(images.ctypes.data, images.shape, images.dtype, images)
    for source in (images, view, view[1:]):
        (output,) = run_bound(native, *tensors, source, "cpu")
        expected = [[1.0] * 3, [5.0] * 3][-len(source) :]
        consumed = torch.utils.dlpack.from_dlpack(output)
        assert consumed.data_ptr() == output.pointer
        assert output.numpy().tolist() == expected
        del output
        gc.collect()
        assert consumed.tolist() == expected
