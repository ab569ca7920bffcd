"""The bundle's TensorRT engines, of full TensorRT and of TensorRT-RTX, on an NVIDIA GPU: `ddexport trt`."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from ddexport.runtime._tensorrt import Plan, cache_file
from ddexport.runtime.backends._base import Arrays, Backend
from ddexport.runtime.backends._cuda import CudaDevice
from ddexport.runtime.backends._executor import Executor
from ddexport.runtime.engines import Found
from ddexport.runtime.errors import BackendError, BundleError
from ddexport.runtime.fit import Build, Fit, builds, fit, precision_rank, rebuild_command
from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import ROLES, Graph, Manifest
from ddexport.runtime.options import Options
from ddexport.runtime.selection import Candidate

SPEED = 100

logger = logging.getLogger(__name__)


class TensorRt(Backend):
    """Keeps one engine a role, all on one stream of one device."""

    accepts = frozenset({"device", "cuda_graphs"})

    @classmethod
    def available(cls) -> str | None:
        return None  # `open` names a missing package together with all else that does not fit

    @classmethod
    def candidates(
        cls, root: Path, manifest: Manifest, machine: Machine, options: Options, precision: str | None
    ) -> list[Candidate]:
        made, errors = builds(root)
        damaged = tuple(error.message for error in errors)
        wanted = [build for build in made if precision in (None, build.precision)]
        if not wanted:
            why = damaged or (f"no engines are built{f' in {precision}' if precision else ''}",)
            best = precision or min(manifest.precisions, key=precision_rank)
            remedy = f"build them: {rebuild_command(root, None, machine, precision=best)}"
            return [Candidate("tensorrt", precision or "", options, SPEED, why, (), remedy)]
        return [_candidate(root, manifest, build, machine, options) for build in wanted]

    @property
    def provider(self) -> str | None:
        return self._build.any_engine.backend if self._is_open else None

    @property
    def batch_size(self) -> int | None:
        engines = [found.engine for found in self._build.engines.values()] if self._is_open else []
        return min((engine.largest_batch for engine in engines), default=None)

    def _open_impl(self) -> None:
        index = self.options.device or 0
        self._build = self._fitting(index)
        plans = {role: _read_plan(self._build.engines[role]) for role in self.graphs}
        self._lock = threading.Lock()
        with ExitStack() as owner:
            self._device = CudaDevice(index)
            stream = self._device.new_stream()
            owner.callback(self._device.free_stream, stream)
            self._executors = self._executors_of(plans, stream, owner)
            self._owner = owner.pop_all()

    def _executors_of(
        self, contents: dict[str, bytes], stream: int, owner: ExitStack
    ) -> Mapping[str, Executor]:
        cuda_graphs = self.options.cuda_graphs is not False
        target = self.machine.gpus[self._device.index].target
        plans = {}
        for role in list(contents):
            engine = self._build.engines[role].engine
            # The plan is dropped once it is loaded: it is as large as the weights.
            plans[role] = Plan(
                engine, contents.pop(role), cuda_graphs=cuda_graphs, cache=cache_file(engine, target)
            )
            owner.callback(plans[role].close)
        # The roles run one after the other, so that they can work in the same memory.
        size = max(plan.scratch_bytes for plan in plans.values())
        scratch = self._device.allocate(size) if size else 0
        if scratch:
            owner.callback(self._device.free, scratch)
        executors = {}
        for role, plan in plans.items():
            executors[role] = Executor(plan, self._device, stream, scratch, cuda_graphs)
            owner.callback(executors[role].close)
        return executors

    def _close_impl(self) -> None:
        with self._lock:
            self._device.use()
            self._executors = {}
            self._owner.close()

    def _run_impl(self, role: str, feeds: Arrays) -> Arrays:
        with self._lock:
            self._device.use()
            return self._executors[role].run(feeds)

    def _fitting(self, device: int) -> Build:
        """The best build that fits. Raises BackendError with everything that does not."""
        precision = next(iter(self.graphs.values())).precision
        made, errors = builds(self.root)
        wanted = [build for build in made if build.precision == precision]
        if not wanted:
            raise BackendError(
                f"{self.root} has no engines in {precision}"
                + "".join(f"; {error.message}" for error in errors),
                f"build them: {rebuild_command(self.root, None, self.machine, device, precision)}",
            )
        found = [(build, fit(build, self.graphs, self.machine, device)) for build in wanted]
        able = [(build, result) for build, result in found if not result.obstacles]
        if not able:
            raise BackendError(
                "; ".join(_explained(build, result) for build, result in found),
                _remedy(self.root, *found[0], self.machine, device),
            )
        build, result = min(able, key=lambda pair: len(pair[1].doubts))
        for remark in (*result.doubts, *result.notes):
            logger.warning("engines %s: %s", build.folder, remark)
        return build


def _candidate(root: Path, manifest: Manifest, build: Build, machine: Machine, options: Options) -> Candidate:
    device = options.device or 0
    if build.precision not in manifest.precisions:
        result = Fit((f"the bundle has no graphs in {build.precision}, so these are of another one",))
    else:
        graphs: Mapping[str, Graph] = {role: manifest.graph(role, build.precision) for role in ROLES}
        result = fit(build, graphs, machine, device)
    return Candidate(
        backend="tensorrt",
        precision=build.precision,
        options=options,
        speed=SPEED,
        why_not=tuple(f"{build.folder}: {why}" for why in result.obstacles),
        doubts=tuple(f"{build.folder}: {doubt}" for doubt in result.doubts),
        remedy=_remedy(root, build, result, machine, device),
    )


def _remedy(root: Path, build: Build, result: Fit, machine: Machine, device: int) -> str:
    if result.misfits or result.doubts:
        return f"build for this machine: {rebuild_command(root, build, machine, device)}"
    return ""  # new engines would not run either


def _explained(build: Build, result: Fit) -> str:
    return f"engines {build.folder} in {build.precision} do not fit this machine: " + "; ".join(
        result.obstacles
    )


def _read_plan(found: Found) -> bytes:
    """The plan, if it is the one that its sidecar describes; it was made to be trusted once it is loaded."""
    engine = found.engine
    try:
        with found.plan.open("rb") as stream:
            content = stream.read(engine.bytes + 1)
    except OSError as error:
        raise BundleError(f"{found.plan} cannot be read: {error.strerror}", "Build it again.") from error
    if hashlib.sha256(content).hexdigest() != engine.sha256:
        raise BundleError(
            f"the SHA-256 of {found.plan.name} is not the one in its sidecar",
            "Do not trust this engine: build it again with ddexport trt, and --force.",
        )
    return content


ENGINE = TensorRt
