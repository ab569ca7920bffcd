"""One graph in, one plan out: the same code for TensorRT 10 and 11 and TensorRT-RTX."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ddexport.engine.callbacks import Tracker, monitor_to
from ddexport.engine.checks import check_targets, wanted_flags
from ddexport.engine.module import TensorRT
from ddexport.engine.network import (
    by_type,
    check_contract,
    check_precision,
    layers_of_network,
    layers_of_onnx,
)
from ddexport.engine.options import BuildOptions
from ddexport.runtime.backends.tensorrt import logger_to
from ddexport.runtime.bundle import Graph, Manifest, TensorSpec
from ddexport.runtime.engines import DEFAULT_TARGET, Profile
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write

Stage = Callable[[str], AbstractContextManager[None]]
Report = Callable[[int], None]
"""Told how many steps a build has done, several times a second, in the thread that asked for the build."""

log = logging.getLogger(__name__)

CHUNK = 1 << 24
_HINTS = (
    ("workspace", "give the builder more scratch memory: leave --workspace out, or --workspace 4GB"),
    ("CUDA_SUCCESS", "this build needs a GPU with its driver: build on the target machine"),
    ("cudaError 35", "this build needs a GPU with its driver: build on the target machine"),
    ("out of memory", "the GPU is out of memory: use a smaller --batch or --workspace, or free the GPU"),
)


class BuildError(DDError):
    """TensorRT could not build an engine, or logged an error while it did."""


@dataclass(frozen=True)
class Plan:
    """A plan on disk: its hash and size, the layers that compute by type, and the seconds it took."""

    sha256: str
    bytes: int
    layers: Mapping[str, int]
    seconds: float


def build_plan(
    trt: TensorRT,
    root: Path,
    manifest: Manifest,
    graph: Graph,
    options: BuildOptions,
    targets: tuple[str, ...],
    stream: IO[bytes],
    stage: Stage,
    progress: Callable[[str], AbstractContextManager[Report]],
) -> Plan:
    """Builds the engine of a graph of the bundle `root` and writes its plan to a stream.

    `options` and `targets` must have passed `check_options`. Ctrl-C stops the build and raises
    KeyboardInterrupt; nothing useful is in the stream then.

    Raises:
        BundleError: the graph takes weights from a file that the manifest does not list.
        VerificationError: the network has other types than asked for, or not the contract's tensors.
        OptionError: a target cannot run the graph.
        BuildError: TensorRT failed, or logged an error.
    """
    start = time.perf_counter()
    module, errors = trt.module, list[str]()
    logger = logger_to(module, errors)
    builder = module.Builder(logger)
    inputs, outputs = manifest.tensors(graph)
    with stage(f"parsing {graph.file}"):
        in_graph = layers_of_onnx(root, graph)  # before the network: each holds all weights for a while
        flags = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = module.OnnxParser(network, logger)  # owns weights: must outlive the build
        _parse(parser, root / graph.file, errors)
        in_network = layers_of_network(network)
        check_precision(graph, in_graph, in_network)
        check_contract(graph, inputs, outputs, network)
        check_targets(targets, in_network)
    config = builder.create_builder_config()
    _configure(trt, config, options, targets)
    for profile in options.profiles:
        _add_profile(builder, config, inputs, profile)
    cache = _timing_cache(config, options)
    _require_clean(errors, graph)
    name = f"{graph.role} {graph.precision} with {trt}"
    with stage(f"building {name}"), progress(name) as report:
        serialized = _run(module, builder, network, config, report)
        if serialized is None or not serialized.nbytes:
            _require_clean(errors, graph)
            raise BuildError(f"TensorRT built no engine of {graph.file}, and did not say why", "try --debug")
    _require_clean(errors, graph)
    del network, parser  # gigabytes
    with stage(f"writing the engine of {graph.file}"):
        sha256 = _write(memoryview(serialized), stream)
    if cache is not None and options.timing_cache is not None:
        with atomic_write(options.timing_cache) as file:
            file.write(bytes(memoryview(config.get_timing_cache().serialize())))
    return Plan(sha256, serialized.nbytes, by_type(in_network), time.perf_counter() - start)


def _parse(parser: Any, path: Path, logged: list[str]) -> None:
    if parser.parse_from_file(str(path)) and not logged:
        return
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)] or logged
    raise BuildError(
        f"TensorRT cannot read {path.name}: {_short(errors[0]) if errors else 'no reason given'}",
        "the graph may use an operator that this TensorRT lacks: try --debug, or a newer TensorRT",
    )


def _configure(trt: TensorRT, config: Any, options: BuildOptions, targets: tuple[str, ...]) -> None:
    module = trt.module
    config.clear_flag(module.BuilderFlag.TF32)  # on by default
    for flag in wanted_flags(options):
        config.set_flag(getattr(module.BuilderFlag, flag))
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware is not None:
        level = options.hardware.replace("+", "_plus").replace("-", "_").upper()
        config.hardware_compatibility_level = getattr(module.HardwareCompatibilityLevel, level)
    if trt.is_rtx and targets != (DEFAULT_TARGET,):
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(module.ComputeCapability, target.upper())
            if not config.set_compute_capability(capability, index):
                raise BuildError(f"TensorRT refused the target {target}", "leave it out")


def _add_profile(builder: Any, config: Any, inputs: Iterable[TensorSpec], profile: Profile) -> None:
    shapes = builder.create_optimization_profile()
    batches = (profile.minimum, profile.optimum, profile.maximum)
    for spec in inputs:
        shapes.set_shape(spec.name, *((batch, *spec.shape[1:]) for batch in batches))
    if config.add_optimization_profile(shapes) < 0:
        raise BuildError(f"TensorRT refused the batch sizes {profile}", "try others with --batch")


def _run(module: Any, builder: Any, network: Any, config: Any, report: Report) -> Any:
    """Builds in a thread, so that Ctrl-C arrives here while TensorRT is busy, and can be passed on to it."""
    tracker = Tracker()
    config.progress_monitor = monitor_to(module, tracker)
    result: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(builder.build_serialized_network(network, config))
        except BaseException as error:  # carried over to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name="tensorrt-build")
    thread.start()
    while thread.is_alive():
        try:
            report(tracker.steps)
            thread.join(0.2)
        except KeyboardInterrupt:
            tracker.cancelled = True
            log.warning("stopping: TensorRT asks whether to go on at its next step, which may take a while")
    if tracker.cancelled:
        raise KeyboardInterrupt
    if failure:
        raise failure[0]
    report(tracker.steps)
    return result[0]


def _require_clean(errors: list[str], graph: Graph) -> None:
    if not errors:
        return
    first, more = errors[0], len(errors) - 1
    hints = [hint for word, hint in _HINTS if any(word in message for message in errors)]
    raise BuildError(
        f"TensorRT could not build {graph.file}: {_short(first)}" + (f" (and {more} more)" if more else ""),
        hints[0] if hints else "all of TensorRT's messages: --debug",
    )


def _short(message: str) -> str:
    """A TensorRT message without the places in NVIDIA's sources."""
    text = re.sub(r"\s*In \w+ at \S*/_src/[^)]*", "", " ".join(message.split()))
    return text if len(text) <= 400 else text[:397] + "..."


def _timing_cache(config: Any, options: BuildOptions) -> Any:
    if options.timing_cache is None:
        return None
    old = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
    cache = config.create_timing_cache(old)
    if not config.set_timing_cache(cache, False):
        raise BuildError(
            f"{options.timing_cache} is a timing cache of another GPU or version", "use a file for each"
        )
    return cache


def _write(content: memoryview, stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    flat = content.cast("B")
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        digest.update(chunk)
        stream.write(chunk)
    return digest.hexdigest()
