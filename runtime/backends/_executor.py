"""Runs one plan on requests of any size: staging, splitting, padding, CUDA graphs; nothing is left behind."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime._tensorrt import Context, Plan
from runtime.backends._cuda import CudaDevice, host_view
from runtime.backends._profiles import Part, parts
from runtime.errors import BackendError
from runtime.manifest import TensorSpec

MAX_CONTEXTS = 8
"""A context for each batch size in use: a recorded graph forbids to change the context it was made from."""

logger = logging.getLogger(__name__)


class Staging:
    """One tensor at its largest: page-locked memory on the host, and memory on the device."""

    def __init__(self, device: CudaDevice, spec: TensorSpec, largest: int, owner: ExitStack) -> None:
        self._device, self.name = device, spec.name
        shape = (largest, *cast("tuple[int, ...]", spec.shape[1:]))
        dtype = np.dtype(spec.dtype)
        size = prod(shape) * dtype.itemsize
        self._row = size // largest
        self.address = device.allocate(size)
        owner.callback(device.free, self.address)
        self._host_address = device.allocate_host(size)
        owner.callback(device.free_host, self._host_address)
        self._host: NDArray[Any] = host_view(self._host_address, size).view(dtype).reshape(shape)

    def upload(self, rows: NDArray[Any], size: int, stream: int) -> None:
        """Sends rows, and copies of the last one up to `size`: a real row, so that padding is never odd."""
        self._host[: len(rows)] = rows
        self._host[len(rows) : size] = rows[-1]
        self._device.upload(self.address, self._host_address, size * self._row, stream)

    def download(self, count: int, stream: int) -> None:
        self._device.download(self._host_address, self.address, count * self._row, stream)

    def rows(self, count: int) -> NDArray[Any]:
        """What was downloaded; valid until the next download."""
        return self._host[:count]


@dataclass
class Lane:
    """A context with the batch size it is kept for, and the graph of its work once that is recorded."""

    context: Context
    runs: int = 0
    graph: Any = None


class Executor:
    """A plan with its buffers and contexts, on one stream; not for several threads at once."""

    def __init__(self, plan: Plan, device: CudaDevice, stream: int, scratch: int, cuda_graphs: bool) -> None:
        """scratch: device memory of `plan.scratch_bytes`. Raises BackendError, and leaves nothing behind."""
        self._plan, self._device, self._stream, self._scratch = plan, device, stream, scratch
        self._records = cuda_graphs and not plan.records_itself
        self._lanes: OrderedDict[tuple[int, int | None], Lane] = OrderedDict()
        largest = plan.engine.largest_batch
        with ExitStack() as owner:
            self._inputs = self._staged(plan.engine.inputs, largest, owner)
            self._outputs = self._staged(plan.engine.outputs, largest, owner)
            owner.callback(self._drop_lanes)
            self._owner = owner.pop_all()

    @property
    def recorded(self) -> int:
        """How many CUDA graphs are kept."""
        return sum(lane.graph is not None for lane in self._lanes.values())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name for inputs by name, of any batch size. Raises BackendError."""
        count = len(next(iter(feeds.values())))
        outputs = {
            spec.name: np.empty((count, *cast("tuple[int, ...]", spec.shape[1:])), spec.dtype)
            for spec in self._plan.engine.outputs
        }
        for part in parts(count, self._plan.engine.profiles):
            self._run_part(part, feeds, outputs)
        return outputs

    def close(self) -> None:
        """Frees graphs, contexts and buffers."""
        self._owner.close()

    def _staged(self, specs: Sequence[TensorSpec], largest: int, owner: ExitStack) -> list[Staging]:
        return [Staging(self._device, spec, largest, owner) for spec in specs]

    def _run_part(
        self, part: Part, feeds: Mapping[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]
    ) -> None:
        rows = slice(part.start, part.start + part.count)
        try:
            for staging in self._inputs:
                staging.upload(feeds[staging.name][rows], part.size, self._stream)
            self._compute(part)
            for staging in self._outputs:
                staging.download(part.count, self._stream)
        except BaseException:
            with suppress(BackendError):
                self._device.wait(self._stream)  # what is under way uses the buffers
            raise
        self._device.wait(self._stream)
        for staging in self._outputs:
            outputs[staging.name][rows] = staging.rows(part.count)

    def _compute(self, part: Part) -> None:
        lane = self._lane(part)
        lane.context.set_batch(part.size)
        # The first run prepares what a recording must not contain. A size that never returns is not recorded.
        if self._records and lane.runs and lane.graph is None:
            self._record(part, lane)
        if lane.graph is not None:
            self._device.replay(lane.graph, self._stream)
        else:
            lane.context.enqueue(self._stream)
        lane.runs += 1

    def _record(self, part: Part, lane: Lane) -> None:
        try:
            lane.graph = self._device.record(lambda: lane.context.enqueue(self._stream), self._stream)
        except BackendError as error:
            logger.warning("CUDA graphs are not used for %s: %s", self._plan.engine.file, error.message)
            self._records = False
            self._lanes.pop(self._key(part, recorded=True))
            self._drop_lanes()
            self._lanes[self._key(part, recorded=False)] = lane

    def _lane(self, part: Part) -> Lane:
        key = self._key(part, self._records)
        if key in self._lanes:
            self._lanes.move_to_end(key)
            return self._lanes[key]
        while len(self._lanes) >= MAX_CONTEXTS:
            self._free(self._lanes.popitem(last=False)[1])
        context = self._plan.context(part.profile, self._stream, self._scratch)
        context.bind({staging.name: staging.address for staging in (*self._inputs, *self._outputs)})
        self._lanes[key] = Lane(context)
        return self._lanes[key]

    def _key(self, part: Part, recorded: bool) -> tuple[int, int | None]:
        return part.profile, part.size if recorded else None

    def _drop_lanes(self) -> None:
        while self._lanes:
            self._free(self._lanes.popitem()[1])

    def _free(self, lane: Lane) -> None:
        try:
            if lane.graph is not None:
                self._device.free_graph(lane.graph)
        finally:
            lane.context.close()
