"""Time and memory on a GPU, by a made-up `torch.cuda` whose clock and memory are known."""

from __future__ import annotations

import pytest

from ddexport.validate.bench.clock import Clock, CudaClock, clock_of

MIB = 1 << 20


class MadeUpCuda:
    """A device with work in its queue: an event holds the device's time only once that is done."""

    def __init__(self):
        self.now, self.queued, self.free = 0.0, 0.0, 1000 * MIB

    def set_device(self, index):
        self.index = index

    def synchronize(self):
        self.now, self.queued = self.now + self.queued, 0.0

    def mem_get_info(self, index):
        assert index == self.index
        return self.free, 2000 * MIB

    def Event(self, enable_timing):
        assert enable_timing
        return MadeUpEvent(self)


class MadeUpEvent:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.at = self.cuda.now + self.cuda.queued

    def synchronize(self):
        self.cuda.synchronize()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_events_around_all_that_a_call_queues():
    cuda = MadeUpCuda()
    clock = CudaClock(1, cuda)

    def work(seconds, mib):
        cuda.queued += seconds
        cuda.free -= mib * MIB
        return seconds

    cuda.queued = 7.0  # of what ran before: it does not count
    for seconds, mib, taken in ((2.0, 100, 100), (3.0, 0, 100), (1.0, 50, 150), (1.0, -50, 150)):
        result, spent, memory = clock.measure(lambda seconds=seconds, mib=mib: work(seconds, mib))
        assert result == seconds and spent == pytest.approx(seconds)
        assert memory.gpu == taken and (memory.host is None or memory.host > 10)


def test_a_cpu_has_no_memory_of_a_gpu():
    result, spent, memory = clock_of("cpu").measure(lambda: sum(range(100_000)))
    assert type(clock_of("cpu")) is Clock and result and spent > 0 and memory.gpu is None
