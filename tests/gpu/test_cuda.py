"""The layer over cuda-bindings on a real device: copies of rows, and errors with names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ddexport.runtime.backends._cuda import CudaDevice, CudaStream, host_view
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import Gpu

pytestmark = pytest.mark.gpu

SIZE = 1 << 20


@pytest.fixture
def gpu(real_gpu: Gpu) -> Iterator[CudaStream]:
    stream = CudaStream(real_gpu.index)
    yield stream
    stream.close()


def test_rows_are_copied_within_the_device(gpu: CudaStream) -> None:
    """As a teacher's cache is appended to: 3 rows of 4 bytes into rows of 10."""
    source, target, host = gpu.allocate(12), gpu.allocate(30), gpu.allocate_host(30)
    view = host_view(host, 30)
    view[:] = np.arange(30)
    gpu.upload(source, host, 12)
    gpu.upload(target, host, 30)
    gpu.wait()
    gpu.copy_rows(target + 2, 10, source, 4, 4, 3)
    gpu.download(host, target, 30)
    gpu.wait()
    want = np.arange(30, dtype=np.uint8).reshape(3, 10)
    want[:, 2:6] = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(view.reshape(3, 10), want)
    for address in (source, target):
        gpu.free(address)
    gpu.free_host(host)


def test_errors_have_names_and_a_broken_recording_leaves_the_stream_usable(gpu: CudaStream) -> None:
    """Waiting is forbidden while recording, and breaks it."""
    with pytest.raises(BackendError, match=r"cudaMalloc failed: .*\(cudaErrorMemoryAllocation\)"):
        gpu.allocate(1 << 50)
    with pytest.raises(BackendError, match=r"cudaSetDevice failed: .*\(cudaErrorInvalidDevice\)"):
        CudaDevice(999)
    gpu.use()
    memory, host = gpu.allocate(SIZE), gpu.allocate_host(SIZE)
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed"):
        gpu.record(gpu.wait)
    gpu.upload(memory, host, SIZE)
    gpu.wait()
    gpu.free(memory)
    gpu.free_host(host)
