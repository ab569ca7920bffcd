"""The engines of a bundle: looked for in the bundle and in the cache, else built, and put in place."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ddexport.engine.builder import Plan, Report, Stage, build_plan
from ddexport.engine.cache import EngineCache, cache_key, copy_plan
from ddexport.engine.checks import check_options
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.engine.profiles import profiles_for
from ddexport.runtime.engines import Engine, engine_folder, graph_digest, read_engine, this_platform
from ddexport.runtime.errors import BundleError, OutputError
from ddexport.runtime.machine import Gpu, Machine
from ddexport.runtime.manifest import Graph, Manifest, read_manifest, sha256_of

DEFAULT_PRECISION = "fp16"
REVISION = 1
"""Raised when this builder changes in a way that makes engines of the same inputs different."""
LOCK = ".lock"
_UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
)


@dataclass(frozen=True)
class Built:
    """An engine in a bundle. `origin` is `built`, `cache`, or `kept` for one that was there already."""

    plan: Path
    engine: Engine
    origin: str
    seconds: float


@contextmanager
def silent(name: str) -> Iterator[Report]:
    """The progress of nobody who looks."""
    yield lambda steps: None


def build_engines(
    bundle: Path,
    trt: TensorRT,
    options: BuildOptions,
    precisions: tuple[str, ...] = (),
    roles: tuple[str, ...] = (),
    force: bool = False,
    cache: EngineCache | None = None,
    stage: Stage = lambda name: nullcontext(),
    progress: Callable[[str], AbstractContextManager[Report]] = silent,
) -> list[Built]:
    """Puts engines of the graphs of a bundle into it, each with its sidecar.

    Args:
        precisions: fp16 alone if none is named.
        roles: all of the bundle if none is named.
        force: build even what is in the bundle or in the cache.
        cache: where to look and to store; None for neither.

    Raises:
        BundleError: the bundle is damaged, or lacks a precision or role.
        OptionError: the package or this machine cannot build what is asked.
        VerificationError: a graph does not compute in its precision, or breaks the contract.
        BuildError: TensorRT failed.
        OutputError: the bundle cannot be written.
    """
    targets = check_options(options, trt)
    with stage(f"checking {bundle}"):
        manifest = read_manifest(bundle)  # with all hashes: they go into the key
    graphs = select_graphs(manifest, precisions, roles)
    job = _Job(bundle, manifest.name, trt, options, targets, force, cache, stage, progress)
    return [job.for_graph(graph, manifest).run(graph) for graph in graphs]


def select_graphs(
    manifest: Manifest, precisions: tuple[str, ...] = (), roles: tuple[str, ...] = ()
) -> list[Graph]:
    """The graphs to build, precision by precision. Raises BundleError for what the bundle has not."""
    available = manifest.precisions
    wanted = precisions or (DEFAULT_PRECISION,)
    missing = [precision for precision in wanted if precision not in available]
    if missing:
        needed = ",".join(dict.fromkeys((*available, *missing)))
        raise BundleError(
            f"bundle {manifest.name} has no graphs in {', '.join(missing)}; it has {', '.join(available)}",
            f"export them: ddexport onnx --model {manifest.name} --precision {needed} ...",
        )
    in_bundle = tuple(dict.fromkeys(graph.role for graph in manifest.graphs))
    unknown = [role for role in roles if role not in in_bundle]
    if unknown:
        raise BundleError(
            f"bundle {manifest.name} has no {', '.join(unknown)}", f"its graphs are: {', '.join(in_bundle)}"
        )
    made = {(graph.role, graph.precision) for graph in manifest.graphs}
    lacking = [f"{role} in {each}" for each in wanted for role in roles if (role, each) not in made]
    if lacking:  # a teacher may be there in the first precision alone
        raise BundleError(f"bundle {manifest.name} has no {', '.join(lacking)}", "export the bundle again")
    return [
        graph
        for precision in wanted
        for graph in manifest.graphs
        if graph.precision == precision and graph.role in (roles or in_bundle)
    ]


def _stem(graph: Graph) -> str:
    return f"{graph.key.replace('@', '_split')}_{graph.precision}"


def key_parts(graph: Graph, trt: TensorRT, options: BuildOptions, targets: tuple[str, ...]) -> dict[str, Any]:
    """All that shapes an engine, as JSON data: the content of its cache key."""
    full = not trt.is_rtx and trt.gpu is not None
    return {
        "source": graph_digest(graph),
        "precision": graph.precision,
        "tensors": [dataclasses.asdict(spec) for spec in (*graph.inputs, *graph.outputs)],
        "options": options.canonical(),
        "version_compatible": options.version_compatible,
        "hardware": options.hardware,
        "profiles": [list(profile.to_dict().values()) for profile in options.profiles],
        "backend": trt.backend,
        "version": trt.version,
        "targets": targets,
        "gpu": [trt.gpu.name, trt.gpu.target] if full and trt.gpu else None,
        "platform": this_platform(),
        "builder": [metadata.version("ddexport"), REVISION],
    }


@dataclass(frozen=True)
class _Job:
    bundle: Path
    model: str
    trt: TensorRT
    options: BuildOptions
    targets: tuple[str, ...]
    force: bool
    cache: EngineCache | None
    stage: Stage
    progress: Callable[[str], AbstractContextManager[Report]]

    def for_graph(self, graph: Graph, manifest: Manifest) -> _Job:
        """The job with profiles that say all sizes of a graph."""
        profiles = profiles_for(graph, manifest, self.options.profiles)
        return dataclasses.replace(self, options=dataclasses.replace(self.options, profiles=profiles))

    def run(self, graph: Graph) -> Built:
        start = time.perf_counter()
        key = cache_key(key_parts(graph, self.trt, self.options, self.targets))
        folder = self.bundle / engine_folder(self.trt.backend, self.trt.version, self.targets)
        with ExitStack() as held:
            partial = held.enter_context(_writing(folder, f"{_stem(graph)}.plan"))
            sidecar = folder / f"{_stem(graph)}.json"
            kept = None if self.force else self._kept(sidecar, key)
            if kept:
                return Built(folder / kept.file, kept, "kept", time.perf_counter() - start)
            if self.cache:
                held.enter_context(self.cache.lock(key))
            engine, origin = self._make(graph, key, partial)
            plan = folder / engine.file
            sidecar.unlink(missing_ok=True)  # never a sidecar beside another engine's plan
            partial.replace(plan)
            _write_text(sidecar, engine.to_json())
        return Built(plan, engine, origin, time.perf_counter() - start)

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

    def _make(self, graph: Graph, key: str, partial: Path) -> tuple[Engine, str]:
        """The plan at `partial`, from the cache or the builder, and its sidecar."""
        name = f"{_stem(graph)}.plan"
        entry = self.cache.find(key) if self.cache and not self.force else None
        if entry:
            with self.stage(f"copying {name} from the cache"):
                copy_plan(entry, partial)
            return dataclasses.replace(entry.engine, file=name, role=graph.key), "cache"
        plan = build_plan(
            self.trt, self.bundle, graph, self.options, self.targets, partial, self.stage, self.progress
        )
        engine = self._sidecar(graph, key, name, plan)
        if self.cache:
            with self.stage("storing it in the cache"):
                self.cache.store(key, partial, engine, self.model)
        return engine, "built"

    def _sidecar(self, graph: Graph, key: str, name: str, plan: Plan) -> Engine:
        return Engine(
            role=graph.key,
            precision=graph.precision,
            file=name,
            sha256=plan.sha256,
            bytes=plan.bytes,
            source=graph_digest(graph),
            backend=self.trt.backend,
            version=self.trt.version,
            platform=this_platform(),
            targets=self.targets,
            hardware=self.options.hardware,
            version_compatible=self.options.version_compatible,
            profiles=self.options.profiles,
            inputs=graph.inputs,
            outputs=graph.outputs,
            layers=plan.layers,
            options=self.options.canonical(),
            key=key,
            made_with=_made_with(self.trt.gpu),
            seconds=round(plan.seconds, 3),
        )


def _made_with(gpu: Gpu | None) -> dict[str, str]:
    """The GPU at hand. Nothing for a build without one, which is the same on every machine."""
    if gpu is None:
        return {}
    driver = Machine().driver
    return {"gpu": gpu.name, "capability": gpu.target, **({"driver": driver} if driver else {})}


@contextmanager
def _writing(folder: Path, name: str) -> Iterator[Path]:
    """Holds the folder's lock, and yields a path for a new `name`, which is gone afterwards if still there.

    Partial files found under the lock are what a killed process left.
    """
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
            partial = folder / f".{name}.partial"
            try:
                yield partial
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            free = shutil.disk_usage(folder.parents[1]).free / 2**30
            raise OutputError(
                f"cannot write engines to {folder}: {error.strerror} ({free:.1f} GiB free)",
                "make room, or make the bundle writable",
            ) from error
        raise


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
