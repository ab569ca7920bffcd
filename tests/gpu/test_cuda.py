"""The layer over cuda-bindings on a real device: copies, recordings, errors with names, memory given back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ddexport.runtime.backends._cuda import CudaDevice, CudaError, host_view
from ddexport.runtime.machine import Machine

pytestmark = pytest.mark.gpu

SIZE = 1 << 20


@pytest.fixture
def device(gpu_machine: Machine) -> CudaDevice:
    return CudaDevice(gpu_machine.gpus[0].index)


@pytest.fixture
def stream(device: CudaDevice) -> Iterator[int]:
    made = device.new_stream()
    yield made
    device.free_stream(made)


def test_what_goes_up_comes_down(device: CudaDevice, stream: int) -> None:
    """Plainly, and by a recorded graph that sees what the host memory holds when it is replayed."""
    source, target, memory = device.allocate_host(SIZE), device.allocate_host(SIZE), device.allocate(SIZE)

    def there_and_back() -> None:
        device.upload(memory, source, SIZE, stream)
        device.download(target, memory, SIZE, stream)

    graph = device.record(there_and_back, stream)
    rng = np.random.default_rng(0)
    for run in (there_and_back, lambda: device.replay(graph, stream), lambda: device.replay(graph, stream)):
        host_view(source, SIZE)[:] = rng.integers(0, 256, SIZE, dtype=np.uint8)
        host_view(target, SIZE)[:] = 0
        run()
        device.wait(stream)
        np.testing.assert_array_equal(host_view(target, SIZE), host_view(source, SIZE))
    device.free_graph(graph)
    device.free(memory)
    device.free_host(source)
    device.free_host(target)


def test_a_broken_recording_leaves_the_stream_usable(device: CudaDevice, stream: int) -> None:
    """Waiting is forbidden while recording, and breaks it."""
    memory, host = device.allocate(SIZE), device.allocate_host(SIZE)
    with pytest.raises(CudaError, match="cudaStreamSynchronize failed"):
        device.record(lambda: device.wait(stream), stream)
    device.upload(memory, host, SIZE, stream)
    device.wait(stream)
    device.free(memory)
    device.free_host(host)


def test_errors_have_names(device: CudaDevice) -> None:
    with pytest.raises(CudaError, match=r"cudaMalloc failed: .*\(cudaErrorMemoryAllocation\)"):
        device.allocate(1 << 50)
    with pytest.raises(CudaError, match=r"cudaSetDevice failed: .*\(cudaErrorInvalidDevice\)"):
        CudaDevice(999)


def test_memory_is_given_back(device: CudaDevice) -> None:
    before = device.free_memory()
    held = [device.allocate(64 << 20) for _ in range(4)]
    assert before - device.free_memory() >= 256 << 20
    for address in held:
        device.free(address)
    assert before - device.free_memory() < 16 << 20
