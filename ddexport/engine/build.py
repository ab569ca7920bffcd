"""The engines of a bundle: kept where they are just what would be built, else built and put in place."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ddexport.engine.builder import Plan, Report, Stage, build_plan
from ddexport.engine.checks import check_options
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.runtime import machine
from ddexport.runtime.bundle import ROLES, Graph, Manifest, read_manifest, sha256_of
from ddexport.runtime.engines import SCHEMA, BuiltOn, Engine, engine_folder, read_engine
from ddexport.runtime.errors import BundleError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.runtime.records import to_json

DEFAULT_PRECISION = "fp16"
REVISION = 2
"""Raised when this builder changes in a way that makes engines of the same inputs different."""
LOCK = ".lock"


@dataclass(frozen=True)
class Built:
    """An engine in a bundle. `origin` is `built`, or `kept` for one that was there already."""

    plan: Path
    engine: Engine
    origin: str
    seconds: float


@contextmanager
def silent(name: str) -> Iterator[Report]:
    """Progress that nobody sees."""
    yield lambda steps: None


def build_engines(
    bundle: Path,
    trt: TensorRT,
    options: BuildOptions,
    precisions: tuple[str, ...] = (),
    roles: tuple[str, ...] = (),
    force: bool = False,
    stage: Stage = lambda name: nullcontext(),
    progress: Callable[[str], AbstractContextManager[Report]] = silent,
) -> list[Built]:
    """Puts engines of the students and decoders of a bundle into it, each with its sidecar.

    Args:
        precisions: fp16 alone if none is named.
        roles: student and decoder if none is named.
        force: build even what is in the bundle.

    Raises:
        BundleError: the bundle is damaged, or lacks a precision.
        OptionError: the package or this machine cannot build what is asked.
        VerificationError: a graph does not compute in its precision, or breaks the contract.
        BuildError: TensorRT failed.
        OutputError: the bundle cannot be written.
    """
    targets = check_options(options, trt)
    with stage(f"checking {bundle}"):
        manifest = read_manifest(bundle)  # with all hashes: they go into the key
    graphs = select_graphs(manifest, precisions, roles)
    job = _Job(bundle, manifest, trt, options, targets, force, stage, progress)
    return [job.run(graph) for graph in graphs]


def select_graphs(
    manifest: Manifest, precisions: tuple[str, ...] = (), roles: tuple[str, ...] = ()
) -> list[Graph]:
    """The graphs to build, precision by precision. Raises BundleError for what the bundle has not.

    The teacher is never built: its cache travels at every pass, and ONNX Runtime keeps that on the device.
    """
    wanted = precisions or (DEFAULT_PRECISION,)
    missing = [precision for precision in wanted if precision not in manifest.precisions]
    if missing:
        needed = ",".join(dict.fromkeys((*manifest.precisions, *missing)))
        available = ", ".join(manifest.precisions)
        raise BundleError(
            f"bundle {manifest.name} has no graphs in {', '.join(missing)}; it has {available}",
            f"export them: ddexport onnx --model {manifest.name} --precision {needed} ...",
        )
    return [
        graph
        for precision in wanted
        for graph in manifest.graphs
        if graph.precision == precision and graph.role in (roles or ROLES)
    ]


def engine_key(
    manifest: Manifest, graph: Graph, trt: TensorRT, options: BuildOptions, targets: tuple[str, ...]
) -> str:
    """SHA-256 in hex over all that shapes an engine. Two builds of the same give different bytes."""
    gpu = None if trt.is_rtx else trt.gpu
    parts = {
        "source": graph.digest,
        "precision": graph.precision,
        "tensors": manifest.tensors(graph),
        "options": options.canonical(),
        "version_compatible": options.version_compatible,
        "hardware": options.hardware,
        "profiles": [str(profile) for profile in options.profiles],
        "backend": trt.backend,
        "version": trt.version,
        "targets": targets,
        "gpu": gpu and [gpu.name, gpu.target],
        "platform": machine.this_platform(),
        "builder": [metadata.version("ddexport"), REVISION],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class _Job:
    bundle: Path
    manifest: Manifest
    trt: TensorRT
    options: BuildOptions
    targets: tuple[str, ...]
    force: bool
    stage: Stage
    progress: Callable[[str], AbstractContextManager[Report]]

    def run(self, graph: Graph) -> Built:
        """The engine of a graph. Of two builds at once the second waits, and keeps what the first built."""
        from filelock import FileLock

        start = time.perf_counter()
        key = engine_key(self.manifest, graph, self.trt, self.options, self.targets)
        folder = self.bundle / engine_folder(self.trt.backend, self.trt.version, self.targets)
        split = f"_split{graph.split}" if graph.split else ""
        plan = folder / f"{graph.role}{split}_{graph.precision}.plan"
        sidecar = plan.with_suffix(".json")
        make_directory(folder)
        with FileLock(folder / LOCK):
            for leftover in folder.glob(".*.part"):  # under the lock: of a process that was killed
                leftover.unlink()
            engine = None if self.force else self._kept(sidecar, key)
            if engine:
                return Built(plan, engine, "kept", time.perf_counter() - start)
            with atomic_write(plan) as stream:
                built = build_plan(
                    self.trt, self.bundle, self.manifest, graph, self.options, self.targets, stream,
                    self.stage, self.progress,
                )  # fmt: skip
                sidecar.unlink(missing_ok=True)  # never a sidecar beside another engine's plan
            engine = self._sidecar(graph, key, plan.name, built)
            with atomic_write(sidecar) as stream:
                stream.write(to_json(engine).encode())
        return Built(plan, engine, "built", time.perf_counter() - start)

    def _kept(self, sidecar: Path, key: str) -> Engine | None:
        """The engine that is in the bundle already, if it is whole and just what would be built."""
        if not sidecar.exists():
            return None
        try:
            engine = read_engine(self.bundle, sidecar)
            plan = sidecar.parent / engine.file
            whole = plan.stat().st_size == engine.bytes and sha256_of(plan) == engine.sha256
        except (BundleError, OSError):
            return None  # replaced
        return engine if whole and engine.key == key else None

    def _sidecar(self, graph: Graph, key: str, name: str, plan: Plan) -> Engine:
        gpu = None if self.trt.is_rtx else self.trt.gpu  # TensorRT-RTX builds the same on every machine
        driver = machine.cuda().version
        return Engine(
            schema=SCHEMA,
            role=graph.role,
            split=graph.split,
            precision=graph.precision,
            file=name,
            sha256=plan.sha256,
            bytes=plan.bytes,
            source=graph.digest,
            backend=self.trt.backend,
            version=self.trt.version,
            platform=machine.this_platform(),
            targets=self.targets,
            hardware=self.options.hardware,
            version_compatible=self.options.version_compatible,
            stripped=self.options.strip_plan,
            profiles=self.options.profiles,
            layers=plan.layers,
            options=self.options.canonical(),
            key=key,
            built_on=gpu and BuiltOn(gpu=gpu.name, capability=gpu.target, cuda=driver),
            seconds=round(plan.seconds, 3),
        )
