"""DLPack capsules and `DeviceArray`, which exports them, with real NumPy and torch on the CPU."""

import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from runtime.device.arrays import CPU, CUDA, DeviceArray
from runtime.device.dlpack import read_capsule
from runtime.device.views import DeviceView, array_or_view, view_of_interface
from runtime.errors import InputError
from tests.support import ROOT


def host_array(memory: np.ndarray, kind: int = CPU) -> DeviceArray:
    return DeviceArray(
        pointer=memory.ctypes.data,
        shape=memory.shape,
        dtype=memory.dtype,
        owner=memory,
        to_host=memory.copy,
        kind=kind,
    )


def test_the_interpreter_exits_while_torch_holds_an_output() -> None:
    program = (
        "import numpy, torch; from runtime.device.arrays import DeviceArray; ones = numpy.ones(3, numpy.float32)\n"
        "array = DeviceArray(pointer=ones.ctypes.data, shape=(3,), dtype=ones.dtype, owner=ones, to_host=0, kind=1)\n"
        "torch.kept = torch.utils.dlpack.from_dlpack(array); unused = array.__dlpack__(); print(torch.kept.sum())"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "tensor(3.)\n", "")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "i1", "i4", "i8", "?"])
@pytest.mark.parametrize("versioned", [False, True])
def test_capsules_of_torch_are_read(dtype: str, versioned: bool) -> None:
    values = torch.from_numpy(np.arange(24).reshape(2, 3, 4).astype(dtype))
    part = values[1:].transpose(1, 2)
    tensor = read_capsule(part.__dlpack__(max_version=(1, 0)) if versioned else part.__dlpack__())
    assert (tensor.pointer, tensor.shape, tensor.strides) == (part.data_ptr(), (1, 4, 3), part.stride())
    assert (tensor.dtype, tensor.kind, tensor.device) == (np.dtype(dtype), CPU, 0)


def test_version_1_reports_read_only_memory() -> None:
    values = np.zeros(3, np.float32)
    values.flags.writeable = False
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        assert read_capsule(values.__dlpack__(max_version=(1, 0))).read_only
    values.flags.writeable = True
    assert not read_capsule(values.__dlpack__()).read_only


def test_types_unknown_to_numpy_are_rejected() -> None:
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.complex64, "5 with 64 bits")):
        with pytest.raises(InputError, match=f"found elements of type {name}"):
            read_capsule(torch.zeros(2, dtype=dtype).__dlpack__())


@pytest.mark.parametrize("consume", [torch.utils.dlpack.from_dlpack, np.from_dlpack])
def test_our_capsules_are_consumed_and_freed(consume: Any) -> None:
    memory = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = host_array(memory)
    alive = weakref.ref(array)
    consumed = consume(array)
    del array
    gc.collect()
    assert alive() is not None  # its consumer keeps it alive
    assert np.array_equal(np.asarray(consumed), memory)
    np.asarray(consumed)[0, 0] = 7
    assert memory[0, 0] == 7
    del consumed
    gc.collect()
    assert alive() is None
    for version in (None, (1, 0)):
        unused = host_array(memory)
        alive = weakref.ref(unused)
        capsule = unused.__dlpack__(max_version=version)
        del unused
        assert alive() is not None
        del capsule  # it was not consumed
        assert alive() is None


def test_a_device_array_exports_its_memory() -> None:
    memory = np.ones((2, 3), np.float16)
    array = host_array(memory, CUDA)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<f2",
        "data": (memory.ctypes.data, False),
        "strides": None,
        "version": 3,
        "stream": None,
    }
    assert (array.__dlpack_device__(), array.nbytes, len(array)) == ((2, 0), 12, 2)
    again = array_or_view(array)  # by DLPack
    assert isinstance(again, DeviceView)
    assert (again.pointer, again.shape, again.dtype) == (memory.ctypes.data, (2, 3), memory.dtype)
    assert view_of_interface(array.__cuda_array_interface__, array).stream is None
    assert np.array_equal(array.numpy(), memory)
    assert not hasattr(host_array(memory), "__cuda_array_interface__")
    for request in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="exported without a copy"):
            array.__dlpack__(**request)
