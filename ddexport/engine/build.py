"""The engines of a bundle: kept where they are just what would be built, else built and put in place."""

from __future__ import annotations

import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddexport.engine.builder import Stage, build_plan
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions, resolve
from ddexport.runtime import __version__, machine
from ddexport.runtime.bundle import TEACHER, TEXT_ROLES, Graph, Manifest, read_manifest, sha256_of
from ddexport.runtime.engines import SCHEMA, BuiltOn, Engine, engine_folder, read_engine
from ddexport.runtime.errors import BundleError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.runtime.records import to_json

DEFAULT_PRECISION = "fp16"
REVISION = 3
"""Raised when this builder changes in a way that makes engines of the same inputs different."""
LOCK = ".lock"


@dataclass(frozen=True)
class Built:
    """An engine in a bundle. `origin` is `built`, or `kept` for one that was there already."""

    plan: Path
    engine: Engine
    origin: str
    seconds: float


def build_engines(
    bundle: Path,
    trt: TensorRT,
    options: BuildOptions,
    precisions: tuple[str, ...] = (),
    roles: tuple[str, ...] = (),
    force: bool = False,
    stage: Stage = lambda name: nullcontext(),
) -> list[Built]:
    """Puts engines of the students and decoders of a bundle into it, each with its sidecar.

    Args:
        precisions: fp16 alone if none is named.
        roles: all but the teacher if none is named.
        force: build even what is in the bundle.

    Raises:
        BundleError: the bundle is damaged, or lacks a precision.
        OptionError: the package or this machine cannot build what is asked.
        VerificationError: a graph does not compute in its precision, or breaks the contract.
        BuildError: TensorRT failed.
        OutputError: the bundle cannot be written.
    """
    options = resolve(options, trt)
    with stage(f"checking {bundle}"):
        manifest = read_manifest(bundle)  # with all hashes: they go into the key
    graphs = select_graphs(manifest, precisions, roles)
    return [_build(bundle, trt, manifest, graph, options, force, stage) for graph in graphs]


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
            f"export them: ddexport onnx {manifest.name} --precision {needed} ...",
        )
    apart = (TEACHER, *TEXT_ROLES)  # ONNX Runtime runs them
    possible = dict.fromkeys(graph.role for graph in manifest.graphs if graph.role not in apart)
    if unknown := [role for role in roles if role not in possible]:
        have = f"it has: {', '.join(possible)}"
        raise BundleError(f"bundle {manifest.name} has no graph {unknown[0]} to build", have)
    return [
        graph
        for precision in wanted
        for graph in manifest.graphs
        if graph.precision == precision and graph.role in (roles or possible)
    ]


def facts_of(graph: Graph, trt: TensorRT, options: BuildOptions) -> dict[str, Any]:
    """What the sidecar of an engine says of how it is made. options: as `resolve` gives them."""
    return {
        "role": graph.role,
        "split": graph.split,
        "precision": graph.precision,
        "source": graph.digest,
        "backend": trt.backend,
        "version": trt.version,
        "platform": machine.this_platform(),
        "targets": options.targets,
        "hardware": options.hardware,
        "version_compatible": options.version_compatible,
        "profiles": options.profiles,
        "options": {name: getattr(options, name) for name in ("workspace", "optimization_level", "tf32")},
    }


def key_of(facts: dict[str, Any], trt: TensorRT) -> str:
    """SHA-256 in hex over all that shapes an engine. Two builds of the same give different bytes."""
    gpu = None if trt.is_rtx or trt.gpu is None else (trt.gpu.name, trt.gpu.target)
    parts = {**facts, "gpu": gpu, "builder": (__version__, REVISION)}
    return hashlib.sha256(to_json(parts).encode()).hexdigest()


def _build(
    bundle: Path,
    trt: TensorRT,
    manifest: Manifest,
    graph: Graph,
    options: BuildOptions,
    force: bool,
    stage: Stage,
) -> Built:
    """The engine of a graph. Of two builds at once the second waits, and keeps what the first built."""
    from filelock import FileLock

    start = time.perf_counter()
    facts = facts_of(graph, trt, options)
    key = key_of(facts, trt)
    folder = bundle / engine_folder(trt.backend, trt.version, options.targets)
    split = f"_split{graph.split}" if graph.split else ""
    path = folder / f"{graph.role}{split}_{graph.precision}.plan"
    sidecar = path.with_suffix(".json")
    make_directory(folder)
    with FileLock(folder / LOCK):
        for leftover in folder.glob(".*.part"):  # under the lock: of a process that was killed
            leftover.unlink()
        engine = None if force else _kept(bundle, sidecar, key)
        if engine:
            return Built(path, engine, "kept", time.perf_counter() - start)
        with atomic_write(path) as stream:
            plan = build_plan(trt, bundle, manifest, graph, options, stream, stage)
            sidecar.unlink(missing_ok=True)  # never a sidecar beside another engine's plan
        seconds, gpu = round(time.perf_counter() - start, 3), None if trt.is_rtx else trt.gpu
        # TensorRT-RTX builds the same on every machine.
        built_on = gpu and BuiltOn(gpu=gpu.name, capability=gpu.target, cuda=machine.cuda().version)
        built = {"file": path.name, **plan._asdict(), "seconds": seconds, "built_on": built_on}
        engine = Engine(schema=SCHEMA, key=key, **facts, **built)
        with atomic_write(sidecar) as stream:
            stream.write(to_json(engine).encode())
    return Built(path, engine, "built", seconds)


def _kept(bundle: Path, sidecar: Path, key: str) -> Engine | None:
    """The engine that is in the bundle already, if it is whole and just what would be built."""
    if not sidecar.exists():
        return None
    try:
        engine = read_engine(bundle, sidecar)
        plan = sidecar.parent / engine.file
        whole = plan.stat().st_size == engine.bytes and sha256_of(plan) == engine.sha256
    except (BundleError, OSError):
        return None  # replaced
    return engine if whole and engine.key == key else None
