"""Runs one plan on requests of any size: staging, splitting, padding, CUDA graphs; nothing is left behind."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
from ddexport.runtime._tensorrt import Context, Plan
from ddexport.runtime.backends._cuda import CudaDevice, host_view
from ddexport.runtime.backends._profiles import Part, parts
from ddexport.runtime.contract import BATCH, dynamic_sizes
from ddexport.runtime.errors import BackendError
from ddexport.runtime.manifest import TensorSpec
from numpy.typing import NDArray

Sizes: TypeAlias = Mapping[str, int]
"""Of the dynamic dimensions, by name."""
Key: TypeAlias = tuple[int, tuple[tuple[str, int], ...] | None]
"""A profile, and the sizes where graphs are recorded."""

MAX_CONTEXTS = 16
"""A context for each set of sizes in use: a recorded graph forbids to change the context it was made from. A
VAR teacher of ten scales has as many sizes of pass, which come in turn."""

logger = logging.getLogger(__name__)


class Staging:
    """One tensor at its largest: page-locked memory on the host, and memory on the device.

    At any size it lies at the beginning of both, without gaps, as engines want it.
    """

    def __init__(self, device: CudaDevice, spec: TensorSpec, largest: Sizes, owner: ExitStack) -> None:
        """largest: of every dynamic dimension."""
        self._device, self.spec = device, spec
        dtype = np.dtype(spec.dtype)
        size = prod(spec.sized(largest)) * dtype.itemsize
        self.address = device.allocate(size)
        owner.callback(device.free, self.address)
        self._host_address = device.allocate_host(size)
        owner.callback(device.free_host, self._host_address)
        self._host: NDArray[Any] = host_view(self._host_address, size).view(dtype)

    def upload(self, array: NDArray[Any], part: Part, sizes: Sizes, stream: int) -> None:
        """Sends the images of a part, and copies of the last one up to its size: a real one, so that padding
        is never odd. array: of the whole request."""
        host = self._view(sizes)
        host[images(self.spec, 0, part.count)] = array[images(self.spec, part.start, part.count)]
        if self._is_batched and part.size > part.count:
            last = images(self.spec, part.count - 1, 1)
            host[images(self.spec, part.count, part.size - part.count)] = host[last]
        self._device.upload(self.address, self._host_address, host.nbytes, stream)

    def download(self, sizes: Sizes, stream: int) -> None:
        self._device.download(self._host_address, self.address, self._view(sizes).nbytes, stream)

    def copy_to(self, array: NDArray[Any], part: Part, sizes: Sizes) -> None:
        """Writes what was downloaded into the images of a part. array: of the whole request."""
        array[images(self.spec, part.start, part.count)] = self._view(sizes)[images(self.spec, 0, part.count)]

    @property
    def _is_batched(self) -> bool:
        return BATCH in self.spec.shape

    def _view(self, sizes: Sizes) -> NDArray[Any]:
        shape = self.spec.sized(sizes)
        return self._host[: prod(shape)].reshape(shape)


def images(spec: TensorSpec, start: int, count: int) -> tuple[slice, ...]:
    """Where some images of a batch lie in a tensor; all of one without a batch, which they share."""
    return tuple(slice(start, start + count) if size == BATCH else slice(None) for size in spec.shape)


def sizes_of(specs: Iterable[TensorSpec], arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The sizes of the dynamic dimensions, the batch with them, of arrays that agree on them."""
    return {
        name: size
        for spec in specs
        for name, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(name, str)
    }


@dataclass
class Lane:
    """A context with the sizes it is kept for, and the graph of its work once that is recorded."""

    context: Context
    runs: int = 0
    graph: Any = None


class Executor:
    """A plan with its buffers and contexts, on one stream; not for several threads at once."""

    def __init__(self, plan: Plan, device: CudaDevice, stream: int, scratch: int, cuda_graphs: bool) -> None:
        """scratch: device memory of `plan.scratch_bytes`. Raises BackendError, and leaves nothing behind."""
        self._plan, self._device, self._stream, self._scratch = plan, device, stream, scratch
        self._records = cuda_graphs and not plan.records_itself
        self._lanes: OrderedDict[Key, Lane] = OrderedDict()
        tensors = (*plan.engine.inputs, *plan.engine.outputs)
        largest = {name: plan.engine.largest(name) for name in dynamic_sizes(tensors)}
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
        """Outputs by name for inputs by name, of any batch size; other dynamic sizes must be a profile's.

        Raises BackendError.
        """
        engine = self._plan.engine
        sizes = sizes_of(engine.inputs, feeds)
        outputs = {spec.name: np.empty(spec.sized(sizes), spec.dtype) for spec in engine.outputs}
        others = {name: size for name, size in sizes.items() if name != BATCH}
        for part in parts(sizes[BATCH], engine.profiles, others):
            self._run_part(part, others | {BATCH: part.size}, feeds, outputs)
        return outputs

    def close(self) -> None:
        """Frees graphs, contexts and buffers."""
        self._owner.close()

    def _staged(self, specs: Sequence[TensorSpec], largest: Sizes, owner: ExitStack) -> list[Staging]:
        return [Staging(self._device, spec, largest, owner) for spec in specs]

    def _run_part(
        self,
        part: Part,
        sizes: Sizes,
        feeds: Mapping[str, NDArray[Any]],
        outputs: dict[str, NDArray[Any]],
    ) -> None:
        try:
            for staging in self._inputs:
                staging.upload(feeds[staging.spec.name], part, sizes, self._stream)
            self._compute(part.profile, sizes)
            for staging in self._outputs:
                staging.download(sizes, self._stream)
        except BaseException:
            with suppress(BackendError):
                self._device.wait(self._stream)  # what is under way uses the buffers
            raise
        self._device.wait(self._stream)
        for staging in self._outputs:
            staging.copy_to(outputs[staging.spec.name], part, sizes)

    def _compute(self, profile: int, sizes: Sizes) -> None:
        lane = self._lane(profile, sizes)
        lane.context.set_sizes(sizes)
        # The first run prepares what a recording must not contain. A size that never returns is not recorded.
        if self._records and lane.runs and lane.graph is None:
            self._record(profile, sizes, lane)
        if lane.graph is not None:
            self._device.replay(lane.graph, self._stream)
        else:
            lane.context.enqueue(self._stream)
        lane.runs += 1

    def _record(self, profile: int, sizes: Sizes, lane: Lane) -> None:
        try:
            lane.graph = self._device.record(lambda: lane.context.enqueue(self._stream), self._stream)
        except BackendError as error:
            logger.warning("CUDA graphs are not used for %s: %s", self._plan.engine.file, error.message)
            self._records = False
            self._lanes.pop(self._key(profile, sizes, recorded=True))
            self._drop_lanes()
            self._lanes[self._key(profile, sizes, recorded=False)] = lane

    def _lane(self, profile: int, sizes: Sizes) -> Lane:
        key = self._key(profile, sizes, self._records)
        if key in self._lanes:
            self._lanes.move_to_end(key)
            return self._lanes[key]
        while len(self._lanes) >= MAX_CONTEXTS:
            self._free(self._lanes.popitem(last=False)[1])
        context = self._plan.context(profile, self._stream, self._scratch)
        context.bind({staging.spec.name: staging.address for staging in (*self._inputs, *self._outputs)})
        self._lanes[key] = Lane(context)
        return self._lanes[key]

    def _key(self, profile: int, sizes: Sizes, recorded: bool) -> Key:
        return profile, tuple(sorted(sizes.items())) if recorded else None

    def _drop_lanes(self) -> None:
        while self._lanes:
            self._free(self._lanes.popitem()[1])

    def _free(self, lane: Lane) -> None:
        try:
            if lane.graph is not None:
                self._device.free_graph(lane.graph)
        finally:
            lane.context.close()
